"""Asynchronous rollouts: which policy an iteration is sampled with, and in which thread."""

from __future__ import annotations

import threading

import pytest

from r3rag_jax.rollout.prefetch import Prefetcher


class Recorder:
    """Policies are copies of a list of weights; rollouts say by which they were sampled, and where."""

    def __init__(self) -> None:
        self.weights, self.rollouts = [0], []
        self.main = threading.get_ident()

    def copy_policy(self, weights: list[int]) -> tuple[int, ...]:
        assert threading.get_ident() == self.main
        return tuple(weights)

    def run(self, iteration: int, policy: tuple[int, ...]) -> str:
        self.rollouts.append((iteration, policy, threading.get_ident() == self.main))
        return f"rollouts of {iteration}"


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def test_without_a_start_an_iteration_is_sampled_on_demand(recorder: Recorder) -> None:
    with Prefetcher(recorder.copy_policy, recorder.run) as prefetcher:
        assert prefetcher.result(0, recorder.weights) == "rollouts of 0"
    assert recorder.rollouts == [(0, (0,), True)]


def test_what_is_started_has_the_weights_of_its_start(recorder: Recorder) -> None:
    with Prefetcher(recorder.copy_policy, recorder.run) as prefetcher:
        prefetcher.start(1, recorder.weights)
        recorder.weights[0] = 7  # the update may overwrite them
        assert prefetcher.result(1, recorder.weights) == "rollouts of 1"
        assert prefetcher.result(2, recorder.weights) == "rollouts of 2"
    assert recorder.rollouts == [(1, (0,), False), (2, (7,), True)]


def test_rollouts_of_another_iteration_or_a_discarded_policy_are_not_used(recorder: Recorder) -> None:
    with Prefetcher(recorder.copy_policy, recorder.run) as prefetcher:
        prefetcher.discard()
        prefetcher.start(1, recorder.weights)
        prefetcher.discard()
        assert prefetcher.result(1, recorder.weights) == "rollouts of 1"
        prefetcher.start(3, recorder.weights)
        assert prefetcher.result(2, recorder.weights) == "rollouts of 2"
    assert [(iteration, is_main) for iteration, _, is_main in recorder.rollouts] == [
        (1, False), (1, True), (3, False), (2, True),
    ]  # fmt: skip


def test_an_error_in_the_thread_is_raised_where_the_result_is_wanted(recorder: Recorder) -> None:
    def fail(iteration: int, policy: tuple[int, ...]) -> str:
        raise RuntimeError("no rollouts")

    with Prefetcher(recorder.copy_policy, fail) as prefetcher:
        prefetcher.start(1, recorder.weights)
        with pytest.raises(RuntimeError, match="no rollouts"):
            prefetcher.result(1, recorder.weights)
