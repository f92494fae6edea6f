"""What `python -m r3rag_jax.coldstart` does with the parts of a configuration: build, check."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from r3rag_jax.coldstart.builder import Builder, Limits, Tally
from r3rag_jax.coldstart.gold import GoldSource, decomposition_fault
from r3rag_jax.coldstart.journal import Facts, Journal
from r3rag_jax.coldstart.prompts import read_template
from r3rag_jax.coldstart.rejection import Gate
from r3rag_jax.coldstart.replay import differences, fault_of
from r3rag_jax.coldstart.sources import Source, TeacherSource
from r3rag_jax.coldstart.spending import cost
from r3rag_jax.coldstart.teacher import LocalText, ServedBackend, ServedText, TeacherClient
from r3rag_jax.coldstart.teacher_env import STOP, TeacherRules, TeacherText
from r3rag_jax.config import Config
from r3rag_jax.config.coldstart import TRAJECTORIES
from r3rag_jax.data.dataset import Dataset
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.leakage import check_leakage
from r3rag_jax.data.records import OnError, Records, listed
from r3rag_jax.data.trajectories import read_trajectories, trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rollout.backends import EngineBackend, RolloutBackend
from r3rag_jax.rollout.env import EnvFactory, StopRule
from r3rag_jax.run.files import write_json
from r3rag_jax.run.progress import ProgressBar
from r3rag_jax.sampler.local import open_local
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Passage, Question, Trajectory

JOURNAL, SUMMARY = "journal.jsonl", "summary.json"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What both need of a configuration.

    Fields:
        directory: of journal and trajectories.
        codec, search_env: of the policy that will learn from the trajectories.
        dataset: of the questions that are held out.
        corpus: passages by id; None where a server has them.
        mesh: devices of a local teacher.
    """

    config: Config
    directory: Path
    codec: Codec
    search_env: EnvFactory
    dataset: Dataset
    retriever: Retriever
    corpus: Mapping[str, Passage] | None
    mesh: Mesh
    console: Console
    open_judge: Callable[[], Judge]

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def check_config(config: Config) -> None:
    """Raise a UserError unless the configuration says who writes, and who judges."""
    cold = config.coldstart
    if cold.source == "server" and not cold.teacher.is_given:
        raise UserError(
            "coldstart.teacher.url must be given when coldstart.source is server; got none (a model on the own "
            "devices: coldstart.source=local; the questions' decompositions: coldstart.source=gold)"
        )
    if cold.source == "local" and not cold.local.path:
        raise UserError("coldstart.local.path must be given when coldstart.source is local; got none")
    if cold.correct == "judge" and not config.judge.is_given:
        name = "judge.endpoint.url" if config.judge.kind == "server" else "judge.local.path"
        raise UserError(f"{name} must be given when coldstart.correct is judge; got none")
    if config.mesh.distributed:
        raise UserError("mesh.distributed must be false for a cold start: one process asks the teacher; got true")


def build(parts: Parts, questions: Records[Question], journal: Journal) -> Tally:
    """Make the trajectories of the questions, and write them with a summary; the journal says what is done already.

    Raises:
        UserError: the teacher or the judge fails too often, or the journal was begun with other settings. What was
            accepted until then is written.
        RetrievalError: a search failed; likewise.
    """
    config, cold = parts.config, parts.config.coldstart
    if cold.source == "gold":
        questions = OnError.of(config.data, parts.console).check(questions, decomposition_fault)
    questions = questions.take(range(len(questions))[: cold.max_questions or None])
    check_held_out(questions, parts.dataset, config, parts.say)
    source, slots = open_source(parts, journal)
    journal.add_facts(source.facts)
    gate = Gate(
        min_searches=cold.min_searches,
        evidence_fault=source.fault_of,
        policy_fault=lambda trajectory: fault_of(trajectory, parts.codec, parts.search_env),
        judge=parts.open_judge() if cold.correct == "judge" else None,
    )
    limits = Limits(cold.keep, cold.num_trajectories, cold.max_cost)
    spent = functools.partial(cost, journal, cold.teacher)
    with ProgressBar("cold start", len(questions), console=parts.console, live=config.log.progress) as bar:
        builder = Builder(source, gate, journal, limits, slots=slots, cost=spent, advance=bar.advance)
        try:
            builder.run(questions)
        finally:
            if builder.has_judged_journal:  # else the file has more
                accepted = builder.accepted(questions)
                write(parts, accepted, builder.tally, journal)
    report(parts, builder.tally, gate, journal, len(accepted))
    return builder.tally


def check_held_out(questions: Records[Question], dataset: Dataset, config: Config, say: Callable[[str], None]) -> None:
    """Say which of the questions leak into `data.dev` or `data.test`, before a teacher is paid for them.

    Raises:
        UserError: one does, and `data.leakage` is refuse.
    """
    data = config.data
    if data.source == "world" or data.leakage == "off" or not questions:
        return
    splits = {name: dataset.questions(name) for name in ("dev", "test") if getattr(data, name)}
    found = check_leakage({"sft": questions, **splits})
    if found and data.leakage == "refuse":
        raise UserError(f"held-out questions must not be learnt from; {'; '.join(found)}: take them out of one file")
    for text in found:
        say(text)


