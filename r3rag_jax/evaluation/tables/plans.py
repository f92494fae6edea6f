"""The tables by name: which cells each has.

| name | rows | in the paper |
| --- | --- | --- |
| main | systems | ACC, F1 and EM of every system on three data sets |
| rewards | runs with different rewards, and their cold start | what the process reward adds |
| max_steps | `rollout.max_steps` from 1 to 10 | a figure |
| top_k | `retrieval.top_k` from 1 to 10 | a figure |
| retrievers | retrievers | BM25, E5, BGE with one policy |
| tokens | systems | tokens per correctly answered question |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.config import Config
from r3rag_jax.config.schema import value_of
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.checkpoint import Checkpoint, named_keys
from r3rag_jax.evaluation.systems import BASE_POLICY, SYSTEMS
from r3rag_jax.evaluation.tables.cells import Cell, Plan, QuestionSet, slug

OpenCheckpoint = Callable[[str, Sequence[str]], Checkpoint]  # a place and keys -> the run or model there


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for.

    Fields:
        table: a key of PLANS.
        places: run directories, or one model.
        overrides: the user's `key=value`.
        systems: those of a table of systems; empty: all that the checkpoint has.
        system: that of the other tables.
        phase: which policy of a run; None: the system's own.
        values: of a sweep.
        retrievers: label -> the keys that choose it; empty: the checkpoint's own, and BM25.
        varied: further facts in which the rows may differ.
        corpus: passages to search instead of those of the index.
        name: of the files; empty: `table`.
    """

    table: str
    places: tuple[str, ...]
    open_checkpoint: OpenCheckpoint
    questions: tuple[QuestionSet, ...]
    overrides: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    system: str = "r3rag"
    phase: str | None = None
    values: tuple[int, ...] = tuple(range(1, 11))
    retrievers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    varied: tuple[str, ...] = ()
    corpus: Path | None = None
    name: str = ""

    def checkpoint(self, *keys: str, place: str | None = None) -> Checkpoint:
        """The run or model with the user's keys and further ones; a key of the user's is never replaced."""
        named = named_keys(self.overrides)
        own = [key for key in keys if not named_keys([key]) & named]
        return self.open_checkpoint(self.places[0] if place is None else place, [*self.overrides, *own])


def plan_table(request: Request) -> Plan:
    """The plan of a table.

    Raises:
        UserError: the checkpoint has none of the policies that the table is of, or a flag does not go with it.
    """
    if len(request.places) > 1 and request.table != "rewards":
        raise UserError(f"--checkpoint must name one run or model for {request.table}; got {len(request.places)}")
    limit = request.checkpoint().config.eval.max_questions
    questions = tuple(dataclasses.replace(asked, limit=limit) for asked in request.questions)
    request = dataclasses.replace(request, questions=questions)
    plan = PLANS[request.table](request)
    return dataclasses.replace(plan, varied=(*plan.varied, *request.varied), file=request.name or request.table)


def _main(request: Request) -> Plan:
    checkpoint = request.checkpoint()
    judged = ("acc",) * checkpoint.config.eval.judge
    return Plan(
        "main", "Systems", "system", _cells_of_systems(request, checkpoint), (*judged, "f1", "em"),
        reference=SYSTEMS["r3rag"].title,
    )  # fmt: skip


def _tokens(request: Request) -> Plan:
    checkpoint = request.checkpoint()
    per_correct = "tokens_per_acc" if checkpoint.config.eval.judge else "tokens_per_correct"
    correct = "acc" if checkpoint.config.eval.judge else "em"
    return Plan(
        "tokens", "Tokens per correctly answered question", "system", _cells_of_systems(request, checkpoint),
        (per_correct, "output_tokens", "input_tokens", "retrievals", correct),
    )  # fmt: skip


def _cells_of_systems(request: Request, checkpoint: Checkpoint) -> list[Cell]:
    cells = []
    policies = {name: _policy_of(checkpoint, name, request.phase) for name in request.systems or SYSTEMS}
    for name, policy in policies.items():
        if policy is None and not request.systems:
            continue
        if policy is None:
            raise UserError(
                f"--systems must be of policies that {checkpoint.run.place} has; {name} needs phase "
                f"{SYSTEMS[name].policy}, which has not finished"
            )
        cells += [Cell(SYSTEMS[name].title, checkpoint, name, policy, asked) for asked in request.questions]
    return cells


def _policy_of(checkpoint: Checkpoint, system: str, phase: str | None) -> str | None:
    """The policy that a system is played with; None where there is none."""
    if checkpoint.config.rollout.server.is_given:
        return ""
    if system in BASELINES:
        return phase or BASE_POLICY
    if not checkpoint.is_run:
        return BASE_POLICY if system == "r3rag" else None
    policy = phase or SYSTEMS[system].policy
    return policy if checkpoint.run.policy(policy).exists() else None


def _policy(checkpoint: Checkpoint, request: Request) -> str:
    """The policy of a table that is of one system."""
    return checkpoint.choose_policy(request.phase or (BASE_POLICY if request.system in BASELINES else None))


# ------------------------------------------------------------------------------------------ rewards


