"""Every configuration key: frozen dataclasses, a comment and unit per field, relations checked.

`configio` reads them from YAML and `key=value` overrides, strictly, and prints them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from r3rag_jax.errors import UserError

PHASES = ("index", "sft", "rl", "eval")
SYSTEMS = ("closed_book", "oneshot_rag", "cold_start", "r3rag")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_SEED = 2**32 - 1  # what numpy takes
URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")  # without user, query or fragment: no place for a key

Rule = tuple[str, Callable[[Any], bool]]
AT_LEAST_0: Rule = ("at least 0", lambda x: x >= 0)
AT_LEAST_1: Rule = ("at least 1", lambda x: x >= 1)
ABOVE_0: Rule = ("above 0", lambda x: x > 0)
FRACTION: Rule = ("in [0, 1]", lambda x: 0 <= x <= 1)
SEED: Rule = (f"in [0, {MAX_SEED}]", lambda x: 0 <= x <= MAX_SEED)
MESH_SIZE: Rule = ("at least 1, or -1 for what is left", lambda x: x == -1 or x >= 1)


class ConfigError(UserError):
    """A configuration that cannot be used: one line with the dotted key, the rule and what came.

    `keys` are the dotted keys that the rule is about, so that the loader can name where they stand.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


def key(default: Any, help: str, unit: str = "") -> Any:
    """A dataclass field with what `--help` prints of it."""
    metadata = {"help": help, "unit": unit}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        raise TypeError(f"defaults must be immutable scalars or tuples; got {default!r}")
    return dataclasses.field(default=default, metadata=metadata)


def _require(ok: bool, message: str, *keys: str) -> None:
    """Raises ConfigError with `message` about the dotted `keys` unless `ok`."""
    if not ok:
        raise ConfigError(message, keys)


def _each(section: Any, prefix: str, rule: Rule, names: str) -> None:
    """Holds every field of `section` in the blank-separated `names` to `rule`."""
    words, holds = rule
    for name in names.split():
        value = getattr(section, name)
        _require(holds(value), f"{prefix}{name} must be {words}; got {value}", prefix + name)


