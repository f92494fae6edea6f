"""The rollout loop, typed out: in which order a backend and a retriever are called, whatever the Env."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from fake_backend import FakeBackend

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Hit, RetrievalError
from r3rag_jax.rollout.env import Done, EnvFactory, Search, StopRule, Transition
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.types import Completion, Context, Passage, Question, Status, Step, Trajectory

STOPS = StopRule(pause_ids=(7,), stop_strings=("x",))


class PlanEnv:
    """Does what its question spells: `c` completes a context, `s` searches, and the end of the text is Done."""

    def __init__(self, request: RolloutRequest):
        self.question, self.number, self.seen = request.question, 0, list[str]()

    def start(self) -> Transition:
        return self._next()

    def step(self, completion: Completion) -> Transition:
        self.seen.append(f"read {completion.ids}")
        return self._next()

    def observe(self, hits: Sequence[Hit]) -> Transition:
        self.seen.append(f"saw {len(hits)}")
        return self._next()

    def _next(self) -> Transition:
        plan, number = self.question.question, self.number
        self.number += 1
        if number == len(plan):
            return Done(Trajectory(self.question, tuple(Step(s, answer="a") for s in self.seen), Status.ANSWERED))
        if plan[number] == "s":
            return Search(f"{self.question.id}{number}", k=int(self.question.id, 36) - 9)
        return Context([ord(self.question.id), number], budget=4)


class Recorder(FakeBackend):
    """Writes down what is submitted, each wait, and each search; a context of the question in `fails` fails."""

    def __init__(self, num_slots: int = 2, fails: str = ""):
        super().__init__(lambda slot, context: [context.ids[1]], num_slots)
        self.events: list[Any] = []
        self.fails, self.failed, self.is_open = fails, False, True

    def submit(self, contexts: Mapping[int, Context]) -> None:
        self.events.append({slot: f"{chr(context.ids[0])}{context.ids[1]}" for slot, context in contexts.items()})
        if self.is_open:
            super().submit(contexts)

    def wait(self) -> list[tuple[int, Completion]]:
        self.events.append("wait")
        failing = [slot for slot, context in self._active.items() if chr(context.ids[0]) in (self.fails or "-")]
        for slot in failing:
            del self._active[slot]
            self.is_open = False
        if not self._active and not self.is_open:
            raise UserError("the backend failed")
        return super().wait()

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.events.append((list(queries), k))
        return [[Hit(Passage("p", "p"), 1.0)] * k for _ in queries]


def roll_out(plans: str, recorder: Recorder, **options: Any) -> list[str]:
    """Ids of the trajectories of the plans, for questions a, b, c, …; checks that the results come in their order."""
    heard: list[Trajectory] = []
    questions = [Question(chr(ord("a") + number), plan, ()) for number, plan in enumerate(plans.split(","))]
    requests = [RolloutRequest(question) for question in questions]
    done = rollout(recorder, EnvFactory(PlanEnv, STOPS), recorder, requests, on_done=heard.append, **options)
    assert [trajectory.question for trajectory in done] == questions
    assert recorder.stops == [STOPS]
    return [trajectory.question.id for trajectory in heard]


def test_without_overlap_a_search_comes_before_the_next_call() -> None:
    """A freed slot is filled in the same call, after the contexts that searches led to; hits may be more than k."""
    recorder = Recorder()
    assert roll_out("csc,c,csc", recorder) == ["b", "a", "c"]
    assert recorder.events == [
        {0: "a0", 1: "b0"}, "wait",
        (["a1"], 1), {0: "a2", 1: "c0"}, "wait",
        (["c1"], 3), {1: "c2"}, "wait",
    ]  # fmt: skip


def test_with_overlap_a_search_is_awaited_after_so_many_calls() -> None:
    for overlap, events in (
        (1, [{0: "a0", 1: "b0"}, "wait", {1: "c0"}, "wait", {0: "a2", 1: "d0"}, "wait", {0: "e0"}, "wait"]),
        (2, [{0: "a0", 1: "b0"}, "wait", {1: "c0"}, "wait", {1: "d0"}, "wait", {0: "a2", 1: "e0"}, "wait"]),
    ):  # fmt: skip
        recorder = Recorder()
        roll_out("csc,c,c,c,c", recorder, search_overlap=overlap)
        assert [event for event in recorder.events if not isinstance(event, tuple)] == events
        assert [event for event in recorder.events if isinstance(event, tuple)] == [(["a1"], 1)]


def test_nobody_waits_for_calls_that_there_are_not() -> None:
    """A search that nothing can run beside is awaited at once, and one by one."""
    recorder = Recorder()
    roll_out("csc,ccsc", recorder, search_overlap=5)
    calls = [event for event in recorder.events if not isinstance(event, tuple)]
    assert calls == [{0: "a0", 1: "b0"}, "wait", {1: "b1"}, "wait", {0: "a2"}, "wait", {1: "b3"}, "wait"]


def test_questions_that_begin_with_a_search_are_searched_together() -> None:
    recorder = Recorder(num_slots=3)
    assert roll_out("sc,sc,c,ssc", recorder) == ["a", "b", "c", "d"]
    assert recorder.events == [
        (["a0", "b0"], 2), {2: "c0", 0: "a1", 1: "b1"}, "wait",
        (["d0"], 4), {}, "wait", (["d1"], 4), {0: "d2"}, "wait",
    ]  # fmt: skip
    recorder = Recorder()
    roll_out("sc,c,c,c", recorder, search_overlap=2)
    assert [event for event in recorder.events if isinstance(event, dict)] == [{1: "b0"}, {1: "c0"}, {0: "a1", 1: "d0"}]


def test_questions_that_are_done_at_once_need_no_call() -> None:
    recorder = Recorder()
    assert roll_out(",,,", recorder) == ["a", "b", "c", "d"]
    assert recorder.num_calls == 0
    recorder = Recorder()
    assert roll_out("s,,cs,", recorder) == ["b", "a", "d", "c"]


def test_tokens_are_counted_by_question_and_not_by_slot() -> None:
    """A slot that is used again begins at 0, and a search costs nothing."""
    recorder = Recorder()
    plans = {"a": "ccc", "b": "s", "c": "sc", "d": "c"}
    requests = [RolloutRequest(Question(id, plan, ())) for id, plan in plans.items()]
    done = rollout(recorder, EnvFactory(PlanEnv, STOPS), recorder, requests)
    assert [(t.num_input_tokens, t.num_tokens) for t in done] == [(6, 3), (0, 0), (2, 1), (2, 1)]


def test_no_request_is_no_trajectory() -> None:
    assert rollout(Recorder(), EnvFactory(PlanEnv, STOPS), Recorder(), []) == []


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_failed_search_ends_the_rollout(overlap: int) -> None:
    class Broken(Recorder):
        def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
            raise RetrievalError("no index")

    with pytest.raises(RetrievalError, match="no index"):
        roll_out("csc,cc", Broken(), search_overlap=overlap)


def test_when_the_backend_has_failed_nothing_new_begins_and_the_rest_is_heard() -> None:
    recorder, heard = Recorder(num_slots=3, fails="b"), list[str]()
    requests = [RolloutRequest(Question(id, plan, ())) for id, plan in zip("abcd", ["cs", "c", "c", "c"], strict=True)]
    with pytest.raises(UserError, match="the backend failed"):
        rollout(recorder, EnvFactory(PlanEnv, STOPS), recorder, requests, on_done=lambda t: heard.append(t.question.id))
    assert heard == ["c", "a"]
    assert recorder.events == [{0: "a0", 1: "b0", 2: "c0"}, "wait", (["a1"], 1), {}, "wait"]


def test_row_keys_differ_by_question_sample_step_and_seed() -> None:
    question = Question("q", "Where was the author of Origin born?", ("Shrewsbury",))
    base = RolloutRequest(question, 0, 1.0, 0)
    others = [
        base.key(1),
        dataclasses.replace(base, sample_index=1).key(0),
        dataclasses.replace(base, seed=1).key(0),
        dataclasses.replace(base, question=dataclasses.replace(question, id="r")).key(0),
    ]
    keys = {tuple(key.tolist()) for key in [base.key(0), *others]}
    assert len(keys) == 5
