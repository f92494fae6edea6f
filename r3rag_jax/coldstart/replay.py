"""Steps that are known beforehand, played through the policy's Env: no model samples.

gold decompositions   the steps are played against the live retriever, which adds the passages
acceptance            a teacher's steps with the passages that it saw: does the policy's protocol hold them?
check                 a finished trajectory against the live retriever: does it bring the same passages?
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from r3rag_jax.retrieval.base import Hit, Retriever
from r3rag_jax.rollout.env import Done, Env, EnvFactory, Search, StopRule, Transition
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import OnDone, rollout
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Completion, Context, Status, Step, Trajectory

StepsOf = Callable[[RolloutRequest], Sequence[Step]]


class ReplayEnv:
    """The Env of a request, in which given steps are written instead of sampled ones."""

    def __init__(self, env: Env, codec: Codec, steps: Sequence[Step]):
        self._env, self._codec, self._steps = env, codec, steps
        self._num_written = 0

    def start(self) -> Transition:
        """See `Env.start`; it never returns a Context."""
        return self._write(self._env.start())

    def step(self, completion: Completion) -> Transition:
        """Not called: nothing is sampled."""
        raise AssertionError("the steps of a replay are given")

    def observe(self, hits: Sequence[Hit]) -> Transition:
        """See `Env.observe`."""
        return self._write(self._env.observe(hits))

    def _write(self, transition: Transition) -> Transition:
        """Write the next step as long as the Env asks for one."""
        while isinstance(transition, Context):
            self._num_written += 1
            step = self._steps[self._num_written - 1]
            transition = write_step(self._env, self._codec, step, self._num_written, transition)
        return transition


def write_step(env: Env, codec: Codec, step: Step, number: int, context: Context) -> Transition:
    """Write step `number` (from 1) as if a policy had sampled it after the context, cut off at its budget."""
    return env.step(Completion(codec.step_ids(step, number)[: context.budget], None))


class NoBackend:
    """The backend of replays: it has slots, and nothing is ever sampled in them."""

    is_open = True
    num_active = 0

    def __init__(self, num_slots: int):
        self.num_slots = num_slots

    @contextlib.contextmanager
    def generate(self, stops: StopRule) -> Iterator[NoBackend]:
        """See `RolloutBackend.generate`."""
        yield self

    def submit(self, contexts: Mapping[int, Context]) -> None:
        """See `Generation.submit`: there are no contexts."""
        if contexts:
            raise AssertionError("a replay samples nothing")

    def wait(self) -> list[tuple[int, Completion]]:
        """See `Generation.wait`."""
        return []


def play(
    steps_of: StepsOf,
    codec: Codec,
    search_env: EnvFactory,
    retriever: Retriever,
    requests: Sequence[RolloutRequest],
    *,
    slots: int,
    on_done: OnDone | None = None,
) -> list[Trajectory]:
    """Play the steps of each request through its Env against the retriever; return the trajectories in order.

    Args:
        slots: requests whose searches are batched.

    Raises:
        RetrievalError: a search failed.
    """
    factory = EnvFactory(lambda request: ReplayEnv(search_env(request), codec, steps_of(request)), search_env.stops)
    return rollout(NoBackend(slots), factory, retriever, requests, on_done=on_done)


def play_recorded(trajectory: Trajectory, codec: Codec, search_env: EnvFactory) -> Trajectory:
    """Play a trajectory through its Env, with its own passages as what the searches bring."""
    env = ReplayEnv(search_env(RolloutRequest(trajectory.question)), codec, trajectory.steps)
    transition = env.start()
    searched = (step for step in trajectory.steps if step.query is not None)
    while isinstance(transition, Search):
        transition = env.observe([Hit(passage, 0.0) for passage in next(searched).passages])
    assert isinstance(transition, Done)
    return transition.trajectory


def fault_of(trajectory: Trajectory, codec: Codec, search_env: EnvFactory) -> str | None:
    """Why the policy's Env does not play a teacher's trajectory to its answer; None if it does."""
    if (fault := codec.unreadable_step(trajectory)) is not None:
        return fault
    played = play_recorded(trajectory, codec, search_env)
    number = len(played.steps)
    if played.status is Status.FORMAT_ERROR:
        return f"step {number} is longer than rollout.max_new_tokens"
    if played.status is Status.CONTEXT_FULL:
        return f"rollout.max_length is full at step {number}"
    if played.status is Status.NO_ANSWER:
        return f"rollout.max_steps or rollout.max_trajectory_tokens is used up at step {number}"
    if shown(played) != shown(trajectory):
        return "retrieval.top_k or retrieval.max_passages shows other passages"
    return None


def shown(trajectory: Trajectory) -> list[list[str]]:
    """Ids of the passages of each step."""
    return [[passage.id for passage in step.passages] for step in trajectory.steps]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A trajectory whose replay differs from it."""

    index: int  # of the trajectory
    what: str


def differences(
    trajectories: Sequence[Trajectory], codec: Codec, search_env: EnvFactory, retriever: Retriever, *, slots: int,
    on_done: OnDone | None = None,
) -> list[Difference]:  # fmt: skip
    """Play trajectories against the live retriever; returns those that end otherwise or show other passages.

    Raises:
        RetrievalError: a search failed.
    """
    requests = [RolloutRequest(t.question, sample_index=index) for index, t in enumerate(trajectories)]
    played = play(
        lambda request: trajectories[request.sample_index].steps, codec, search_env, retriever, requests,
        slots=slots, on_done=on_done,
    )  # fmt: skip
    found = []
    for index, (one, other) in enumerate(zip(trajectories, played, strict=True)):
        if one.status is not other.status:
            found.append(Difference(index, f"it ends with {other.status.name}, not {one.status.name}"))
        elif (now := shown(other)) != (then := shown(one)):
            number = next(k for k, pair in enumerate(zip(then, now, strict=False)) if pair[0] != pair[1])
            found.append(Difference(index, f"step {number + 1} shows {now[number]}, not {then[number]}"))
    return found