def _rewards(request: Request) -> Plan:
    cells: list[Cell] = []
    labels: dict[str, str] = {}  # label -> place
    for place in request.places:
        checkpoint = request.checkpoint(place=place)
        if not checkpoint.is_run:
            raise UserError(f"--checkpoint must name runs for rewards, whose rewards are known; got {place}")
        label = rewards_label(checkpoint.config)
        if label in labels:
            raise UserError(f"--checkpoint must name runs with different rewards; {place} has those of {labels[label]}")
        labels[label] = place
        policy = checkpoint.choose_policy(request.phase or "rl")
        cells += [Cell(label, checkpoint, "r3rag", policy, asked) for asked in request.questions]
    first = request.checkpoint()
    has_cold_start = first.run.policy("sft").exists()
    if has_cold_start:
        cells += [Cell("cold start, no RL", first, "cold_start", "sft", asked) for asked in request.questions]
    metrics = ("acc",) * first.config.eval.judge
    return Plan(
        "rewards", "Rewards", "reward", cells, (*metrics, "em", "retrievals", "no_answer"),
        reference=next(iter(labels)), notes=tuple(_missing_runs(labels, has_cold_start, request.places[0])),
    )  # fmt: skip


def rewards_label(config: Config) -> str:
    """The rewards that a run was trained with, in words."""
    rewards = config.rewards
    process, outcome = f"process ({rewards.process})", f"outcome ({rewards.outcome})"
    return " and ".join([outcome] * rewards.use_outcome + [process] * rewards.use_process) or "no reward"


def _missing_runs(labels: Collection[str], has_cold_start: bool, place: str) -> list[str]:
    """How to make the rows that the paper has and this table has not."""
    notes = []
    for part, key in (("process", "rewards.use_process"), ("outcome", "rewards.use_outcome")):
        if all(part in label for label in labels):
            notes.append(
                f"No run without the {part} reward: python -m r3rag_jax.train --config {place}/config.yaml "
                f"run_dir={place}-no-{part} {key}=false trains it; name it after --checkpoint, too."
            )
    return notes if has_cold_start else [*notes, f"{place} has no cold start."]


# ------------------------------------------------------------------------------------------- sweeps


_POLICIES = tuple(name for name in SYSTEMS if name not in BASELINES)
_SEARCHING = ("ircot", "self_ask", "iter_retgen", "react", "flare")  # baselines that search as retrieval.top_k says


def _sweep(name: str, key: str, title: str, swept: Sequence[str]) -> Callable[[Request], Plan]:
    def plan(request: Request) -> Plan:
        if request.system not in swept:
            raise UserError(f"--system must be of those that {key} changes: {', '.join(swept)}; got {request.system}")
        cells = []
        for value in request.values:
            given = [word for word in request.overrides if named_keys([word]) != {key}]
            without = dataclasses.replace(request, overrides=tuple(given))
            most = _most_passages(request, key, value)
            checkpoint = without.checkpoint(f"{key}={value}", f"retrieval.max_passages={most}")
            policy = _policy(checkpoint, request)
            suffix = f"{name}={value}"
            make = functools.partial(Cell, str(value), checkpoint, request.system, policy, suffix=suffix)
            cells += [make(asked) for asked in request.questions]
        judged = ("acc",) * request.checkpoint().config.eval.judge
        metrics = (*judged, "em", "f1", "retrievals", "support_found", "output_tokens", "no_answer", "context_full")
        return Plan(name, title, key, cells, metrics, varied=(key, "retrieval.max_passages"))

    return plan


def _most_passages(request: Request, key: str, value: int) -> int:
    """A budget of passages per trajectory that no step of the sweep uses up."""
    config = request.checkpoint().config
    names = ("rollout.max_steps", "retrieval.top_k")
    steps, top_k = (value if key == name else value_of(config, name) for name in names)
    return max(config.retrieval.max_passages, steps * top_k)


# --------------------------------------------------------------------------------------- retrievers


def _retrievers(request: Request) -> Plan:
    own = request.checkpoint()
    kind: str = own.config.retrieval.kind
    both: tuple[tuple[str, tuple[str, ...]], ...] = ((kind, ()), ("bm25", ("retrieval.kind=bm25",)))
    chosen = request.retrievers or both[: 1 if kind == "bm25" else 2]
    cells = []
    for label, keys in chosen:
        is_built = bool(keys) and "retrieval.index_dir" not in named_keys(keys) and "retrieval.kind=http" not in keys
        index = (f"retrieval.index_dir={own.run.path / 'indexes' / slug(label)}",) if is_built else ()
        checkpoint = request.checkpoint(*keys, *index)
        policy = _policy(checkpoint, request)
        suffix = f"retriever={label}" if keys else ""
        cells += [Cell(label, checkpoint, request.system, policy, asked, suffix) for asked in request.questions]
    judged = ("acc",) * own.config.eval.judge
    recall = tuple(f"answer_recall@{k}" for k in own.config.eval.recall_k)
    metrics = (*judged, "f1", "em", "support_found", *recall)
    return Plan("retrievers", "Retrievers", "retriever", cells, metrics, varied=("index",), reference=chosen[0][0])


PLANS: dict[str, Callable[[Request], Plan]] = {
    "main": _main,
    "rewards": _rewards,
    "max_steps": _sweep("max_steps", "rollout.max_steps", "Maximum steps", _POLICIES),
    "top_k": _sweep("top_k", "retrieval.top_k", "Passages per retrieval", (*_SEARCHING, *_POLICIES)),
    "retrievers": _retrievers,
    "tokens": _tokens,
}
