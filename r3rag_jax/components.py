"""The objects that entry points build from a configuration: run directory, tokenizer, policy, data, retriever, …"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from r3rag_jax.compiling.peaks import utilization_of
from r3rag_jax.config import Config
from r3rag_jax.data.dataset import Dataset
from r3rag_jax.data.evidence import Evidence
from r3rag_jax.data.questions import iterate_passages
from r3rag_jax.data.records import OnError, Records
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.dev import DevEvaluation
from r3rag_jax.evaluation.evaluator import Evaluator
from r3rag_jax.evaluation.fingerprint import CORPUS, JUDGE, TOKENIZER
from r3rag_jax.evaluation.systems import BASE_POLICY, SYSTEMS
from r3rag_jax.models.paths import model_path, reading
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.mesh import make_mesh, make_sampler_mesh
from r3rag_jax.parallel.processes import exists, on_process_0
from r3rag_jax.retrieval.base import Encoder, Retriever
from r3rag_jax.retrieval.factory import build_index, open_encoder, open_retriever, open_store
from r3rag_jax.retrieval.manifest import has_index, read_manifest
from r3rag_jax.retrieval.store import PassageStore
from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.judge.factory import open_judge
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.rewards.terms import needed_resources
from r3rag_jax.rollout.backend_factory import AnyBackends, EngineBackends, LoadParams, ServerBackends
from r3rag_jax.rollout.backends import RolloutBackend
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.rollout.fit import fitting_questions
from r3rag_jax.rollout.search_env import search_env_factory
from r3rag_jax.run.digests import MODEL_FILES, SETTINGS_FILES, FileDigests
from r3rag_jax.run.directory import RL_TRAJECTORIES, RunDirectory
from r3rag_jax.run.metrics import MetricsLog
from r3rag_jax.run.preemption import StopSignals
from r3rag_jax.run.progress import bar_of_unknown_length
from r3rag_jax.run.provenance import Provenance
from r3rag_jax.run.temporary import TemporaryDirectory
from r3rag_jax.run.trackers.base import Tracker
from r3rag_jax.run.trackers.factory import make_trackers
from r3rag_jax.run.trajectories import TrajectoryLog
from r3rag_jax.sampler.cache.kv_cache import default_kv_dtype
from r3rag_jax.sampler.distribution import Truncation
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.memory import MemoryPlan
from r3rag_jax.text.protocols import TAGS, make_protocol
from r3rag_jax.text.transcript import Codec
from r3rag_jax.training.layout import layout_of
from r3rag_jax.training.likelihood import Likelihood
from r3rag_jax.training.memory_plan import plan_phases, will_hold_policy
from r3rag_jax.training.rl import RLParts
from r3rag_jax.training.sft import SFTParts
from r3rag_jax.training.utilization import Utilization
from r3rag_jax.types import Question
from r3rag_jax.world.dataset import prepare_data


class Components:
    """The objects of one run; each is built once, when it is first accessed.

    Only entry points, `cells.py` and `experiment.py` hold a Components: all other code takes the objects that it needs.
    """

    def __init__(self, config: Config, run_dir: str | os.PathLike[str], console: Console | None = None):
        self.config, self.run = config, RunDirectory.at(run_dir)
        self.layout = layout_of(config)  # None: the mesh that the configuration gives
        self.mesh: Mesh = make_mesh(config.mesh if self.layout is None else self.layout.apply(config.mesh))
        self.sampler_mesh: Mesh = make_sampler_mesh(config.mesh, self.mesh)
        self.console = console or Console(quiet=jax.process_index() != 0)
        if self.layout is not None:
            self.console.print(self.layout.reason, highlight=False, markup=False)

    @functools.cached_property
    def trackers(self) -> tuple[Tracker, ...]:
        """The experiment trackers that `log.trackers` names.

        Raises:
            UserError: a tracker is unknown or not installed.
        """
        return make_trackers(self.config.log.trackers, self.run.path, self.config.model_dump(mode="json"))

    @functools.cached_property
    def log(self) -> MetricsLog:
        """The log of the run's metrics, a context manager; on exit it also finishes the trackers."""
        return MetricsLog(self.run.metrics_file, self.trackers)

    @functools.cached_property
    def trajectory_log(self) -> TrajectoryLog:
        """The log of the RL trajectories that `log.trajectories` selects."""
        return TrajectoryLog(self.run.trajectories(RL_TRAJECTORIES), self.config.log.trajectories, self.trackers)

    @functools.cached_property
    def stop(self) -> StopSignals:
        """The signals that end the run early, a context manager that listens for them."""
        return StopSignals(self.config.stop_s, lambda text: self.console.print(text, highlight=False, markup=False))

    def variant(self, config: Config) -> Components:
        """The objects of the same run with another configuration.

        What the difference does not touch is shared: an engine whose programs are compiled, an index that is open.
        """
        other = Components(config, self.run, self.console)
        for names, untouched in SHARED:
            if _without(self.config, untouched) == _without(config, untouched):
                other.__dict__.update({name: self.__dict__[name] for name in names if name in self.__dict__})
        return other

    # ---- policy and data

    @functools.cached_property
    def policy(self) -> Policy:
        config = self.config
        tags = TAGS if config.rollout.protocol == "tags" else ()
        return Policy(config.model, config.lora, self.mesh, seed=config.seed, trained_tokens=tags)

    @functools.cached_property
    def codec(self) -> Codec:
        """The converter between the protocol's text and token ids.

        Raises:
            UserError: the tokenizer lacks the protocol's tags.
        """
        protocol, tokenizer = make_protocol(self.config.rollout.protocol), self.policy.tokenizer
        missing = [tag for tag in TAGS if tag not in tokenizer] if protocol.name == "tags" else []
        if missing:
            base = self.policy.base_path
            raise UserError(
                f"rollout.protocol=tags needs a tokenizer with {' '.join(TAGS)}; that of {base} lacks "
                f"{' '.join(missing)}: rollout.protocol=steps, or python -m r3rag_jax.convert {base} OUT --add-tags"
            )
        return Codec(tokenizer, protocol, self.config.retrieval.passage_tokens)

    @property
    def shares_prefixes(self) -> bool:
        """Whether samples with a common prefix are merged into one sequence; see `training/prefix_tree.py`."""
        return not self.codec.protocol.is_one_sequence

    @functools.cached_property
    def dataset(self) -> Dataset:
        return Dataset(self.config, self.run, lambda: self.corpus, self.on_error)

    @functools.cached_property
    def corpus(self) -> PassageStore:
        """The passages of the index.

        Raises:
            UserError: there is no index, or a file of it is damaged.
        """
        return open_store(self.index_dir)

    @functools.cached_property
    def on_error(self) -> OnError:
        """What a record that breaks a rule does, by `data.on_error`."""
        return OnError.of(self.config.data, self.console)

    # ---- retriever

    @functools.cached_property
    def index_dir(self) -> Path:
        """Directory of the index: `retrieval.index_dir` or, if that is empty, one in the run directory."""
        return Path(self.config.retrieval.index_dir or self.run.index)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The text encoder of the configuration.

        Raises:
            UserError: the encoder's directory cannot be read.
        """
        return open_encoder(self.config.retrieval, self.index_dir)

    @functools.cached_property
    def retriever(self) -> Retriever:
        return open_retriever(self.config.retrieval, self.index_dir, lambda: self.encoder)

    def open_corpus(self, corpus: Path | None, *, builds_index: bool) -> None:
        """Search `corpus`, if one is given, instead of the run's index.

        Args:
            corpus: its index is built in a temporary directory, which is deleted with this object.
            builds_index: without `corpus`, build the run's index from the corpus of the configuration, if it is not
                there.
        """
        if corpus is not None:
            self._use_corpus(corpus)
        elif builds_index:
            prepare_data(self.config, self.run, self.dataset.path_of("corpus"), self.index_dir, self.console)

    def _use_corpus(self, corpus: Path) -> None:
        self.temporary_index = TemporaryDirectory("r3rag-index-")
        self.index_dir = self.temporary_index.path / "index"
        self._build(corpus)

    def _build(self, corpus: Path) -> None:
        with bar_of_unknown_length("index", console=self.console, live=self.config.log.progress) as on_progress:
            build_index(self.config.retrieval, iterate_passages(corpus, self.on_error), self.index_dir, on_progress)

    def ensure_index(self) -> None:
        """Build the index of `retrieval.index_dir` from the corpus of the configuration, if it is not there.

        Raises:
            UserError: the corpus cannot be read.
        """
        if self.config.retrieval.kind != "http" and not has_index(self.index_dir):
            self._build(self.dataset.path_of("corpus"))

    # ---- rollouts

    @functools.cached_property
    def kv_dtype(self) -> Any:
        """Dtype of the sampler's KV cache."""
        configured = self.config.rollout.kv_dtype
        if configured != "auto":
            return jnp.dtype(configured)
        return default_kv_dtype(self.config.model.dtype, self.policy.decoder_config, self.sampler_mesh)

    @functools.cached_property
    def engine(self) -> Engine:
        rollout = self.config.rollout
        return Engine(
            self.policy.graphdef, self.policy.decoder_config, self.sampler_mesh,
            slots=rollout.slots, max_length=rollout.max_length,
            decode_chunk=rollout.decode_chunk, truncation=Truncation.of(rollout),
            dtype=self.kv_dtype, shard_weights=rollout.shard_weights,
        )  # fmt: skip

    @functools.cached_property
    def search_env(self) -> EnvFactory:
        """Factory of the environments that run R3-RAG's protocol, one per rollout."""
        retrieval = self.config.retrieval
        return search_env_factory(
            self.codec, self.config.rollout, top_k=retrieval.top_k, max_passages=retrieval.max_passages
        )

    @functools.cached_property
    def engine_backends(self) -> EngineBackends:
        """Factory of rollout backends that sample with the local engine; each holds the weights of one policy."""
        is_shared = self.sampler_mesh is self.mesh
        shardings = None if is_shared else self.policy.param_shardings(self.sampler_mesh)
        return EngineBackends(self.config.rollout, self.engine, self.policy.tokenizer, shardings)

    @functools.cached_property
    def backends(self) -> AnyBackends:
        """Factory of rollout backends: the user's inference server if one is configured, otherwise the local engine."""
        if self.config.rollout.server.is_given:
            return ServerBackends(self.config.rollout, self.policy.tokenizer)
        return self.engine_backends

    # ---- rewards

    def make_scorer(self, reference: Any) -> Scorer:
        """The reward function that the configuration describes.

        Args:
            reference: parameters of the reference policy.

        Raises:
            UserError: the encoder or the judge cannot be opened; see `encoder` and `judge`.
        """
        needed, rl = needed_resources(self.config.rewards), self.config.rl
        encoder = self.encoder if "encoder" in needed and jax.process_index() == 0 else None  # process 0 encodes
        judge = self.judge if "judge" in needed else None
        likelihood = None
        if "likelihood" in needed:
            shape = {"row_length": rl.row_length, "batch_rows": rl.batch_rows}
            likelihood = Likelihood(self.codec, self.mesh, self.policy.graphdef, reference, **shape)
        return Scorer(self.config.rewards, Resources(self.config.rollout.max_steps, encoder, judge, likelihood))

    @functools.cached_property
    def judge(self) -> Judge:
        """The judge of the configuration.

        Raises:
            UserError: its model, API key, prompts or file of judgements cannot be read.
        """
        return open_judge(self.config.judge, self.mesh, self.run.judgements)

    # ---- inputs of each phase

    @functools.cached_property
    def memory_plans(self) -> dict[str, list[MemoryPlan]]:
        """Memory plans of the unfinished phases, by phase.

        Raises:
            UserError: a device has too little memory, or the tokenizer lacks the protocol's tags.
        """
        config = self.config
        phases = [phase for phase in config.phases if will_hold_policy(config, self.run, phase)]
        if not phases:
            return {}
        self.codec  # noqa: B018  # a wrong tokenizer must be reported first
        return plan_phases(config, phases, self.policy, self.mesh, self.sampler_mesh, self.kv_dtype)

    @property
    def sft_parts(self) -> SFTParts:
        """The inputs of the cold start.

        Raises:
            UserError: the protocol cannot read a teacher's step back, and `data.on_error` is stop; or held-out
                questions are learnt from, and `data.leakage` is refuse.
        """
        trajectories = self.on_error.check(self.dataset.trajectories(), self.codec.unreadable_step)
        self.dataset.leaks  # noqa: B018  # reported, or refused
        return SFTParts(
            mesh=self.mesh, policy=self.policy, codec=self.codec, trajectories=trajectories,
            shares_prefixes=self.shares_prefixes, run=self.run, provenance=self.provenance("sft"), log=self.log,
            console=self.console, on_error=self.on_error, stop=self.stop, utilization=self.utilization,
        )  # fmt: skip

    @property
    def rl_parts(self) -> RLParts:
        """The inputs of RL.

        Raises:
            UserError: a question does not fit the context, and `data.on_error` is stop; no question has the evidence
                that its process reward needs; or held-out questions are learnt from, and `data.leakage` is refuse.
        """
        questions = self._fitting(self.dataset.questions("rl"))
        self.dataset.leaks  # noqa: B018  # reported, or refused
        evidence = self._evidence(questions)
        evidence.check(self.config.rewards, self.on_error.say)
        evidence.report_cut(self.codec.shown, self.codec.passage_tokens, self.on_error.say)
        return RLParts(
            mesh=self.mesh, sampler_mesh=self.sampler_mesh, policy=self.policy, make_backend=self.engine_backends,
            env_factory=self.search_env, retriever=self.retriever, make_scorer=self.make_scorer,
            questions=questions, evaluate=self.dev_evaluation, shares_prefixes=self.shares_prefixes, run=self.run,
            provenance=self.provenance("rl"), log=self.log, trajectory_log=self.trajectory_log,
            console=self.console, stop=self.stop, sampler_work=lambda: self.engine.work, utilization=self.utilization,
        )  # fmt: skip

    @property
    def utilization(self) -> Utilization | None:
        """What tells how much of the devices' peak rates is used; None where these are not known."""
        return utilization_of(self.config, self.policy.decoder_config, self.mesh)

    def provenance(self, phase: str) -> Provenance:
        """What phase `sft` or `rl` begins from as the run is now. All processes must call."""
        found = {"base": self.digest_of(BASE_POLICY)}
        if phase == "rl":
            found["cold_start"] = self.digest_of("sft") if exists(self.run.policy("sft")) else ""
        data, digests = self.dataset.path_of(phase), FileDigests(self.run.digests)

        def of_files() -> dict[str, str]:
            files = {"data": digests.get(data)[:16]} if data.is_file() else {}
            if left_out := self.on_error.num_left_out:  # not compared
                files["left_out"] = ", ".join(f"{num} records of {path}" for path, num in sorted(left_out.items()))
            return files | ({"corpus": read_manifest(self.index_dir).corpus[:16]} if has_index(self.index_dir) else {})

        return found | on_process_0(of_files, f"provenance of {phase}")

    @functools.cached_property
    def dev_evaluation(self) -> DevEvaluation | None:
        """The evaluation on dev questions during RL; None if there are no dev questions."""
        if not (questions := self.dataset.questions("dev")):
            return None
        questions = self._fitting(questions)
        overlap = self.config.rollout.search_overlap
        return DevEvaluation(questions, self.search_env, self.retriever, search_overlap=overlap)

    # ---- evaluation

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator of systems with this run's policies and retriever."""
        return Evaluator(
            self.config, self.run, self.policy.tokenizer, self.retriever, make_search_env=lambda: self.search_env,
            open_backend=self.open_backend, open_judge=lambda: self.judge, digest_of=self.digest_of,
            console=self.console,
        )  # fmt: skip

    def eval_questions(self) -> Records[Question]:
        """The questions of the eval phase: the first `eval.max_questions`, which every one of `eval.systems` can read.

        Raises:
            UserError: one does not fit a system's context, and `data.on_error` is stop.
        """
        questions = self.dataset.questions("test")
        questions = questions.take(range(len(questions))[: self.config.eval.max_questions or None])
        return self._fitting(questions, self.config.eval.systems)

    def read_questions(self, path: str | Path, system: str) -> Records[Question]:
        """The questions of a file, which a system can read.

        Raises:
            UserError: as `eval_questions`.
        """
        return self._fitting(self.dataset.told_apart(self.dataset.read(path)), [system])

    def _fitting(self, questions: Records[Question], systems: Sequence[str] = ()) -> Records[Question]:
        """Those that fit the context of all systems, by default of R3-RAG; says which evidence is not in the corpus."""
        self._evidence(questions).report(self.on_error.say)
        factories = {system: SYSTEMS[system].make_env(self.evaluator) for system in systems}
        factories = factories or {"r3rag": self.search_env}
        return fitting_questions(questions, factories, self.config.rollout.max_length, self.on_error)

    def _evidence(self, questions: Records[Question]) -> Evidence:
        # What a server searches may be more than data.corpus.
        is_asked = self.config.retrieval.kind != "http" and any(question.supporting_ids for question in questions)
        return Evidence.of(questions, self.corpus if is_asked else None)

    def loader(self, policy: str) -> LoadParams:
        """What loads a policy: `base`, or a finished phase's."""
        return self.policy.base_params if policy == BASE_POLICY else lambda: self.policy.load(self.run.policy(policy))

    def open_backend(self, policy: str) -> RolloutBackend:
        """Open a rollout backend with a policy. An inference server ignores it."""
        return self.backends(self.loader(policy))

    def _corpus_digest(self) -> str:
        is_known = self.config.retrieval.kind != "http" and has_index(self.index_dir)
        return read_manifest(self.index_dir).corpus[:16] if is_known else ""

    def digest_of(self, what: str) -> str:
        """Digest of the files of a policy (`base`, or a finished phase's), of the tokenizer, of the local judge, or of
        the corpus.

        All processes must call. The corpus of a server is not known: "".
        """
        if what == CORPUS:
            return on_process_0(self._corpus_digest, "digest of the corpus")
        patterns = SETTINGS_FILES if what == TOKENIZER else MODEL_FILES
        of_policy = self.policy.base_path if what in (BASE_POLICY, TOKENIZER) else self.run.policy(what)
        path = model_path(self.config.judge.local.path) if what == JUDGE else of_policy

        def digest() -> str:
            with reading(path):
                return FileDigests(self.run.digests).of_model(path, patterns)[:16]

        found = on_process_0(digest, f"digest of {what}")
        is_random = what == BASE_POLICY and self.config.model.init == "random"
        return f"{found} random {self.config.seed}" if is_random else found


# Keys that change how an Env plays a question and what is measured, and nothing that is loaded or compiled.
PLAY_KEYS = ("eval", "baselines", "retrieval.top_k", "retrieval.max_passages", "rollout.max_steps")
# Objects, and the keys and sections that do not change them.
SHARED = (
    (("policy", "kv_dtype", "engine", "judge"), ("eval", "baselines", "retrieval", "rollout.max_steps")),
    (("index_dir", "temporary_index", "encoder", "retriever", "corpus"), PLAY_KEYS),
)


def _without(config: Config, keys: Sequence[str]) -> dict[str, Any]:
    """A configuration as a tree without some of its keys or sections."""
    tree = config.model_dump()
    for key in keys:
        *sections, name = key.split(".")
        functools.reduce(lambda node, section: node[section], sections, tree).pop(name)
    return tree