def open_source(parts: Parts, journal: Journal) -> tuple[Source, int]:
    """Return who writes the trajectories, and how many at the same time."""
    config, cold = parts.config, parts.config.coldstart
    retrieval, steps = config.retrieval, config.rollout.max_steps
    facts: Facts = {
        "coldstart.source": cold.source,
        "retriever": parts.retriever.fingerprint,
        "retrieval.top_k": retrieval.top_k,
        "retrieval.max_passages": retrieval.max_passages,
        "rollout.max_steps": steps,
    }
    if cold.source == "gold":
        for name in ("protocol", "max_new_tokens", "max_length"):
            facts[f"rollout.{name}"] = getattr(config.rollout, name)
        slots = config.rollout.slots
        return GoldSource(
            parts.search_env, parts.codec, parts.retriever, parts.corpus, top_k=retrieval.top_k,
            max_passages=retrieval.max_passages, slots=slots, facts=facts | {"model.path": config.model.path},
        ), slots  # fmt: skip
    template = read_template(cold.prompt)
    backend, text, stops, model = _open_teacher(parts, journal)
    facts |= {
        "teacher": model,
        "coldstart.prompt": hashlib.sha256(template.encode()).hexdigest()[:16],
        "coldstart.max_tokens": cold.max_tokens,
        "retrieval.passage_tokens": retrieval.passage_tokens,
        "seed": config.seed,
    }
    rules = TeacherRules(
        text, template, shown=parts.codec.shown, max_steps=steps, top_k=retrieval.top_k,
        max_passages=retrieval.max_passages, max_tokens=cold.max_tokens,
    )  # fmt: skip
    return TeacherSource(
        backend, stops, rules, parts.retriever, temperatures=cold.temperatures, seed=config.seed,
        search_overlap=config.rollout.search_overlap, facts=facts,
    ), backend.num_slots  # fmt: skip


def _open_teacher(parts: Parts, journal: Journal) -> tuple[RolloutBackend, TeacherText, StopRule, str]:
    """Return backend, text, stop rule and identity of the teacher."""
    cold = parts.config.coldstart
    if cold.source == "server":
        client = TeacherClient(cold, journal)
        return ServedBackend(client, cold.teacher.max_in_flight), ServedText(), StopRule(), client.model
    local = open_local(cold.local, parts.mesh)
    backend = EngineBackend(
        local.engine, local.decoder, local.tokenizer, decode_chunk=parts.config.rollout.decode_chunk
    )
    text = LocalText(local.tokenizer, cold.local.max_length)
    return backend, text, StopRule((), local.tokenizer.end_ids, (STOP,)), local.identity


def write(parts: Parts, accepted: Sequence[Trajectory], tally: Tally, journal: Journal) -> None:
    """Write the accepted trajectories and the summary."""
    config = parts.config.coldstart
    write_jsonl(parts.directory / TRAJECTORIES, map(trajectory_to_dict, accepted))
    summary: dict[str, Any] = {
        "accepted": tally.accepted,
        "attempts": tally.attempts,
        "rejected": dict(tally.rejected.most_common()),
        "at_temperature": {str(t): counts for t, counts in sorted(tally.at_temperature.items())},
        "failed": tally.num_failed,
        "replies": journal.num_replies,
        "replies_without_counts": journal.num_uncounted,
        "input_tokens": journal.input_tokens,
        "output_tokens": journal.output_tokens,
        "cost": cost(journal, config.teacher),
        "ended_by": tally.ended_by,
    }
    write_json(parts.directory / SUMMARY, summary)


def report(parts: Parts, tally: Tally, gate: Gate, journal: Journal, num_accepted: int) -> None:
    """Print what has become of the attempts, and where the trajectories are."""
    table = Table("attempts", "number", "%")
    rows = [("accepted", tally.accepted), *tally.rejected.most_common()]
    for name, num in rows:
        table.add_row(name, str(num), f"{100 * num / max(1, tally.attempts):.1f}")
    parts.console.print(table)
    if len(tally.at_temperature) > 1:
        shares = (f"{t:g}: {good} of {num}" for t, (num, good) in sorted(tally.at_temperature.items()))
        parts.say(f"accepted at temperature {', '.join(shares)}")
    if journal.num_replies:
        uncounted = f" ({journal.num_uncounted} replies without counts)" if journal.num_uncounted else ""
        parts.say(
            f"{journal.num_replies} replies, {journal.input_tokens} tokens in, {journal.output_tokens} out{uncounted}: "
            f"cost {cost(journal, parts.config.coldstart.teacher):.4g}"
        )
    for text, is_so in (
        (f"the first that the policy cannot play: {gate.first_fault}", gate.first_fault),
        (f"{tally.num_repeated} questions have the text of an earlier one: not asked", tally.num_repeated),
        (f"{tally.num_failed} attempts are not finished: a request failed; the same command makes them",
         tally.num_failed),
        (f"ended by {tally.ended_by}", tally.ended_by),
    ):  # fmt: skip
        if is_so:
            parts.say(text)
    parts.say(f"{num_accepted} trajectories: {parts.directory / TRAJECTORIES}")


def check(parts: Parts, path: Path) -> int:
    """Play the trajectories of a file against the live retriever; return how many end otherwise or show other passages.

    Raises:
        UserError: a line of the file is wrong, or the protocol cannot read a step back.
        RetrievalError: a search failed.
    """
    config = parts.config
    trajectories = read_trajectories(path, parts.corpus or {}, config.retrieval.top_k)
    trajectories = OnError.of(config.data, parts.console).check(trajectories, parts.codec.unreadable_step)
    with ProgressBar("check", len(trajectories), console=parts.console, live=config.log.progress) as bar:
        found = differences(
            trajectories, parts.codec, parts.search_env, parts.retriever, slots=config.rollout.slots,
            on_done=lambda _: bar.advance(),
        )  # fmt: skip
    faults = [f"{trajectories.place(fault.index)}: {fault.what}" for fault in found]
    if faults:
        parts.say(listed(faults, "\n"))
    parts.say(f"{len(trajectories) - len(found)} of {len(trajectories)} trajectories replay")
    return len(found)
