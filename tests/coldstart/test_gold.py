"""Gold decompositions played through the policy's Env against a live retriever."""

from __future__ import annotations

import dataclasses
from typing import Any

import parts
import pytest
from parts import DARWIN, MARX, PASSAGES, QUESTIONS, WordRetriever

from r3rag_jax.coldstart.gold import NO_EVIDENCE, GoldSource
from r3rag_jax.coldstart.journal import Attempt
from r3rag_jax.coldstart.replay import differences
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Question, Status, Trajectory

CORPUS = {passage.id: passage for passage in PASSAGES}


def source(codec: Codec, retriever: Any = None, **settings: Any) -> GoldSource:
    return GoldSource(
        parts.search_env(codec, **settings), codec, retriever or WordRetriever(PASSAGES), CORPUS, top_k=1,
        max_passages=10, slots=2, facts={},
    )  # fmt: skip


def play(one: GoldSource, questions: list[Question]) -> list[Trajectory]:
    made: list[Attempt] = []
    one.play(questions, 0, lambda attempt, question: made.append(attempt) if attempt else None)
    by_id = {attempt.trajectory.question.id: attempt.trajectory for attempt in made}
    return [by_id[question.id] for question in questions]


@pytest.mark.parametrize("protocol", ["tags", "steps"])
def test_hops_become_steps_with_live_passages(protocol: str, tmp_path: Any) -> None:
    codec = parts.codec(tmp_path, protocol)
    gold = source(codec)
    trajectories = play(gold, QUESTIONS)
    for question, trajectory in zip(QUESTIONS, trajectories, strict=True):
        assert (trajectory.question, trajectory.status) == (question, Status.ANSWERED)
        hops = question.metadata["decomposition"]
        assert [step.query for step in trajectory.steps] == [*(hop["sub_question"] for hop in hops), None]
        assert [p.id for step in trajectory.steps for p in step.passages] == [hop["passage_id"] for hop in hops]
        assert trajectory.answer == question.golden_answers[0] and trajectory.samples == ()
        assert gold.fault_of(trajectory) is None
    assert differences(trajectories, codec, parts.search_env(codec), WordRetriever(PASSAGES), slots=1) == []


class Deaf(WordRetriever):
    """Finds nothing for queries with a question mark."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        found = super().search(queries, k)
        return [[] if "?" in query else hits for query, hits in zip(queries, found, strict=True)]


def test_the_first_wording_that_brings_the_evidence_is_taken(codec: Codec) -> None:
    gold = source(codec, Deaf(PASSAGES))
    [trajectory] = play(gold, [MARX])
    assert [step.query for step in trajectory.steps] == ["wrote Capital", "Karl Marx born", None]
    assert gold.fault_of(trajectory) is None


def test_without_evidence_the_trajectory_is_at_fault(codec: Codec) -> None:
    gold = source(codec, WordRetriever(PASSAGES[1:]))
    lost, found = play(gold, QUESTIONS)
    assert lost.steps[0].query == "Who wrote Origin?"  # the most natural wording
    assert gold.fault_of(lost) == NO_EVIDENCE and gold.fault_of(found) is None


def test_evidence_that_an_earlier_step_has_shown_counts(codec: Codec) -> None:
    again = DARWIN.metadata["decomposition"][0] | {"sub_question": "What is Origin?"}
    question = dataclasses.replace(DARWIN, metadata={"decomposition": [*DARWIN.metadata["decomposition"], again]})
    gold = source(codec)
    [trajectory] = play(gold, [question])
    assert trajectory.status is Status.ANSWERED and gold.fault_of(trajectory) is None


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"max_steps": 2}, Status.NO_ANSWER),
        ({"max_new_tokens": 30}, Status.FORMAT_ERROR),
        ({"max_length": 500, "max_new_tokens": 300}, Status.CONTEXT_FULL),
    ],
)
def test_what_the_policy_has_no_room_for_ends_otherwise(codec: Codec, settings: dict[str, int], status: Status) -> None:
    [trajectory] = play(source(codec, **settings), [DARWIN])
    assert trajectory.status is status
