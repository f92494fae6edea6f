"""Questions that come and go while others are played: what each of them hears, and that it changes no trajectory."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from hand_sampler import WAIT_S, Hand

from r3rag_jax.components import Components
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.systems import BASE_POLICY
from r3rag_jax.retrieval.base import Hit, RetrievalError
from r3rag_jax.rollout.env import Done, Search, Transition
from r3rag_jax.rollout.events import (
    LAST,
    Cancelled,
    Ended,
    Event,
    Failed,
    PassagesFound,
    Paused,
    SearchStarted,
    Started,
    StepText,
    StepWritten,
    Waiting,
)  # fmt: skip
from r3rag_jax.rollout.live_scheduler import LiveQuestion, LiveScheduler
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.types import Completion, Context, Passage, Question, Status, Step, Trajectory

PASSAGES = (Passage("p", "p"), Passage("q", "q"))


class Ears:
    """Hears the events of one question."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Event] = queue.Queue()
        self.heard: list[Event] = []
        self.tell = self._queue.put

    def until(self, *kinds: type) -> Any:
        """The next event of one of these kinds; those before it are kept in `heard`."""
        while True:
            event = self._queue.get(timeout=WAIT_S)
            self.heard.append(event)
            if isinstance(event, kinds):
                return event

    def end(self) -> Any:
        return self.until(*LAST)


# ---------------------------------------------------------------------------- with a dictated sampler


class PlanEnv:
    """Writes a step per letter of its plan: `s` searches, `c` does not, and the end of the plan is Done."""

    def __init__(self, plan: str):
        self.plan, self.question = plan, Question("q", plan, ())
        self.steps: list[Step] = []

    def start(self) -> Transition:
        return Context([len(self.steps)], budget=9)

    def step(self, completion: Completion) -> Transition:
        letter = self.plan[len(self.steps)]
        assert letter != "!", "a fault"
        self.steps.append(Step("a", query="q" if letter == "s" else None, answer=None if letter == "s" else "b"))
        return Search("q", k=2) if letter == "s" else self._next()

    def observe(self, hits: Sequence[Hit]) -> Transition:
        self.steps[-1] = dataclasses.replace(self.steps[-1], passages=tuple(hit.passage for hit in hits))
        return self._next()

    def preview(self, ids: Sequence[int]) -> dict[str, str]:
        return {"analysis": "".join(map(str, ids))}

    def _next(self) -> Transition:
        if len(self.steps) < len(self.plan):
            return self.start()
        return Done(Trajectory(self.question, tuple(self.steps), Status.ANSWERED))


def search(queries: Sequence[str], k: int) -> Future[list[list[Hit]]]:
    found: Future[list[list[Hit]]] = Future()
    found.set_result([[Hit(passage, 1.0 - rank) for rank, passage in enumerate(PASSAGES[:k])]])
    return found


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def scheduler(hand: Hand) -> Any:
    running = LiveScheduler(hand)
    yield running
    running.close()
    assert hand.is_closed


def ask(scheduler: LiveScheduler, plan: str, **options: Any) -> tuple[Any, Ears]:
    ears = Ears()
    how: dict[str, Any] = {"policy": "rl", "search": search} | options
    return scheduler.ask(LiveQuestion(PlanEnv(plan), tell=ears.tell, **how)), ears


def test_what_is_heard_of_a_question(scheduler: LiveScheduler, hand: Hand) -> None:
    _, ears = ask(scheduler, "sc")
    draft = hand.next()
    for ids in ([4], [4, 5], [4, 5], [9]):  # what is no continuation of what was shown is not shown
        hand.tell(draft, ids)
    hand.tell(draft, Completion([4, 5, 6], None))
    hand.write()
    trajectory = ears.end().trajectory
    query, answer = trajectory.steps
    assert ears.heard == [
        Started(), StepText(1, "analysis", "4"), StepText(1, "analysis", "5"),
        StepWritten(1, dataclasses.replace(query, passages=())), SearchStarted(1, "q"),
        PassagesFound(1, PASSAGES, (1.0, 0.0)), StepWritten(2, answer), Ended(trajectory),
    ]  # fmt: skip
    assert (trajectory.num_input_tokens, trajectory.num_tokens) == (2, 5)
    assert query.passages == PASSAGES


def test_a_cancelled_question_leaves_its_slot_to_the_next(scheduler: LiveScheduler, hand: Hand) -> None:
    first, ears = ask(scheduler, "cc")
    draft = hand.next()
    _, second = ask(scheduler, "c")
    third, others = ask(scheduler, "c")
    assert (second.until(Waiting), others.until(Waiting)) == (Waiting(0), Waiting(1))
    first.cancel()
    assert ears.end() == Cancelled() and hand.cancelled.get(timeout=WAIT_S) is draft
    hand.tell(draft, Completion([3], None))  # comes too late
    assert others.until(Waiting) == Waiting(0)
    third.cancel()  # while it waits
    assert others.end() == Cancelled()
    hand.write()
    assert isinstance(second.end(), Ended)
    first.cancel()  # is over
    assert ears.heard == [Started(), Cancelled()]