def _names(values: tuple[str, ...], allowed: tuple[str, ...], dotted: str) -> None:
    """Holds a tuple of names to: at least one, each of `allowed`, none twice."""
    listed = ", ".join(allowed)
    _require(len(values) > 0, f"{dotted} must name at least one of {listed}; got none", dotted)
    for value in values:
        _require(value in allowed, f"{dotted} must be among {listed}; got {value!r}", dotted)
    _require(
        len(set(values)) == len(values),
        f"{dotted} must name nothing twice; got {', '.join(values)}",
        dotted,
    )


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """The embedded fictional encyclopedia (`data.source: world`)."""

    seed: int = key(0, "which world; any integer gives a new one")
    num_people: int = key(600, "people in the encyclopedia", "entities")
    num_sft: int = key(500, "questions with a teacher's trajectory, for the cold start", "questions")
    num_rl: int = key(3000, "questions without trajectories, for RL", "questions")
    num_dev: int = key(64, "questions to watch while training", "questions")
    num_test: int = key(400, "questions for the final tables", "questions")
    waste: float = key(0.25, "share of teacher trajectories with a needless retrieval", "fraction")
    haste: float = key(0.0, "share of the teacher's comparisons that end on a lucky guess", "fraction")

    def __post_init__(self) -> None:
        _each(self, "world.", SEED, "seed")
        _each(self, "world.", AT_LEAST_1, "num_people num_sft num_rl num_dev num_test")
        _each(self, "world.", FRACTION, "waste haste")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where questions, trajectories and passages come from."""

    source: Literal["world", "files"] = key("world", "`world` writes the embedded one; `files` reads the paths below")
    dir: str = key("", "folder that the relative paths below start from", "path")
    corpus: str = key("", "passages, FlashRAG JSONL {id, contents}", "path")
    sft: str = key("", "trajectories for the cold start, JSONL {question, golden_answers, steps}", "path")
    rl: str = key("", "questions for RL, FlashRAG JSONL", "path")
    dev: str = key("", "questions to watch while training, FlashRAG JSONL", "path")
    test: str = key("", "questions for the final tables, FlashRAG JSONL", "path")
    num_sft: int = key(0, "trajectories that the cold start takes, drawn by the seed; 0: all", "trajectories")
    disjoint: bool = key(True, "RL leaves out the questions of the cold start's trajectories")
    search_again: bool = key(
        False, "the cold start shows what this run's retriever brings for a trajectory's queries, not its retrieved_ids"
    )

    def path(self, name: str) -> Path:
        """The file of `corpus` or of a split."""
        return Path(self.dir) / getattr(self, name)

    def __post_init__(self) -> None:
        _each(self, "data.", AT_LEAST_0, "num_sft")
        _require(
            self.source != "files" or self.corpus != "",
            "data.corpus must be given when data.source is files; got none",
            "data.corpus",
            "data.source",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = key(
        "bundled",
        "a Hugging Face directory, `package:NAME` for one in an installed package, or `bundled`: a small Qwen2 base",
        "path",
    )
    chat_template: str = key(
        "",
        "a Jinja file, or `chatml` or `llama3`, as the published checkpoints were trained; empty: the model's own",
        "path",
    )
    init: Literal["pretrained", "random"] = key("pretrained", "`random` keeps architecture and tokenizer only")
    dtype: Literal["float32", "bfloat16"] = key("float32", "compute type; what is trained is kept in float32")
    moment_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "of Adam's first moment; the second is kept in float32, like what is trained"
    )
    remat: Literal["none", "full", "dots"] = key("none", "what the backward pass recomputes")
    attention: Literal["xla", "cudnn", "splash"] = key(
        "xla", "in training: `xla` runs anywhere, `cudnn` on NVIDIA in bfloat16, `splash` on TPU"
    )
    micro_tokens: int = key(
        0, "a device computes gradients of at most so many tokens at once, and adds them up; 0: of the batch", "tokens"
    )

    def __post_init__(self) -> None:
        _require(self.path != "", "model.path must be a directory or bundled; got none", "model.path")
        _each(self, "model.", AT_LEAST_0, "micro_tokens")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685), which train a small part of the policy and of a separate critic."""

    rank: int = key(0, "rank of the adapters; 0: none, all parameters are trained")
    alpha: float = key(32.0, "adapters are multiplied with alpha / rank")
    targets: tuple[str, ...] = key(PROJECTIONS, "projections of every layer that get one")

    def __post_init__(self) -> None:
        _each(self, "lora.", AT_LEAST_0, "rank")
        _each(self, "lora.", ABOVE_0, "alpha")
        _names(self.targets, PROJECTIONS, "lora.targets")


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """The retriever."""

    encoder: Literal["hash", "bert"] = key(
        "hash", "`hash`: TF-IDF of hashed words and letter n-grams, needs no download; `bert`: MiniLM, E5, BGE"
    )
    encoder_path: str = key("", "with a bert encoder: its Hugging Face directory, or `package:NAME`", "path")
    encoder_dtype: Literal["float32", "bfloat16"] = key("float32", "compute type of the bert encoder")
    encoder_length: int = key(0, "longest text the bert encoder reads, the rest is cut; 0: the model's limit", "tokens")
    encoder_batch: int = key(16_384, "a batch of the bert encoder, padding included; a bound on memory", "tokens")
    pooling: Literal["auto", "mean", "cls"] = key(
        "auto", "token states to a vector; `auto` is what sentence-transformers' modules.json says"
    )
    query_prefix: str = key(
        "auto", "put before every query of the bert encoder, e.g. E5's `query: `; `auto`: sentence-transformers' prompt"
    )
    passage_prefix: str = key(
        "auto", "put before every passage of the bert encoder, e.g. E5's `passage: `; `auto`: likewise"
    )
    dim: int = key(1024, "embedding size of the hash encoder", "floats")
    index: Literal["flat"] = key("flat", "FAISS index type")
    top_k: int = key(2, "passages per retrieval", "passages")
    oneshot_top_k: int = key(8, "passages of the one-shot RAG baseline", "passages")
    passage_tokens: int = key(64, "budget per passage; longer ones are cut", "tokens")
    max_passages: int = key(10, "budget of a trajectory", "passages")

    def __post_init__(self) -> None:
        _each(
            self,
            "retrieval.",
            AT_LEAST_1,
            "encoder_batch dim top_k oneshot_top_k passage_tokens max_passages",
        )
        _each(self, "retrieval.", AT_LEAST_0, "encoder_length")
        _require(
            self.encoder != "bert" or self.encoder_path != "",
            "retrieval.encoder_path must be given when retrieval.encoder is bert; got none",
            "retrieval.encoder_path",
            "retrieval.encoder",
        )
        _require(
            self.max_passages >= self.top_k,
            f"retrieval.max_passages must be at least retrieval.top_k={self.top_k}; got {self.max_passages}",
            "retrieval.max_passages",
            "retrieval.top_k",
        )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Sampling of trajectories."""

    protocol: Literal["tags", "steps"] = key("tags", "text layout of a trajectory")
    max_steps: int = key(5, "reasoning steps per trajectory", "steps")
    max_new_tokens: int = key(64, "budget of one step", "tokens")
    max_trajectory_tokens: int = key(0, "budget of sampled tokens over all steps of a trajectory; 0: none", "tokens")
    max_length: int = key(512, "budget of a context; cache slots per row", "tokens")
    slots: int = key(64, "rows decoded side by side", "rows")
    split_weights: bool = key(
        False, "mesh.fsdp splits the sampler's copy of the weights too: less memory, but each step gathers all of it"
    )
    kv_dtype: Literal["auto", "int8", "bfloat16", "float32"] = key(
        "auto",
        "type of cached keys and values; auto: model.dtype, or float32 on CPUs without compiler; int8: not exact",
    )
    decode_chunk: int = key(32, "most tokens per row in one call on the device", "tokens")
    search_turns: int = key(
        0, "decode calls that a search runs beside, in a thread, while its rows wait; 0: all wait. For slow retrievers"
    )
    samples: int = key(4, "trajectories per question in RL", "trajectories")
    temperatures: tuple[float, ...] = key((1.0,), "one per sample, repeated as needed; 0 is greedy")
    stop_strings: tuple[str, ...] = key((), "text that ends a step like a stop token, wherever in a token it ends")
    min_p: float = key(0.0, "tokens below this share of the largest probability are not sampled", "fraction")
    top_k_tokens: int = key(0, "only so many of the most likely tokens are sampled; 0: all", "tokens")
    top_p: float = key(1.0, "only the most likely tokens that hold this share of them are sampled; 1: all", "fraction")
    server: str = key(
        "",
        "evaluate with this OpenAI-compatible server, e.g. http://localhost:8000/v1; empty: the built-in engine",
        "url",
    )
    server_model: str = key("", "name of the policy on the server; empty: the first model that it lists")
    server_key_env: str = key("", "environment variable that holds the server's API key; empty: none is sent")
    server_prompt: Literal["ids", "text"] = key("ids", "`text`: for a server that takes no token ids; not exact")
    server_extras: bool = key(True, "also send what OpenAI's API lacks, e.g. min_p; false: the server refuses that")
    server_retries: int = key(6, "calls repeated while the server is busy or away, with doubling waits", "calls")
    server_timeout_s: float = key(600.0, "longest silence of the server in a call", "seconds")

    def __post_init__(self) -> None:
        _each(self, "rollout.", AT_LEAST_0, "server_retries search_turns")
        _each(self, "rollout.", ABOVE_0, "server_timeout_s")
        _require(
            self.server == "" or URL.fullmatch(self.server) is not None,
            "rollout.server must be an http(s) URL without user, query or fragment, e.g. http://localhost:8000/v1; "
            f"got {self.server.rpartition('@')[2]!r}",
            "rollout.server",
        )
        _require("" not in self.stop_strings, "rollout.stop_strings must not be empty; got ''", "rollout.stop_strings")
        _require(
            self.server == "" or self.stop_strings == (),
            f"rollout.stop_strings must be none when rollout.server is given; got {', '.join(self.stop_strings)}",
            "rollout.stop_strings",
            "rollout.server",
        )
        _require(
            self.server == "" or self.server_extras or self.min_p == self.top_k_tokens == 0,
            "rollout.min_p and rollout.top_k_tokens must be 0 when rollout.server_extras is false;"
            f" got {self.min_p} and {self.top_k_tokens}",
            "rollout.min_p",
            "rollout.top_k_tokens",
            "rollout.server_extras",
        )
        _each(
            self,
            "rollout.",
            AT_LEAST_1,
            "max_steps max_new_tokens max_length slots decode_chunk samples",
        )
        _each(self, "rollout.", AT_LEAST_0, "max_trajectory_tokens top_k_tokens")
        _each(self, "rollout.", FRACTION, "min_p top_p")
        _each(self, "rollout.", ABOVE_0, "top_p")
        _require(
            self.max_new_tokens < self.max_length,
            f"rollout.max_new_tokens must be less than rollout.max_length={self.max_length}; got {self.max_new_tokens}",
            "rollout.max_new_tokens",
            "rollout.max_length",
        )
        _require(
            len(self.temperatures) > 0 and all(t >= 0 for t in self.temperatures),
            "rollout.temperatures must be one or more numbers of at least 0;"
            f" got {', '.join(map(str, self.temperatures)) or 'none'}",
            "rollout.temperatures",
        )


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Cold start: next-token prediction of teacher trajectories."""

    epochs: int = key(3, "passes over the trajectories", "epochs")
    batch_rows: int = key(8, "packed rows per step", "rows")
    row_length: int = key(512, "length of a packed row", "tokens")
    lr: float = key(1e-5, "peak learning rate of AdamW, cosine decay")
    warmup: float = key(0.1, "share of the steps with rising learning rate", "fraction")
    weight_decay: float = key(0.0, "decoupled weight decay")
    grad_norm: float = key(1.0, "gradient clipping, global norm")
    checkpoint_every: int = key(100, "steps between checkpoints", "steps")

    def __post_init__(self) -> None:
        _each(self, "sft.", AT_LEAST_1, "epochs batch_rows row_length checkpoint_every")
        _each(self, "sft.", AT_LEAST_0, "lr weight_decay")
        _each(self, "sft.", ABOVE_0, "grad_norm")
        _each(self, "sft.", FRACTION, "warmup")


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Policy gradients against the live retriever."""

    algorithm: Literal["ppo", "grpo", "rloo", "reinforce++"] = key(
        "ppo",
        "advantages: `ppo` of a critic (GAE); returns less the mean of the question's samples (`grpo`), of its other "
        "samples (`rloo`), of the whole batch (`reinforce++`)",
    )
    iterations: int = key(40, "rollout-and-update rounds", "iterations")
    questions: int = key(32, "questions per iteration", "questions")
    epochs: int = key(1, "passes over an iteration's trajectories", "epochs")
    ahead: bool = key(
        False, "the next iteration's rollouts run beside the update, with the policy as it was before: one step behind"
    )
    batch_rows: int = key(16, "packed rows per update", "rows")
    row_length: int = key(512, "length of a packed row", "tokens")
    lr: float = key(5e-7, "peak learning rate of the policy, cosine to 10 %")
    warmup: float = key(0.03, "share of the updates with rising learning rate", "fraction")
    grad_norm: float = key(1.0, "gradient clipping, global norm")
    adam_eps: float = key(1e-8, "added to the root of Adam's second moment: gradients well below it make no step")
    # Credit and advantages.
    gamma: float = key(1.0, "discount per policy token", "fraction")
    step_discount: float = key(
        1.0, "share of the next step's return that a step is credited with; 0: each is its own episode, as released",
        "fraction",
    )  # fmt: skip
    returns: Literal["to_go", "total"] = key(
        "to_go", "what a token is credited with: rewards from it on, or, not with ppo, all of its trajectory's"
    )
    std: bool = key(False, "grpo: advantages over the standard deviation of the question's samples")
    whiten_advantages: bool = key(True, "shift and scale them to mean 0 and deviation 1 over an iteration's tokens")
    whiten_rewards: bool = key(False, "scale step rewards to deviation 1 over an iteration; their mean stays")
    negative_weight: float = key(1.0, "weight of negative advantages; 0 learns only from what did better than expected")
    drop_equal: bool = key(True, "grpo and rloo: leave out questions whose samples all earned the same")
    draws: int = key(
        1, "so often questions are drawn in an iteration until enough have samples that did not earn the same", "rounds"
    )
    # Policy loss.
    clip: float = key(0.2, "how far below 1 the ratio of new to old probability is trusted")
    clip_high: float = key(0.0, "how far above 1; 0: as far as `clip`")
    loss_mean: Literal["token", "sequence", "constant"] = key(
        "token", "the policy loss counts tokens alike, trajectories alike, or sums a trajectory over `loss_length`"
    )
    loss_length: int = key(512, "what loss_mean=constant divides a trajectory's sum by", "tokens")
    truncate_weights: float = key(
        0.0,
        "ratios are taken against the policy before the iteration's first update, and tokens weighed by what it gives "
        "them over what the sampler gave, at most this; 0: ratios against the sampler, no weights",
    )
    entropy: float = key(0.0, "weight of the entropy bonus")
    # Distance to the cold start.
    kl: float = key(0.01, "weight of the per-token KL to the cold-start policy")
    kl_in: Literal["reward", "loss"] = key("reward", "a penalty on every token's reward, or a term of the policy loss")
    kl_estimator: Literal["k1", "k2", "k3"] = key("k1", "d, d^2 / 2 or exp(-d) - 1 + d of the log-probabilities")
    kl_target: float = key(0.0, "KL that `kl` is adapted to after each iteration; 0: `kl` stays", "nats per token")
    kl_rate: float = key(0.1, "gain of that: in an iteration `kl` changes by at most a fifth of it")
    # Critic, of ppo alone.
    critic: Literal["separate", "head"] = key("separate", "a value model of its own, or a head on the policy's trunk")
    critic_lr: float = key(9e-6, "peak learning rate of the critic")
    lam: float = key(1.0, "GAE lambda", "fraction")
    value_coef: float = key(1.0, "weight of the value loss")
    value_clip: float = key(0.2, "value clip")
    eval_every: int = key(10, "iterations between evaluations on dev", "iterations")
    checkpoint_every: int = key(10, "iterations between checkpoints", "iterations")

    def __post_init__(self) -> None:
        _each(self, "rl.", AT_LEAST_1, "iterations questions epochs batch_rows row_length loss_length draws")
        _each(self, "rl.", AT_LEAST_1, "eval_every checkpoint_every")
        _each(self, "rl.", AT_LEAST_0, "lr critic_lr value_coef kl kl_target kl_rate entropy negative_weight")
        _each(self, "rl.", AT_LEAST_0, "clip_high truncate_weights")
        _each(self, "rl.", ABOVE_0, "grad_norm adam_eps clip value_clip")
        _each(self, "rl.", FRACTION, "warmup gamma lam step_discount")
        self._check_credit()
        self._check_kl()

    def _check_credit(self) -> None:
        _require(
            self.returns != "total" or (self.algorithm != "ppo" and self.gamma == self.step_discount == 1),
            "rl.returns must be to_go with rl.algorithm=ppo and unless rl.gamma and rl.step_discount are 1; got total "
            f"with {self.algorithm}, {self.gamma} and {self.step_discount}",
            "rl.returns",
            "rl.algorithm",
            "rl.step_discount",
            "rl.gamma",
        )
        _require(
            self.algorithm != "reinforce++" or self.whiten_advantages,
            "rl.whiten_advantages must be true when rl.algorithm is reinforce++, whose baseline it is; got false",
            "rl.whiten_advantages",
            "rl.algorithm",
        )
        _require(
            not self.std or self.algorithm == "grpo",
            f"rl.std must be false unless rl.algorithm is grpo; got true with {self.algorithm}",
            "rl.std",
            "rl.algorithm",
        )

        _require(
            self.draws == 1 or (self.is_grouped and self.drop_equal),
            "rl.draws must be 1 unless rl.algorithm is grpo or rloo and rl.drop_equal true; got "
            f"{self.draws} with {self.algorithm} and {str(self.drop_equal).lower()}",
            "rl.draws",
            "rl.algorithm",
            "rl.drop_equal",
        )

    def _check_kl(self) -> None:
        _require(
            self.kl_in != "loss" or self.kl_estimator != "k1",
            "rl.kl_estimator must be k2 or k3 when rl.kl_in is loss, for the gradient of k1 is 0 on average; got k1",
            "rl.kl_estimator",
            "rl.kl_in",
        )
        _require(
            self.kl_target == 0 or self.kl > 0,
            f"rl.kl must be above 0, what rl.kl_target={self.kl_target} adapts; got {self.kl}",
            "rl.kl",
            "rl.kl_target",
        )

    @property
    def has_critic(self) -> bool:
        """Whether a value model is trained beside the policy."""
        return self.algorithm == "ppo"

    @property
    def is_grouped(self) -> bool:
        """Whether a trajectory is judged by the other samples of its question."""
        return self.algorithm in ("grpo", "rloo")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """R3 shaping (arXiv 2505.23794)."""

    outcome: Literal["em", "f1", "cover_em", "judge"] = key(
        "em", "what makes an answer correct; `judge`: exact match, else a judge agrees (the paper's Acc)"
    )
    process: Literal["gold", "embedding", "judge"] = key(
        "gold", "relevance of a retrieval: gold passage found, similarity, or what a judge says"
    )
    use_outcome: bool = key(True, "False: process rewards only")
    use_process: bool = key(True, "False: outcome reward only")
    outcome_weight: float = key(2.0, "reward of a correct answer")
    process_weight: float = key(1.0, "reward of a retrieval of relevance 1, before the trajectory's factor")
    malformed: float = key(-1.0, "reward of a malformed step")
    no_answer: float = key(0.5, "penalty on the last step of a trajectory without answer (not in compat: paper)")
    factor_correct: float = key(1.6, "process factor of a correct trajectory")
    factor_wrong: float = key(0.8, "process factor of a wrong answer")
    factor_no_answer: float = key(0.9, "process factor without an answer")
    compat: Literal["r3", "paper"] = key("r3", "`paper` keeps the released shaping with its incentive inversion")
    clip: float = key(10.0, "rewards are clipped to plus or minus this")

    def __post_init__(self) -> None:
        _each(self, "rewards.", AT_LEAST_0, "no_answer factor_correct factor_wrong factor_no_answer process_weight")
        _each(self, "rewards.", ABOVE_0, "clip")
        _require(
            self.use_outcome or self.use_process,
            "rewards.use_outcome or rewards.use_process must be true; got false for both",
            "rewards.use_outcome",
            "rewards.use_process",
        )

    @property
    def needs_judge(self) -> bool:
        """Whether a judge has a say in a reward."""
        return (self.use_outcome and self.outcome == "judge") or (self.use_process and self.process == "judge")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A language model that says how relevant passages are, or whether an answer is right."""

    kind: Literal["server", "local"] = key(
        "server", "`server`: any OpenAI-compatible endpoint; `local`: a Hugging Face model on the run's own devices"
    )
    url: str = key("", "with kind server: e.g. http://localhost:8000/v1", "url")
    model: str = key(
        "",
        "with kind server its name there, empty: the first that it lists; "
        "with kind local a Hugging Face directory or `package:NAME`",
    )
    key_env: str = key("", "environment variable that holds the server's API key; empty: none is sent")
    max_in_flight: int = key(16, "requests to the server at once", "requests")
    requests_per_minute: int = key(0, "most requests to the server, evenly spaced; 0: no limit", "requests")
    retries: int = key(6, "calls repeated while the server is busy or away, with doubling waits", "calls")
    timeout_s: float = key(120.0, "longest silence of the server in a call", "seconds")
    max_failure_share: float = key(
        0.2, "a larger share of failed judgements in a round ends the run; fewer are left out of the loss", "fraction"
    )
    max_tokens: int = key(256, "longest reply; a longer one has failed", "tokens")
    cache: str = key("", "JSONL that keeps every judgement, one file for many runs; empty: in the run's folder", "path")
    relevance_prompt: str = key(
        "",
        "a text file with {question}, {query}, {passages}, asking for a line `Relevance: 0.7`; empty: ours",
        "path",
    )
    correctness_prompt: str = key(
        "", "a text file with {question}, {golds}, {answer}, asking for a line `Correct: yes`; empty: ours", "path"
    )
    slots: int = key(16, "with kind local: prompts read side by side", "rows")
    max_length: int = key(2048, "with kind local: longest prompt and reply together", "tokens")
    dtype: Literal["float32", "bfloat16"] = key("float32", "with kind local: type of weights and computation")

    def __post_init__(self) -> None:
        _each(self, "judge.", AT_LEAST_0, "requests_per_minute retries")
        _each(self, "judge.", AT_LEAST_1, "max_in_flight max_tokens slots max_length")
        _each(self, "judge.", ABOVE_0, "timeout_s")
        _each(self, "judge.", FRACTION, "max_failure_share")
        _require(
            self.url == "" or URL.fullmatch(self.url) is not None,
            "judge.url must be an http(s) URL without user, query or fragment, e.g. http://localhost:8000/v1; "
            f"got {self.url.rpartition('@')[2]!r}",
            "judge.url",
        )
        if self.kind == "local":
            for name in ("url", "key_env"):
                value = getattr(self, name)
                _require(
                    value == "",
                    f"judge.{name} must be empty when judge.kind is local; got {value!r}",
                    f"judge.{name}",
                    "judge.kind",
                )
            _require(
                self.max_tokens < self.max_length,
                f"judge.max_tokens must be less than judge.max_length={self.max_length}; got {self.max_tokens}",
                "judge.max_tokens",
                "judge.max_length",
            )

    @property
    def is_given(self) -> bool:
        """Whether there is a judge to ask."""
        return (self.url if self.kind == "server" else self.model) != ""


