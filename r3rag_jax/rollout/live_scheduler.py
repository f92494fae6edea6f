"""The live scheduler: questions come and go while others are played, and each is told about as it goes.

It plays an Env as the rollout loop (`scheduler.py`) does, and a question gets the same trajectory from both. But
nothing waits for anything else: searches run beside the sampling and are used when they have come, in whatever order
that is. So it belongs to one process; the rollout loop, which calls the engine in the same order every time, is for
many.

    ask() ─► waiting ─► slot ─► sample ─► Env.step ─┬─ Search ─► Env.observe ─┐
                ▲                 ▲                 └─ Done ─► the slot is free
                │                 ├───────────────────────────────────────────┤
                └───── go_on() ◄──┴─ single steps: paused, the slot is free ◄─┘
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.rollout.env import Env, Search, Transition
from r3rag_jax.rollout.events import (
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
)
from r3rag_jax.rollout.live_sampling import Draft, LiveSampler, News
from r3rag_jax.rollout.play import Play
from r3rag_jax.serving.refusal import Refusal
from r3rag_jax.types import Completion, Context, Step


class LiveEnv(Env, Protocol):
    """An Env that can be looked at while it is played."""

    @property
    def steps(self) -> Sequence[Step]:
        """The steps so far; the last one lacks its passages until they have been observed."""
        ...

    def preview(self, ids: Sequence[int]) -> Mapping[str, str]:
        """The parts of the step of which these ids have been sampled; each begins the part that is read in the end."""
        ...


StartSearch = Callable[[Sequence[str], int], Future[list[list[Hit]]]]  # queries, k; see `Batcher.search`


@dataclasses.dataclass(frozen=True)
class LiveQuestion:
    """A question to be played."""

    env: LiveEnv  # of the question, not started
    policy: str  # one of the sampler's
    search: StartSearch
    tell: Callable[[Event], None]  # is called in the scheduler's thread with every event, and must return at once
    single_steps: bool = False  # pause after each step


class LiveScheduler:
    """Plays questions in a thread of its own; its methods may be called from any thread."""

    def __init__(self, sampler: LiveSampler):
        self._sampler = sampler
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._plays: set[AskedQuestion] = set()  # all that are not over
        self._waiting: deque[AskedQuestion] = deque()  # for a slot
        self._slots: dict[int, AskedQuestion] = {}
        self._is_closing = False
        self._lock, self._is_closed = threading.Lock(), False  # the lock: between an `ask` and the end
        sampler.start(lambda draft, news: self._inbox.put(functools.partial(self._sampled, draft, news)))
        self._thread = threading.Thread(target=self._run, name="r3rag-live", daemon=True)
        self._thread.start()

    @property
    def num_slots(self) -> int:
        """Number of questions that are played at the same time."""
        return self._sampler.num_slots

    @property
    def is_closed(self) -> bool:
        """Whether no question can be played any more: it was closed, or its engine has failed."""
        return self._is_closed

    @property
    def num_busy(self) -> int:
        """Slots in which a question is played."""
        return len(self._slots)

    @property
    def num_waiting(self) -> int:
        """Questions that wait for a slot."""
        return len(self._waiting)

    def ask(self, question: LiveQuestion) -> AskedQuestion:
        """Play a question; its events come through `question.tell`, the last one of `events.LAST`.

        Raises:
            UserError: the scheduler is closed, or its engine has failed.
        """
        asked = AskedQuestion(self, question)
        with self._lock:
            if self._is_closed:
                raise UserError("no question can be played any more: the engine was closed, or has failed")
            self._inbox.put(functools.partial(self._add, asked))
        return asked

    def close(self) -> None:
        """Cancel all questions and end the thread."""
        self._inbox.put(self._close)
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        end: Event = Cancelled()
        try:
            while not self._is_closing:
                self._read_inbox()
                self._fill_slots()
                if self._sampler.has_work:
                    self._sampler.work()
        except Exception as error:  # of the engine: its state cannot be trusted
            traceback.print_exception(error)
            end = Failed(f"the engine failed: {_reason(error)}")
        with self._lock:
            self._is_closed = True
        while not self._inbox.empty():  # who asked before this sees the end, too
            self._inbox.get()()
        for asked in list(self._plays):
            self._end(asked, end)
        self._sampler.close()

    def _close(self) -> None:
        self._is_closing = True

    def _read_inbox(self) -> None:
        """Read what has come; wait for it where there is nothing else to do."""
        if not self._sampler.has_work:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _fill_slots(self) -> None:
        free = [slot for slot in range(self.num_slots) if slot not in self._slots]
        while free and self._waiting:
            asked = self._waiting.popleft()
            slot = asked.slot if asked.slot in free else free[0]  # its own still has its keys and values
            free.remove(slot)
            asked.slot, asked.num_ahead = slot, None
            self._slots[slot] = asked
            asked.tell(Started())
            with self._of(asked):
                self._go(asked, asked.context or asked.play.start())
            if slot not in self._slots:
                free.append(slot)
        for num_ahead, asked in enumerate(self._waiting):
            if asked.num_ahead != num_ahead:
                asked.num_ahead = num_ahead
                asked.tell(Waiting(num_ahead))

    # ---- messages

    def _add(self, asked: AskedQuestion) -> None:
        self._plays.add(asked)
        self._waiting.append(asked)

    def _cancel(self, asked: AskedQuestion) -> None:
        if asked in self._plays:
            self._end(asked, Cancelled())

    def _go_on(self, asked: AskedQuestion, single_steps: bool) -> None:
        asked.single_steps = single_steps
        if asked in self._plays and asked.context is not None and asked not in self._waiting:
            self._waiting.append(asked)

    def _sampled(self, draft: Draft, news: News) -> None:
        asked = self._slots.get(draft.slot)
        if asked is None or asked.draft is not draft:
            return  # it was cancelled
        with self._of(asked):
            if isinstance(news, Exception):
                raise news
            if isinstance(news, Completion):
                self._finish_step(asked, news)
            else:
                asked.show(news)

    def _finish_step(self, asked: AskedQuestion, completion: Completion) -> None:
        asked.draft, asked.shown = None, {}
        transition = asked.play.step(completion)
        steps = asked.env.steps
        asked.tell(StepWritten(len(steps), steps[-1]))
        self._go(asked, transition, may_pause=True)

    def _found(self, asked: AskedQuestion, search: Future[list[list[Hit]]]) -> None:
        if asked not in self._plays:
            return
        with self._of(asked):
            [hits] = search.result()
            transition = asked.play.observe(hits)
            steps, scores = asked.env.steps, {hit.passage.id: hit.score for hit in reversed(hits)}
            passages = steps[-1].passages
            asked.tell(PassagesFound(len(steps), passages, tuple(scores[passage.id] for passage in passages)))
            self._go(asked, transition, may_pause=True)

    # ---- one question

    def _go(self, asked: AskedQuestion, transition: Transition, *, may_pause: bool = False) -> None:
        """Carry out what happens next in a slot.

        Args:
            may_pause: a step has ended.
        """
        if isinstance(transition, Context) and may_pause and asked.single_steps:
            asked.context = transition
            del self._slots[self._slot_of(asked)]
            asked.tell(Paused(len(asked.env.steps)))
        elif isinstance(transition, Context):
            asked.context = None
            asked.draft = Draft(self._slot_of(asked), asked.question.policy, transition)
            self._sampler.begin(asked.draft)
            asked.play.submitted(transition)
        elif isinstance(transition, Search):
            asked.tell(SearchStarted(len(asked.env.steps), transition.query))
            search = asked.question.search([transition.query], transition.k)
            search.add_done_callback(lambda done: self._inbox.put(functools.partial(self._found, asked, done)))
        else:
            self._end(asked, Ended(asked.play.trajectory(transition)))

    def _slot_of(self, asked: AskedQuestion) -> int:
        assert asked.slot is not None
        return asked.slot

    def _end(self, asked: AskedQuestion, event: Event) -> None:
        self._plays.discard(asked)
        if asked in self._waiting:
            self._waiting.remove(asked)
        if asked.draft is not None:
            self._sampler.cancel(asked.draft)
            asked.draft = None
        if asked.slot is not None and self._slots.get(asked.slot) is asked:
            del self._slots[asked.slot]
        asked.tell(event)

    def _of(self, asked: AskedQuestion) -> _Guard:
        return _Guard(functools.partial(self._end, asked))


class AskedQuestion:
    """A question that is being played. Its state belongs to the scheduler's thread; the two methods to anybody."""

    def __init__(self, scheduler: LiveScheduler, question: LiveQuestion):
        self._scheduler, self.question = scheduler, question
        self.env, self.tell, self.single_steps = question.env, question.tell, question.single_steps
        self.play = Play(question.env)
        self.slot: int | None = None  # the slot that it has, or had last
        self.draft: Draft | None = None  # what is being sampled
        self.context: Context | None = None  # with which it goes on when it gets a slot
        self.shown: dict[str, str] = {}  # part of the step -> what was told of it
        self.num_ahead: int | None = None  # as it was told

    def cancel(self) -> None:
        """Stop the question; its slot is free for others."""
        self._scheduler._inbox.put(functools.partial(self._scheduler._cancel, self))

    def go_on(self, *, single_steps: bool) -> None:
        """Write the next step after a pause, and pause after it or not; before a pause, whether there will be one."""
        self._scheduler._inbox.put(functools.partial(self._scheduler._go_on, self, single_steps))

    def show(self, ids: Sequence[int]) -> None:
        """Tell what is new of a step of which these ids have been sampled."""
        number = len(self.env.steps) + 1
        for part, text in self.env.preview(ids).items():
            before = self.shown.get(part, "")
            if len(text) > len(before) and text.startswith(before):
                self.shown[part] = text
                self.tell(StepText(number, part, text[len(before) :]))


class _Guard:
    """A `with` block whose exceptions end one question, and no other."""

    def __init__(self, end: Callable[[Event], None]):
        self._end = end

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if not isinstance(error, UserError | RuntimeError | Refusal):  # a fault of this package
            traceback.print_exception(error)
        self._end(Failed(_reason(error)))
        return True


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError | Refusal) else f"{type(error).__name__}: {error}"