def test_single_steps_hold_no_slot_while_they_wait(scheduler: LiveScheduler, hand: Hand) -> None:
    """The plan: pause, one more step, then to the end."""
    asked, ears = ask(scheduler, "scsc", single_steps=True)
    first = hand.write()
    assert ears.until(Paused) == Paused(1)
    _, other = ask(scheduler, "c")  # in the slot that is free
    hand.write()
    assert isinstance(other.end(), Ended)
    asked.go_on(single_steps=True)
    assert hand.write().slot == first.slot
    assert ears.until(Paused) == Paused(2)
    asked.go_on(single_steps=False)
    hand.write()
    hand.write()
    assert ears.end().trajectory.num_retrievals == 2
    assert not any(isinstance(event, Paused) for event in ears.heard[ears.heard.index(Paused(2)) + 1 :])
    asked.cancel()
    paused, ears = ask(scheduler, "cc", single_steps=True)
    hand.write()
    ears.until(Paused)
    paused.cancel()
    assert ears.end() == Cancelled()


def test_what_fails_is_one_question(scheduler: LiveScheduler, hand: Hand, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(queries: Sequence[str], k: int) -> Future[list[list[Hit]]]:
        found: Future[list[list[Hit]]] = Future()
        found.set_exception(RetrievalError("no index"))
        return found

    def refused(queries: Sequence[str], k: int) -> Future[list[list[Hit]]]:
        raise UserError("no search")

    for how, reason in ((broken, "no index"), (refused, "no search")):
        _, ears = ask(scheduler, "s", search=how)
        hand.write()
        assert ears.end() == Failed(reason)
    _, ears = ask(scheduler, "c")
    hand.tell(hand.next(), UserError("the server refuses"))
    assert ears.end() == Failed("the server refuses")
    assert capsys.readouterr().err == ""
    _, ears = ask(scheduler, "!")
    hand.write()
    assert ears.end().reason.startswith("AssertionError: a fault")
    assert "Traceback" in capsys.readouterr().err
    _, ears = ask(scheduler, "c")
    hand.write()
    assert isinstance(ears.end(), Ended)


def test_an_engine_that_fails_ends_all(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Hand):
        has_work = True

        def work(self) -> None:
            if not self.drafts.empty():
                raise RuntimeError("out of memory")

    broken = Broken()
    scheduler = LiveScheduler(broken)
    ears = [ask(scheduler, "c")[1] for _ in range(2)]
    assert [each.end() for each in ears] == [Failed("the engine failed: RuntimeError: out of memory")] * 2
    scheduler._thread.join(WAIT_S)
    with pytest.raises(UserError, match="no question can be played any more"):
        ask(scheduler, "c")
    assert "Traceback" in capsys.readouterr().err and broken.is_closed


# ---------------------------------------------------------------------------- with the engine


@pytest.mark.parametrize("protocol", ["tags", pytest.param("steps", marks=pytest.mark.slow)])
def test_trajectories_are_those_of_a_rollout(protocol: str, finished: Callable[[str], Path]) -> None:
    """Of two policies at once, more questions than slots, others cancelled in between, and single steps."""
    components = tiny_run.open_components(finished(protocol), "rollout.slots=4")
    requests = [RolloutRequest(q, 0, t, seed=5) for q in components.dataset.questions("test")[:3] for t in (0.0, 0.9)]
    policies = (BASE_POLICY, "rl")
    expected = {name: played(components, name, requests) for name in policies}
    live = components.backends.live({name: components.loader(name) for name in policies}, components.search_env.stops)
    scheduler = LiveScheduler(live)

    def start(request: RolloutRequest, policy: str, **how: Any) -> tuple[Any, Ears]:
        ears = Ears()
        env: Any = components.search_env(request)
        return scheduler.ask(LiveQuestion(env, policy, blocking(components), ears.tell, **how)), ears

    asked = [(policy, i, *start(r, policy, single_steps=i == 0)) for i, r in enumerate(requests) for policy in policies]
    dropped = [start(requests[0], policy)[0] for policy in policies]
    for policy, index, question, ears in asked:
        while not isinstance(end := ears.until(Paused, *LAST), LAST):
            question.go_on(single_steps=True)
        for one in dropped:
            one.cancel()
        assert_same(end.trajectory, expected[policy][index])
        check_shown(ears.heard, end.trajectory)
    scheduler.close()
    assert sum(t.num_retrievals for t in expected["rl"]) > 2


def played(components: Components, policy: str, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
    return rollout(components.open_backend(policy), components.search_env, components.retriever, requests)


def blocking(components: Components) -> Any:
    def search(queries: Sequence[str], k: int) -> Future[list[list[Hit]]]:
        found: Future[list[list[Hit]]] = Future()
        found.set_result(components.retriever.search(queries, k))
        return found

    return search


def assert_same(one: Trajectory, other: Trajectory) -> None:
    assert (one.steps, one.status, one.num_tokens, one.num_input_tokens) == (
        other.steps, other.status, other.num_tokens, other.num_input_tokens,
    )  # fmt: skip
    for sample, expected in zip(one.samples, other.samples, strict=True):
        np.testing.assert_array_equal(sample.ids, expected.ids)
        np.testing.assert_allclose(sample.behaviour_logprobs, expected.behaviour_logprobs, atol=1e-4)


def check_shown(events: Sequence[Event], trajectory: Trajectory) -> None:
    """What was shown of each part begins it, and the passages found are those of the steps."""
    for number, step in enumerate(trajectory.steps, 1):
        for part in ("analysis", "query", "answer"):
            texts = [e.text for e in events if isinstance(e, StepText) and (e.number, e.part) == (number, part)]
            assert not step.is_well_formed or (getattr(step, part) or "").startswith("".join(texts))
        found = [e.passages for e in events if isinstance(e, PassagesFound) and e.number == number]
        assert found == ([step.passages] if step.is_well_formed and step.query is not None else [])