@dataclasses.dataclass(frozen=True)
class GuardsConfig:
    """What is done when RL goes wrong. A threshold of 0 is none."""

    action: Literal["warn", "stop", "rollback"] = key(
        "warn", "when a threshold is broken: say so, end the run, or go on from the last good checkpoint"
    )
    patience: int = key(1, "iterations in a row that a threshold has to be broken", "iterations")
    rollbacks: int = key(3, "after so many the run ends", "rollbacks")
    nonfinite: Literal["skip", "stop", "rollback"] = key(
        "stop", "when a loss or gradient is NaN or infinite, which changes no parameter: go on, end, or roll back"
    )
    save_state: bool = key(True, "keep the state before the first such step beside its batch, to replay it")
    approx_kl: float = key(0.0, "most that an iteration's updates move the policy", "nats per token")
    kl: float = key(0.0, "most KL to the cold-start policy", "nats per token")
    clip_fraction: float = key(0.0, "most tokens whose ratio is clipped", "fraction")
    min_entropy: float = key(0.0, "least entropy", "nats per token")
    max_entropy: float = key(0.0, "most entropy", "nats per token")
    no_answer_rate: float = key(0.0, "most trajectories without an answer", "fraction")
    format_error_rate: float = key(0.0, "most trajectories that break the format", "fraction")
    repeated_query_rate: float = key(0.0, "most queries that the same trajectory has asked before", "fraction")
    equal_groups: float = key(0.0, "most questions whose samples all earned the same", "fraction")
    length_drift: float = key(
        0.0, "most that the tokens of a trajectory may grow or shrink since the first iteration, as a factor"
    )
    displacement: float = key(
        0.0, "most log-probability that tokens of better than expected trajectories lose in updates", "nats per token"
    )

    def __post_init__(self) -> None:
        _each(self, "guards.", AT_LEAST_1, "patience")
        _each(self, "guards.", AT_LEAST_0, "rollbacks approx_kl kl min_entropy max_entropy displacement")
        _each(self, "guards.", FRACTION, "clip_fraction no_answer_rate format_error_rate repeated_query_rate")
        _each(self, "guards.", FRACTION, "equal_groups")
        _require(
            self.length_drift == 0 or self.length_drift > 1,
            f"guards.length_drift must be a factor above 1, or 0 for none; got {self.length_drift}",
            "guards.length_drift",
        )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The final tables."""

    systems: tuple[str, ...] = key(
        ("closed_book", "oneshot_rag", "cold_start", "r3rag"), "what the eval phase compares"
    )
    prompt: Literal["reading", "chat"] = key(
        "reading", "the baselines' prompt: plain reading for a base model, an instruction for a chat model"
    )
    max_questions: int = key(0, "0 takes all test questions", "questions")
    judge: bool = key(False, "also report the share of answers that are exact matches or that a judge takes for right")

    def __post_init__(self) -> None:
        _names(self.systems, SYSTEMS, "eval.systems")
        _each(self, "eval.", AT_LEAST_0, "max_questions")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices. Every jitted step runs on a mesh (data, fsdp, tensor)."""

    data: int = key(-1, "data parallel size; -1 takes what the others leave", "devices")
    fsdp: int = key(1, "parameter sharding", "devices")
    tensor: int = key(1, "tensor parallel size", "devices")
    sampler_devices: int = key(
        0, "the last devices, which do rollouts alone while the others train (`rl.ahead`); 0: all do both", "devices"
    )
    distributed: bool = key(False, "start jax.distributed; its coordinator is detected on TPU pods and Slurm")
    coordinator: str = key("", "host:port of process 0 where detection does not work")
    num_processes: int = key(0, "number of processes with an explicit coordinator", "processes")
    process_id: int = key(-1, "rank of this process with an explicit coordinator")

    def __post_init__(self) -> None:
        _each(self, "mesh.", MESH_SIZE, "data")
        _each(self, "mesh.", AT_LEAST_1, "fsdp tensor")
        _each(self, "mesh.", AT_LEAST_0, "sampler_devices")
        _require(
            self.sampler_devices == 0 or not self.distributed,
            f"mesh.sampler_devices must be 0 when mesh.distributed is true; got {self.sampler_devices}",
            "mesh.sampler_devices",
            "mesh.distributed",
        )
        if self.coordinator:
            self._check_coordinator()
            return
        for name, unset in (("num_processes", 0), ("process_id", -1)):
            value = getattr(self, name)
            _require(
                value == unset,
                f"mesh.{name} must stay {unset} without a mesh.coordinator; got {value}",
                f"mesh.{name}",
            )

    def _check_coordinator(self) -> None:
        _require(
            self.distributed,
            f"mesh.coordinator must be empty unless mesh.distributed is true; got {self.coordinator!r}",
            "mesh.coordinator",
            "mesh.distributed",
        )
        _require(
            re.fullmatch(r"\S+:\d+", self.coordinator) is not None,
            f"mesh.coordinator must be host:port; got {self.coordinator!r}",
            "mesh.coordinator",
        )
        _each(self, "mesh.", AT_LEAST_1, "num_processes")
        _require(
            0 <= self.process_id < self.num_processes,
            f"mesh.process_id must be in [0, {self.num_processes}), one of mesh.num_processes; got {self.process_id}",
            "mesh.process_id",
            "mesh.num_processes",
        )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run tells."""

    progress: bool = key(True, "live progress bars in a terminal")
    trajectories: int = key(8, "trajectories kept per RL iteration", "trajectories")

    def __post_init__(self) -> None:
        _each(self, "log.", AT_LEAST_0, "trajectories")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    name: str = key("run", "the run's name")
    run_dir: str = key("", "where the run lives; empty: runs/<name>", "path")
    seed: int = key(0, "seed of initialisation, data order and sampling")
    budget: str = key("", "which of the recipe's `budgets` to take; empty: the recipe as it stands")
    phases: tuple[str, ...] = key(("index", "sft", "rl", "eval"), "what to do, in this order")
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    retrieval: RetrievalConfig = dataclasses.field(default_factory=RetrievalConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    sft: SFTConfig = dataclasses.field(default_factory=SFTConfig)
    rl: RLConfig = dataclasses.field(default_factory=RLConfig)
    rewards: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    guards: GuardsConfig = dataclasses.field(default_factory=GuardsConfig)
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"[\w][\w.+-]*", self.name) is not None,
            f"name must be one directory name of letters, digits and _.+-, not led by a sign; got {self.name!r}",
            "name",
        )
        _each(self, "", SEED, "seed")
        _names(self.phases, PHASES, "phases")
        _require(
            list(self.phases) == sorted(self.phases, key=PHASES.index),
            f"phases must come in the order {', '.join(PHASES)}; got {', '.join(self.phases)}",
            "phases",
        )
        for phase, name in (("sft", "sft"), ("rl", "rl"), ("eval", "test")):
            _require(
                self.data.source != "files" or phase not in self.phases or getattr(self.data, name) != "",
                f"data.{name} must be given when data.source is files and phases has {phase}; got none",
                f"data.{name}",
                "data.source",
            )
        _require(
            "rl" not in self.phases or self.rl.row_length >= self.rollout.max_length,
            "rl.row_length must be at least rollout.max_length="
            f"{self.rollout.max_length}, for a trajectory fills one row; got {self.rl.row_length}",
            "rl.row_length",
            "rollout.max_length",
        )
        _require(
            "rl" not in self.phases or self.rl.algorithm != "grpo" or self.rollout.samples > 1,
            f"rollout.samples must be at least 2 when rl.algorithm is grpo; got {self.rollout.samples}",
            "rollout.samples",
            "rl.algorithm",
        )
        _require(
            not (self.rl.ahead and self.mesh.distributed),
            "rl.ahead must be false when mesh.distributed is true: processes launch programs in one order; got true",
            "rl.ahead",
            "mesh.distributed",
        )
        self._check_judge()
        if self.rollout.server:
            self._check_server()

    def _check_judge(self) -> None:
        """Whoever asks a judge has one."""
        asked = {"eval.judge is true": self.eval.judge}
        if "rl" in self.phases:
            asked |= {
                "rewards.outcome is judge": self.rewards.use_outcome and self.rewards.outcome == "judge",
                "rewards.process is judge": self.rewards.use_process and self.rewards.process == "judge",
            }
        where = "url" if self.judge.kind == "server" else "model"
        for reason in (reason for reason, is_so in asked.items() if is_so):
            _require(
                self.judge.is_given,
                f"judge.{where} must be given when {reason} (and judge.kind is {self.judge.kind}); got none",
                f"judge.{where}",
                reason.split()[0],
            )

    def _check_server(self) -> None:
        """What a server, which holds one policy that this package cannot change, cannot be used for."""
        _require(
            "rl" not in self.phases,
            "phases must not have rl when rollout.server is given: RL samples with the policy that it trains; "
            f"got {', '.join(self.phases)}",
            "phases",
            "rollout.server",
        )
        policies = {name: "base" if name in ("closed_book", "oneshot_rag") else name for name in self.eval.systems}
        _require(
            "eval" not in self.phases or len(set(policies.values())) == 1,
            "eval.systems must be of one policy, the served one, when rollout.server is given: closed_book and "
            f"oneshot_rag, or cold_start, or r3rag; got {', '.join(self.eval.systems)}",
            "eval.systems",
            "rollout.server",
        )
        _require(
            not self.mesh.distributed,
            "mesh.distributed must be false when rollout.server is given; got true",
            "mesh.distributed",
            "rollout.server",
        )

    @property
    def run_directory(self) -> Path:
        """Where the run lives: `run_dir`, or `runs/<name>` under the working directory."""
        return Path(self.run_dir or f"runs/{self.name}")
