"""Plays the questions of people: one engine, the policies and indexes that they may choose from, and their settings."""

from __future__ import annotations

import dataclasses
import functools
import queue
from collections.abc import Callable, Iterable, Mapping

from r3rag_jax.config import Config, RolloutConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.batching import Batcher
from r3rag_jax.rollout.env import StopRule
from r3rag_jax.rollout.events import LAST, Event, StepText, StepWritten
from r3rag_jax.rollout.fit import misfit
from r3rag_jax.rollout.live_sampling import LiveSampler
from r3rag_jax.rollout.live_scheduler import AskedQuestion, LiveQuestion, LiveScheduler
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.search_env import SearchEnv, search_env_factory
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Question

MAX_BATCH = 256  # queries that are searched together
MAX_WAITING = 8192  # queries that wait for their search


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a question is played."""

    policy: str  # one of the player's
    retriever: str  # one of the player's
    k: int  # passages of a search
    steps: int  # budget of steps
    temperature: float  # 0 = greedy
    seed: int
    single_steps: bool = False  # pause after each step


@dataclasses.dataclass(frozen=True)
class RetrieverChoice:
    """A retriever that may be chosen."""

    title: str
    open: Callable[[], Retriever]  # called in a thread


class Player:
    """Plays questions; its methods may be called from any thread.

    A question of the data set, asked in its own words, is played as the evaluation plays it, and has its gold answers
    and supporting passages.
    """

    def __init__(
        self,
        config: Config,
        codec: Codec,
        make_sampler: Callable[[StopRule], LiveSampler],
        policies: Mapping[str, str],
        retrievers: Mapping[str, RetrieverChoice],
        known: Iterable[Question] = (),
    ):
        """
        Args:
            make_sampler: called by `open`.
            policies: name of a policy of the sampler -> its title; the first is the default.
            retrievers: by name; the first is the default.
            known: questions of the data set.
        """
        self._config, self._codec, self._make_sampler = config, codec, make_sampler
        self.policies = dict(policies)
        self.known = {question.question: question for question in known}
        self._batchers = {
            name: Batcher(choice.open, max_batch=MAX_BATCH, wait_s=0.0, max_waiting=MAX_WAITING)
            for name, choice in retrievers.items()
        }
        self.retriever_titles = {name: choice.title for name, choice in retrievers.items()}
        self._scheduler: LiveScheduler | None = None

    def open(self) -> None:
        """Open indexes and engine.

        Raises:
            UserError: one of them cannot be opened.
        """
        for batcher in self._batchers.values():
            batcher.start()
        for batcher in self._batchers.values():
            batcher.opened.result()
        retrieval = self._config.retrieval
        limits = {"top_k": retrieval.top_k, "max_passages": retrieval.max_passages}
        stops = search_env_factory(self._codec, self._config.rollout, **limits).stops
        self._scheduler = LiveScheduler(self._make_sampler(stops))

    @property
    def scheduler(self) -> LiveScheduler:
        """The scheduler, once the player is open."""
        assert self._scheduler is not None, "open the player first"
        return self._scheduler

    @functools.cached_property
    def defaults(self) -> Settings:
        """The settings of the run's evaluation, with the first policy and retriever."""
        config = self._config
        return Settings(
            next(iter(self.policies)), next(iter(self._batchers)), config.retrieval.top_k, config.rollout.max_steps,
            config.eval.temperature, config.eval.seed,
        )  # fmt: skip

    def question(self, text: str) -> Question:
        """The question of a text: one of the data set if it has these words, else one without gold answers.

        Raises:
            UserError: the text is empty.
        """
        if not (text := text.strip()):
            raise UserError("the question must not be empty")
        return self.known.get(text) or Question("asked", text, ())

    def check(self, question: Question, settings: Settings) -> None:
        """Check that a question can be played; the player need not be open.

        Raises:
            UserError: there is no such policy or retriever, or the question does not fit the context.
        """
        for what, name, names in (
            ("policy", settings.policy, list(self.policies)), ("retriever", settings.retriever, list(self._batchers)),
        ):  # fmt: skip
            if name not in names:
                raise UserError(f"{what} must be one of {', '.join(names)}; got {name!r}")
        rollout = self._rollout(settings)
        factory = search_env_factory(self._codec, rollout, **self._limits(settings))
        if fault := misfit(question, {"r3rag": factory}, rollout.max_length):
            raise UserError(fault)

    def ask(self, question: Question, settings: Settings, tell: Callable[[Event], None]) -> AskedQuestion:
        """Play a question; `tell` hears every event in another thread, and must return at once.

        Raises:
            UserError: as `check`.
        """
        self.check(question, settings)
        request = RolloutRequest(question, 0, settings.temperature, settings.seed)
        env = SearchEnv(request, codec=self._codec, config=self._rollout(settings), **self._limits(settings))
        search = self._batchers[settings.retriever].search
        return self.scheduler.ask(LiveQuestion(env, settings.policy, search, tell, settings.single_steps))

    def prepare(self, question: Question, settings: Settings) -> None:
        """Compile what the beginning of a question needs, by playing it; returns when it would be shown.

        An inference server has nothing to compile.

        Raises:
            UserError: as `check`.
        """
        if self._config.rollout.server.is_given:
            return
        heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
        asked = self.ask(question, settings, heard.put)
        while not isinstance(heard.get(), (StepText, StepWritten, *LAST)):
            pass
        asked.cancel()

    def _rollout(self, settings: Settings) -> RolloutConfig:
        return self._config.rollout.replace(max_steps=settings.steps)

    def _limits(self, settings: Settings) -> dict[str, int]:
        """Passages of a search, and of the trajectory."""
        return {"top_k": settings.k, "max_passages": max(self._config.retrieval.max_passages, settings.k)}

    def close(self) -> None:
        """Cancel all questions, and end the threads."""
        if self._scheduler is not None:
            self._scheduler.close()
        for batcher in self._batchers.values():
            batcher.close()
