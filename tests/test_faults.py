"""A search server that fails while RL trains: what is done is saved, and the same command ends the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from search_server import Reply, RunningServer, search_with, serve

from r3rag_jax.errors import ServiceError
from r3rag_jax.evaluation.dev import DevEvaluation
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.training.experience import IterationSampler

pytestmark = [pytest.mark.slow, pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")]

FAULTS: dict[str, Callable[[int], Reply]] = {  # what the server answers a search of so many queries
    "down": lambda num: (503, b"out of memory"),
    "rubbish": lambda num: (200, b"<html>"),
    "none": lambda num: (200, {"result": None}),
    "wrong number": lambda num: (200, {"result": [[]] * (num + 1)}),
}


class Server:
    """Answers as Search-R1's server does, or with the fault that a test has set."""

    def __init__(self, retriever: Retriever):
        self.retriever, self.fault, self.num_asked, self.flaps = retriever, "", 0, False

    def __call__(self, body: dict[str, Any]) -> Reply:
        self.num_asked += 1
        if self.fault:
            return FAULTS[self.fault](len(body["queries"]))
        if self.flaps and self.num_asked % 2:
            return 503, b"busy"
        return search_with(self.retriever)(body)


@pytest.fixture
def server(finished: Callable[[str], Path]) -> Server:
    """Searches the passages of the tiny world."""
    return Server(tiny_run.open_components(finished("tags")).retriever)


@pytest.fixture
def running(server: Server) -> Iterator[RunningServer]:
    with serve(server) as running:
        yield running


@pytest.fixture
def train(finished: Callable[[str], Path], tmp_path: Path, running: RunningServer) -> Callable[[str], str]:
    """Trains RL against the server, from the cold start of another run, in a directory of this name."""
    settings: dict[str, Any] = {
        "phases": "[index, rl]", "rl__checkpoint_every": 100, "rl__eval_every": 2, "retrieval__kind": "http",
        "retrieval__endpoint__url": running.url, "retrieval__endpoint__format": "search_r1",
        "retrieval__endpoint__retries": 1,
    }  # fmt: skip
    return lambda name: tiny_run.train(tmp_path / name, finished("tags") / "policy" / "sft", **settings)


def rl_rows(directory: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "search_failures"}
            for row in tiny_run.metrics(directory / "run") if row["phase"] == "rl"]  # fmt: skip


def test_a_server_that_fails_in_training(
    server: Server, train: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, evaluate = IterationSampler.run, DevEvaluation.__call__
    train("whole")
    for fault in FAULTS:

        def run_and_fall(self: Any, iteration: int, backend: Any, fault: str = fault) -> Any:
            server.fault = fault if iteration == 1 else ""
            return run(self, iteration, backend)

        with monkeypatch.context() as patch, pytest.raises(ServiceError) as caught:
            patch.setattr(IterationSampler, "run", run_and_fall)
            train(fault)
        assert "RL iteration 1 of 3 is done, the newest checkpoint is of 1; start the same" in str(caught.value)
        assert caught.value.status == 69 and "retrieval.endpoint.url" in str(caught.value)
        server.fault = ""
        train(fault)
        assert rl_rows(tmp_path / fault) == rl_rows(tmp_path / "whole")
        one, other = (tiny_run.weights(tmp_path / name / "run", "rl") for name in ("whole", fault))
        np.testing.assert_equal(one, other)

    def fall(self: Any, backend: Any) -> Any:
        server.fault = "down"
        return evaluate(self, backend)

    with monkeypatch.context() as patch, pytest.raises(ServiceError, match="RL iteration 2 of 3 is done"):
        patch.setattr(DevEvaluation, "__call__", fall)
        train("dev")
    server.fault = ""
    train("dev")
    whole = [{name: x for name, x in row.items() if name != "dev_em"} for row in rl_rows(tmp_path / "whole")]
    assert rl_rows(tmp_path / "dev") == whole  # the iteration stands, without its evaluation


def test_a_server_that_flaps(server: Server, train: Callable[[str], str], tmp_path: Path) -> None:
    """Each request is refused once; the run only counts it."""
    train("whole")
    server.flaps = True
    train("flapping")
    assert rl_rows(tmp_path / "flapping") == rl_rows(tmp_path / "whole")
    retries = [
        row["search_failures"] for row in tiny_run.metrics(tmp_path / "flapping" / "run") if row["phase"] == "rl"
    ]
    assert min(retries) > 0
