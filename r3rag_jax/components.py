"""What every entry point builds from a configuration: run directory, tokenizer, policy, data, retriever, engine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from r3rag_jax.clients.completions import Server
from r3rag_jax.config.loader import load_config, to_yaml
from r3rag_jax.config.schema import Config, ConfigError
from r3rag_jax.data.qa import read_passages, read_questions, read_rows, read_trajectories, write_jsonl
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.evaluator import reading_stops
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import PARAM_AXES, Decoder, param_shardings
from r3rag_jax.models.hf.decoder_files import load_config as load_decoder_config
from r3rag_jax.models.hf.decoder_files import load_decoder, load_generation, save_decoder
from r3rag_jax.models.lora import Parts, attach
from r3rag_jax.models.paths import model_path, reading
from r3rag_jax.parallel.mesh import make_mesh, make_sampler_mesh
from r3rag_jax.parallel.processes import barrier
from r3rag_jax.parallel.shardings import tree_shardings
from r3rag_jax.retrieval.encoders.bert import BertEncoder
from r3rag_jax.retrieval.faiss import FaissIndex
from r3rag_jax.rewards.judge.factory import open_judge
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rollout.rollout import Player, Roller, Rules, ServedRoller
from r3rag_jax.run.metrics import MetricsLog
from r3rag_jax.run.progress import Bar
from r3rag_jax.sampler.cache import fastest_dtype
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.distribution import Truncation
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.text.protocols import TAGS, make_protocol
from r3rag_jax.text.tokenizer import Tokenizer, read_template
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Passage, Question, Trajectory
from r3rag_jax.world.dataset import write_teacher, write_world
from r3rag_jax.world.encyclopedia import World

# Sections that may change when a run is resumed: they do not change what was computed.
FREE_KEYS = ("run_dir", "phases", "eval", "guards", "mesh", "log", "rollout.server")
# Of a judge also while it has a say in rewards: where it is and how patiently it is asked.
FREE_OF_JUDGE = tuple(
    f"judge.{name}"
    for name in "url key_env max_in_flight requests_per_minute retries timeout_s max_failure_share cache slots".split()
)
SPLITS = ("sft", "rl", "dev", "test")


def open_run(config: Config) -> Path:
    """Create the run directory, or check that it was made by this very configuration.

    Raises:
        UserError: the directory holds a run with other settings; nothing is overwritten.
    """
    run_dir = config.run_directory
    path = run_dir / "config.yaml"
    if path.exists():
        old = load_config(path)
        changed = [name for name, (was, now) in _differences(old, config).items()
                   if not _is_free(name, old) and was != now]  # fmt: skip
        if changed:
            was, now = _differences(old, config)[changed[0]]
            raise UserError(
                f"{run_dir} holds a run with other settings ({changed[0]} was {was!r}, now {now!r}): "
                "choose another name=… or remove the directory"
            )
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty and holds no run: choose another name=… or run_dir=…")
    barrier("run directory checked")  # before process 0 changes what the others look at
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(config))
    barrier("run directory")
    return run_dir


def _is_free(name: str, old: Config) -> bool:
    """Whether a dotted key is one of FREE_KEYS, of such a section, or (`server_…`) of such a group.

    What a judge is may change where the run has trained on no word of it.
    """
    if name.startswith("judge."):
        return name in FREE_OF_JUDGE or not old.rewards.needs_judge
    return any(name == free or name.startswith((f"{free}.", f"{free}_")) for free in FREE_KEYS)


def _differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of every key with two values."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for name, value in tree.items():
            pairs |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return pairs

    was, now = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
    return {name: (was[name], now[name]) for name in was if was[name] != now[name]}


class Session:
    """Lazily built parts of one run, each made once."""

    def __init__(self, config: Config, run_dir: Path, *, console: Console | None = None):
        self.config, self.run_dir = config, Path(run_dir)
        self.mesh: Mesh = make_mesh(config.mesh)
        self.sampler_mesh: Mesh = make_sampler_mesh(config.mesh, self.mesh)
        self.console = console or Console(quiet=jax.process_index() != 0)
        self.log = MetricsLog(self.run_dir)

    # ---- model

    @property
    def base_path(self) -> Path:
        """The Hugging Face directory that the policy starts from."""
        if self.config.model.path == "bundled":
            return Path(str(files("r3rag_jax") / "world" / "base"))
        path = model_path(self.config.model.path)
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.path must be a Hugging Face directory with config.json; got {path}")
        return path

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        name = self.config.model.chat_template
        template = read_template(name) if name else None
        with reading(self.base_path):
            return Tokenizer(self.base_path, chat_template=template)

    @functools.cached_property
    def codec(self) -> Codec:
        """What turns the protocol's text into ids.

        Raises:
            UserError: the tokenizer lacks the protocol's tags.
        """
        protocol = make_protocol(self.config.rollout.protocol)
        lacking = [tag for tag in TAGS if tag not in self.tokenizer] if protocol.name == "tags" else []
        if lacking:
            raise UserError(
                f"rollout.protocol=tags needs a tokenizer with {' '.join(TAGS)}; that of {self.base_path} lacks "
                f"{' '.join(lacking)}: python -m r3rag_jax.convert {self.base_path} OUT --add-tags"
            )
        return Codec(self.tokenizer, protocol, self.config.retrieval.passage_tokens)

    @property
    def shares_prefixes(self) -> bool:
        """Whether samples that begin alike are trained in one sequence; see `prefix_tree.py`."""
        return not self.codec.protocol.is_one_sequence and self.config.model.attention != "splash"

    @functools.cached_property
    def decoder_config(self) -> DecoderConfig:
        with reading(self.base_path):
            return load_decoder_config(self.base_path)

    @functools.cached_property
    def graphdef(self) -> Any:
        """The static half of the policy."""
        return nnx.split(nnx.eval_shape(self.new_decoder))[0]

    def new_decoder(self) -> Decoder:
        return Decoder(
            self.decoder_config,
            rngs=nnx.Rngs(self.config.seed),
            param_dtype=self.param_dtype,
            dtype=jnp.dtype(self.config.model.dtype),
            attention_implementation=self.config.model.attention,
        )

    @property
    def param_dtype(self) -> Any:
        """Of the decoder's parameters: float32, or, where adapters alone are trained, the compute type."""
        return jnp.dtype(self.config.model.dtype if self.config.lora.rank else "float32")

    def trainable_policy(self, params: Any) -> Parts:
        """The policy of these parameters, with new adapters where the configuration asks for them."""
        tags = [self.tokenizer.token_id(tag) for tag in TAGS] if self.config.rollout.protocol == "tags" else []
        decoder = attach(nnx.merge(self.graphdef, params), self.config.lora, self.mesh, self.config.seed, tags)
        return Parts.of(decoder, self.config.lora)

    def base_params(self) -> Any:
        """Parameters that training starts from, on the mesh."""
        if self.config.model.init == "random":
            build: Callable[[], Any] = lambda: nnx.split(self.new_decoder())[1]  # noqa: E731
            return jax.jit(build, out_shardings=self._param_shardings())()
        return self._load(self.base_path)

    def phase_params(self, phase: str) -> Any:
        """What a finished phase left, on the mesh."""
        return self._load(self.policy_dir(phase))

    def _load(self, path: Path) -> Any:
        with reading(path):
            decoder = load_decoder(
                path,
                dtype=jnp.dtype(self.config.model.dtype),
                param_dtype=self.param_dtype,
                shardings=param_shardings(self.mesh, self.decoder_config),
                attention_implementation=self.config.model.attention,
            )
        return nnx.split(decoder)[1]

    def _param_shardings(self, mesh: Mesh | None = None) -> Any:
        shapes = nnx.split(nnx.eval_shape(self.new_decoder))[1]
        return tree_shardings(mesh or self.mesh, shapes, PARAM_AXES)

    def policy_dir(self, phase: str) -> Path:
        """Where a finished phase leaves the policy, as a Hugging Face directory."""
        return self.run_dir / "policy" / phase

    def save_policy(self, phase: str, params: Any) -> None:
        """Export the policy in float32, a matrix at a time; its directory appears only when it is complete."""
        partial = self.policy_dir(phase).with_name(f".{phase}.partial")
        with reading(self.base_path):
            generation = self.tokenizer.generation_ids() | load_generation(self.base_path)
        save_decoder(nnx.merge(self.graphdef, params), partial, dtype="float32", generation=generation)
        if jax.process_index() == 0:
            self.tokenizer.save(partial)
            partial.rename(self.policy_dir(phase))
        barrier(f"policy {phase}")

    # ---- data and retriever

    def path_of(self, what: str) -> Path:
        """The file of `corpus` or of a split."""
        data = self.config.data
        if data.source == "world" or (what == "sft" and data.search_again):
            return self.run_dir / "data" / f"{what}.jsonl"
        return data.path(what)

    def trajectories(self) -> list[Trajectory]:
        """The teacher's trajectories of the cold start, with the documents that a rollout would show."""
        data, corpus = self.config.data, {passage.id: passage for passage in self.retriever.passages}
        found = read_trajectories(self.path_of("sft"), corpus, self.config.retrieval.top_k)
        if data.source == "world" or data.num_sft in (0, len(found)):
            return found
        if data.num_sft > len(found):
            raise UserError(
                f"data.num_sft must be at most {len(found)}, what {data.path('sft')} holds; got {data.num_sft}"
            )
        order = np.random.default_rng((self.config.seed, *b"sft")).permutation(len(found))
        return [found[i] for i in sorted(order[: data.num_sft])]

    def questions(self, split: str) -> list[Question]:
        """The questions of a split, none where no file is given.

        Raises:
            UserError: the cold start used all questions that RL has.
        """
        data = self.config.data
        if data.source == "files" and not getattr(data, split):
            return []
        questions = read_questions(self.path_of(split))
        if data.source == "files" and split == "rl" and data.disjoint and data.sft:
            used = {trajectory.question.id for trajectory in self.trajectories()}
            questions = [question for question in questions if question.id not in used]
            if not questions:
                raise UserError(
                    f"data.disjoint leaves no question for RL: all of {data.path('rl')} are in the cold start; "
                    "take fewer (data.num_sft) or data.disjoint=false"
                )
        return questions

    @property
    def index_dir(self) -> Path:
        return self.run_dir / "index"

    @functools.cached_property
    def encoder(self) -> BertEncoder | None:
        """The text encoder of the configuration; None for `hash`, which is fitted on a corpus and kept with its index.

        Raises:
            UserError: the encoder's directory cannot be read.
        """
        retrieval = self.config.retrieval
        if retrieval.encoder == "hash":
            return None
        return BertEncoder(
            model_path(retrieval.encoder_path), pooling=retrieval.pooling, query_prefix=retrieval.query_prefix,
            passage_prefix=retrieval.passage_prefix, max_length=retrieval.encoder_length,
            batch_tokens=retrieval.encoder_batch, dtype=retrieval.encoder_dtype,
        )  # fmt: skip

    @functools.cached_property
    def retriever(self) -> FaissIndex:
        return FaissIndex.load(self.index_dir, self.encoder)

    def build_index(self, passages: Sequence[Passage]) -> FaissIndex:
        """Index passages with the encoder of the configuration."""
        if self.encoder is None:
            return FaissIndex.build(passages, dim=self.config.retrieval.dim)
        with Bar("encode", len(passages), console=self.console, live=self.config.log.progress) as bar:
            return FaissIndex(self.encoder, passages, progress=bar.advance)

    def write_data(self) -> None:
        """Write the world's files and build the index. Only process 0 works; finished parts are kept."""
        if jax.process_index() == 0:
            if self.config.data.source == "world":
                world = World.generate(self.config.world.seed, num_people=self.config.world.num_people)
                write_world(world, self.config, self.run_dir / "data")
            passages = read_passages(self.path_of("corpus"))
            index = self.build_index(passages)
            if self.config.data.source == "world":
                write_teacher(world, self.config, index, self.run_dir / "data")
            elif self.config.data.search_again:
                read_trajectories(  # says what is wrong with the file, and where
                    self.config.data.path("sft"), {p.id: p for p in passages}, self.config.retrieval.top_k
                )
                search_again(self.config, index, self.run_dir / "data")
            index.save(self.index_dir)
        barrier("index")

    # ---- rollouts

    @functools.cached_property
    def engine(self) -> Engine:
        rollout = self.config.rollout
        return Engine(
            self.graphdef, self.decoder_config, self.sampler_mesh, slots=rollout.slots, max_length=rollout.max_length,
            truncation=Truncation.of(rollout), dtype=self.cache_dtype, split_weights=rollout.split_weights,
        )  # fmt: skip

    @property
    def cache_dtype(self) -> Any:
        """Of the sampler's keys and values."""
        kv_dtype = self.config.rollout.kv_dtype
        if kv_dtype != "auto":
            return jnp.dtype(kv_dtype)
        return fastest_dtype(self.config.model.dtype, self.decoder_config, self.sampler_mesh)

    def roller(self, top_k: int | None = None) -> Player:
        """The engine, or the user's server, set up for trajectories of the configured protocol."""
        codec, retrieval = self.codec, self.config.retrieval
        rules = Rules(codec, self.retriever, self.config.rollout, top_k or retrieval.top_k, retrieval.max_passages)
        if self.config.rollout.server:
            return ServedRoller(self.server(codec.eos_id, codec.stop_ids), rules)
        end_of = rules.end_of if self.config.rollout.stop_strings else None
        self.engine.stop_at(*codec.ends, end_of)
        return Roller(self.engine, rules)

    def reading_engine(self) -> Engine | Server:
        """The engine, or the user's server, set up for the baselines' one line of answer."""
        stops = reading_stops(self.tokenizer)
        if self.config.rollout.server:
            return self.server(self.tokenizer.eos_id, [i for i in stops if i != self.tokenizer.eos_id])
        self.engine.stop_at((), stops, functools.partial(self.tokenizer.end_of, ("\n",)))
        return self.engine

    def server(self, eos_id: int, stop_ids: Sequence[int] = ()) -> Server:
        """The user's inference server, with what ends a completion."""
        return Server(self.config.rollout, self.tokenizer, eos_id=eos_id, stop_ids=stop_ids)

    # ---- judge

    @functools.cached_property
    def judge(self) -> Judge:
        """The judge of the configuration.

        Raises:
            UserError: its model, key, prompts or file of judgements cannot be read.
        """
        return open_judge(self.config.judge, self.mesh, self.run_dir / "judgements.jsonl")

    def judge_mark(self) -> dict[str, Any]:
        """What a fingerprint says of the evaluation's judge."""
        judge = self.config.judge
        return {"judge": judge.model or judge.url} if self.config.eval.judge else {}

    # ---- a user's inference server

    def sampling_policy(self, load: Callable[[], Any]) -> Any:
        """What rollouts take: that of the parameters that `load` gives, or None where a server has its own."""
        return None if self.config.rollout.server else self.to_sampler(load())

    def to_sampler(self, params: Any) -> CachedDecoder:
        """A copy of the policy's parameters where rollouts run; `params` may be donated afterwards."""
        if self.sampler_mesh is not self.mesh:
            params = jax.device_put(params, self._param_shardings(self.sampler_mesh))
        return self.engine.load(params)

    def sampling_mark(self) -> dict[str, Any]:
        """What a fingerprint says of a user's server: which one, and which model it served."""
        rollout = self.config.rollout
        return {"server": f"{rollout.server} {rollout.server_model}".strip()} if rollout.server else {}


def search_again(config: Config, index: FaissIndex, directory: Path) -> None:
    """The cold start's trajectories with what the index brings for their queries; `passage_ids` stay among it."""
    rows = [dict(row) for _, row in read_rows(config.data.path("sft"))]
    asking = [step for row in rows for step in row["steps"] if "query" in step]
    depth = 4 * config.retrieval.top_k
    for step, hits in zip(asking, index.search([step["query"] for step in asking], depth), strict=True):
        step["retrieved_ids"] = [hit.passage.id for hit in hits]
        step.pop("passages", None)
    write_jsonl(directory / "sft.jsonl", rows)
