"""What the numbers of an evaluation depend on: a result with another fingerprint is out of date.

A fingerprint is a JSON object of facts. `policy`, `tokenizer`, `index`, `corpus` and `questions` are digests of
contents; `split` and `num_questions` say in words which questions these are. `server` and `judge` say who samples and
who judges, and are empty for the engine of this package and for no judge; `sampling` is empty where decoding is greedy;
`metrics` has the version of each definition. The others are configuration keys. Every key of the configuration is in
exactly one of the tables below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from r3rag_jax.config import Config
from r3rag_jax.config.evaluation import BASE_SYSTEMS
from r3rag_jax.config.schema import schema, value_of
from r3rag_jax.data.questions import question_to_dict
from r3rag_jax.evaluation.metrics import definitions
from r3rag_jax.rewards.judge.factory import read_prompt
from r3rag_jax.text.chat_template import read_template
from r3rag_jax.types import Question

Facts = dict[str, Any]
# Digest of the files of a policy (BASE_POLICY, or the phase that trained it), of TOKENIZER, of JUDGE, or of CORPUS.
DigestOf = Callable[[str], str]
TOKENIZER, JUDGE, CORPUS = "tokenizer", "judge", "corpus"

# Keys that are facts themselves.
KEYS = (
    "model.dtype",
    "retrieval.top_k",
    "retrieval.passage_tokens",
    "retrieval.max_passages",
    "rollout.protocol",
    "rollout.max_steps",
    "rollout.max_new_tokens",
    "rollout.max_trajectory_tokens",
    "rollout.max_length",
    "rollout.kv_dtype",
    "rollout.stop_strings",
)
# Facts of the systems that prompt the base model; a section `baselines.NAME` is one of that baseline alone.
BASELINE_KEYS = ("eval.prompt", "baselines")
SERVER_KEYS = tuple(f"rollout.server.{name}" for name in ("url", "model", "prompt_format", "extra_fields"))
# Facts where an evaluation samples instead of decoding greedily.
SAMPLING_KEYS = (
    "eval.samples",
    "eval.temperature",
    "eval.seed",
    "rollout.min_p",
    "rollout.top_k_tokens",
    "rollout.top_p",
)
METRIC_KEYS = ("eval.candidate_em", "eval.recall_k")  # they decide what is measured
JUDGE_KEYS = (
    "eval.judge",
    "judge.kind",
    "judge.max_tokens",
    "judge.correctness_prompt",  # the text of the file
    "judge.candidates_prompt",  # the same
    "judge.endpoint.url",  # where no model is named
    "judge.endpoint.model",
    "judge.local.path",
    "judge.local.max_length",
    "judge.local.dtype",
)
# Keys, and sections with all their keys, that reach the numbers through a fact that is a digest. A key of a section
# that another table names is not meant.
DIGESTED_KEYS = {
    "policy": (
        "seed",
        "model.path",
        "model.init",
        "model.moment_dtype",
        "model.remat",
        "model.attention",
        "model.micro_tokens",
        "lora",
        "rollout.samples",
        "rollout.temperatures",
        "sft",
        "rl",
        "rewards",
        "guards",
        "coldstart",
    ),
    "tokenizer": ("model.chat_template",),
    "index": (
        "retrieval.kind",
        "retrieval.index_dir",
        "retrieval.encoder",
        "retrieval.vector_dtype",
        "retrieval.faiss",
        "retrieval.hybrid",
        "retrieval.device",
        *(f"retrieval.milvus.{name}" for name in ("index", "index_params", "search_params", "filter", "collection")),
        "retrieval.endpoint.url",
        "retrieval.endpoint.format",
    ),
    "questions": ("world", "data", "eval.max_questions"),
}
# Reason -> keys, and sections with all their keys, that cannot change a number of an evaluation.
KEYS_WITHOUT_EFFECT = {
    "a name or a place": ("name", "run_dir", "budget", "judge.cache"),
    "what is done, not how": ("phases", "eval.systems"),
    "rows are computed independently of each other": (
        "rollout.slots",
        "rollout.decode_chunk",
        "rollout.search_overlap",
        "judge.local.slots",
        "retrieval.encoder.batch_tokens",
        "retrieval.encoder.batch_texts",
        "retrieval.encoder.encoding_format",
        "retrieval.memory_gb",
        "retrieval.cached_queries",
    ),
    "where arrays lie": ("rollout.shard_weights", "mesh"),
    "how a server is called": (
        *(
            f"{section}.{name}"
            for section in ("rollout.server", "judge.endpoint", "retrieval.endpoint", "retrieval.encoder.endpoint")
            for name in ("replicas", "key_env", "max_in_flight", "requests_per_minute", "retries", "timeout_s")
        ),
        "retrieval.endpoint.model",  # never sent
        *(f"retrieval.milvus.{name}" for name in ("uri", "key_env", "timeout_s")),
    ),
    "it ends an evaluation or lets it go on": ("judge.max_failure_share", "stop_s"),
    "evaluations do not ask it": ("judge.relevance_prompt",),
    "what is shown": ("log",),
}
# Facts in which two evaluations differ that a table compares.
SUBJECT_FACTS = ("system", "policy")
# Facts in which runs of a recipe differ beside: each trains its own cold start.
TRAINED_FACTS = ("cold_start",)
# Facts that say in words what another one is a digest of.
WORDED_FACTS = ("split", "num_questions")
# Facts of which two evaluations may have different parts: those that both have are compared.
PARTIAL_FACTS = ("metrics", "judge")


def fingerprint(
    config: Config,
    system: str,
    policy: str,
    index: str,
    questions: Sequence[Question],
    digest_of: DigestOf,
    cold_start: str | None = None,
    split: str = "",
) -> Facts:
    """The fingerprint of a system's evaluation.

    Args:
        system: a key of `SYSTEMS`.
        policy: BASE_POLICY, or the phase that trained it; "" where an inference server has it.
        index: the retriever's fingerprint.
        cold_start: digest of the cold start that the policy is of; None where it is of none, or nothing is known.
        split: what the questions are called.

    Raises:
        UserError: the chat template or the judge's prompt cannot be read.
    """
    names = KEYS + (_baseline_keys(system) if system in BASE_SYSTEMS else ())
    template = read_template(config.model.chat_template) if config.model.chat_template else ""
    is_served = config.rollout.server.is_given
    origin = {} if cold_start is None or is_served else {"cold_start": cold_start}
    return {
        "system": system,
        "policy": "" if is_served else f"{policy} {digest_of(policy)}",
        "tokenizer": _digest([digest_of(TOKENIZER), template]),
        "index": index,
        "corpus": digest_of(CORPUS),
        "questions": digest_questions(questions),
        "split": split,
        "num_questions": len(questions),
        "server": _server(config) if is_served else {},
        "sampling": _named(config, SAMPLING_KEYS) if config.eval.temperature > 0 else {},
        "judge": _judge(config, digest_of),
        "metrics": definitions(config.eval.recall_k, _judged_metrics(config)),
        **origin,
    } | _named(config, names)


def _baseline_keys(system: str) -> tuple[str, ...]:
    """The keys that the numbers of a baseline depend on, beside those of all systems."""
    names = (name for name in schema() if name.startswith(f"baselines.{system}."))
    return ("eval.prompt", "baselines.max_answer_tokens", *names)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], varied: Collection[str] = ()) -> list[str]:
    """Names of the facts that make two evaluations not comparable, sorted.

    A table compares systems and policies, and not every system has every fact. A policy of RL and a cold start that it
    did not begin from are not comparable.

    Args:
        varied: facts in which the evaluations of a table are meant to differ.
    """
    shared = (one.keys() & other.keys()) - {*SUBJECT_FACTS, *WORDED_FACTS, *varied}
    return sorted(name for name in shared if not _agree(name, one[name], other[name]))


def _agree(name: str, one: Any, other: Any) -> bool:
    if name in PARTIAL_FACTS and isinstance(one, dict) and isinstance(other, dict):
        return all(one[key] == other[key] for key in one.keys() & other.keys())
    return bool(one == other)


def describe(one: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str]) -> str:
    """The differences in words: `questions (400 of test, 100 of hotpotqa-dev), retrieval.top_k (3, 5)`."""
    return ", ".join(f"{name}{_values(name, one, other)}" for name in names)


def _values(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if name == "questions" and all("num_questions" in facts for facts in (one, other)):
        named = [f"{facts['num_questions']} of {facts['split']}" for facts in (one, other)]
        return f" ({', '.join(named)})"
    values = one[name], other[name]
    is_short = all(isinstance(value, int | float | bool) for value in values) or "." in name
    return f" ({values[0]}, {values[1]})" if is_short else ""


def digest_questions(questions: Iterable[Question]) -> str:
    """A digest of ids, texts, accepted answers and metadata, in order."""
    return _digest(question_to_dict(question) for question in questions)


def _server(config: Config) -> Facts:
    """The inference server, which has a policy of its own; all that is known of it is its address and model's name."""
    return {name.rpartition(".")[2]: value_of(config, name) for name in SERVER_KEYS}


def _judged_metrics(config: Config) -> list[str]:
    return ["acc"] * config.eval.judge + ["candidate_em"] * config.eval.candidate_em


def _judge(config: Config, digest_of: DigestOf) -> Facts:
    """The judge's model, and what else its verdicts depend on; nothing where none is asked."""
    judge = config.judge
    prompts: Facts = {}
    if config.eval.judge:
        prompts["prompt"] = _digest([read_prompt(judge.correctness_prompt, "correctness")])
    if config.eval.candidate_em:
        prompts["candidates_prompt"] = _digest([read_prompt(judge.candidates_prompt, "candidates")])
    if not prompts:
        return {}
    facts: Facts = {"kind": judge.kind, "max_tokens": judge.max_tokens} | prompts
    if judge.kind == "server":
        return facts | {"model": judge.endpoint.model or judge.endpoint.url}
    return facts | {"model": digest_of(JUDGE), "max_length": judge.local.max_length, "dtype": judge.local.dtype}


def _named(config: Config, names: Iterable[str]) -> Facts:
    return {name: _as_json(value_of(config, name)) for name in names}


def _digest(values: Iterable[Any]) -> str:
    text = json.dumps([*values], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
