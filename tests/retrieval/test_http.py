"""A remote retriever over a real HTTP server: its hits, its failures, and an evaluation that searches with it."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from corpora import encyclopedia
from search_server import Reply, RunningServer, search_with, serve

from r3rag_jax import evaluate
from r3rag_jax.config import RemoteRetrieverConfig, RetrievalConfig
from r3rag_jax.retrieval.base import RetrievalError, Retriever
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.factory import build_index, open_retriever, open_store
from r3rag_jax.retrieval.faiss import FaissRetriever


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def local() -> FaissRetriever:
    passages = encyclopedia()
    return FaissRetriever.of(HashEncoder().fit(passage.contents for passage in passages), passages)


@pytest.fixture
def server(local: FaissRetriever) -> Iterator[RunningServer]:
    with serve(search_with(local)) as running:
        yield running


def remote(url: str, **settings: Any) -> Retriever:
    endpoint = RemoteRetrieverConfig(url=url, **({"retries": 0, "timeout_s": 20.0} | settings))
    return open_retriever(RetrievalConfig(kind="http", endpoint=endpoint), "no index")


def test_hits_are_those_of_the_server(server: RunningServer, local: FaissRetriever) -> None:
    queries = [passage.title for passage in encyclopedia()[:150]] + ["qqqq"]
    retriever = remote(server.url)
    assert retriever.search(queries, 4) == local.search(queries, 4)
    assert sorted(len(body["queries"]) for body in server.bodies) == [23, 64, 64]
    assert retriever.search(queries[:1], 300) == local.search(queries[:1], 300)
    assert server.bodies[-1] == {"queries": queries[:1], "topk": 300, "return_scores": True}
    assert retriever.search([], 3) == []
    with pytest.raises(ValueError, match="k must be positive; got 0"):
        retriever.search(["harbor"], 0)
    assert remote(f"{server.url}/retrieve/").search(["harbor"], 2) == local.search(["harbor"], 2)
    assert remote(f"{server.url}/retrieve").fingerprint == retriever.fingerprint != remote("http://other").fingerprint


@pytest.mark.parametrize(
    ("status", "value", "message"),
    [
        (200, {"result": [[]]}, r"'a', 'b': .*/retrieve must answer in Search-R1's format \(the reply must have a row"),
        (200, None, r"the reply must be an object; got null\)"),
        (200, {"result": None}, r"result must be a list; got null"),
        (200, b"<html>", r"must answer JSON; got <html>"),
        (422, {"detail": "topk"}, r"'a', 'b': retrieval\.endpoint\.url: http.*/retrieve answered 422 .*topk"),
        (503, {"detail": "busy"}, r"failed, attempt 1 of 1: 503 .*busy"),
    ],
)
def test_a_reply_that_is_none_is_a_failure_and_never_empty(status: int, value: Any, message: str) -> None:
    with serve(lambda body: (status, value)) as server, pytest.raises(RetrievalError, match=message):
        remote(server.url).search(["a", "b"], 3)


def test_a_server_that_is_busy_for_a_moment_is_asked_again(local: FaissRetriever) -> None:
    replies = iter([503, 429])

    def reply(body: dict[str, Any]) -> Reply:
        status = next(replies, 200)
        return search_with(local)(body) if status == 200 else (status, {})

    with serve(reply) as server:
        assert remote(server.url, retries=3).search(["harbor"], 2) == local.search(["harbor"], 2)
        assert len(server.bodies) == 3


def test_a_server_that_is_silent_or_away_fails_in_time() -> None:
    released = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        released.wait(20)
        return 200, {"result": [[]]}

    with serve(reply) as server:
        started = time.monotonic()
        with pytest.raises(RetrievalError, match=r"search failed for 'a': retrieval\.endpoint\.url: .* failed"):
            remote(server.url, timeout_s=0.3).search(["a"], 3)
        assert time.monotonic() - started < 10
        released.set()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(RetrievalError, match=r"failed, attempt 2 of 2"):
        remote(url, retries=1).search(["a"], 3)


def test_one_batch_that_fails_fails_the_search(local: FaissRetriever) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return (500, {"detail": "broken"}) if "break" in body["queries"] else search_with(local)(body)

    queries = ["harbor"] * 200
    with serve(reply) as server:
        retriever = remote(server.url, max_in_flight=2)
        assert len(retriever.search(queries, 1)) == 200
        for position in (0, 100, 199):
            with pytest.raises(RetrievalError, match=r"500 .*broken"):
                retriever.search([*queries[:position], "break", *queries[position + 1 :]], 1)
        assert len(retriever.search(queries, 1)) == 200  # the next search starts afresh


def test_a_search_that_fails_ends_none_of_another_thread(local: FaissRetriever) -> None:
    """One thread waits for a server that is busy for a moment while the search of another is refused."""
    was_busy = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        if body["queries"] == ["break"]:
            return 400, {"detail": "no"}
        if not was_busy.is_set():
            was_busy.set()
            return 503, {}
        return search_with(local)(body)

    with serve(reply) as server, ThreadPoolExecutor(1) as pool:
        retriever = remote(server.url, retries=3)
        waiting = pool.submit(retriever.search, ["harbor"], 2)
        assert was_busy.wait(20)
        with pytest.raises(RetrievalError, match="400"):
            retriever.search(["break"], 2)
        assert waiting.result(20) == local.search(["harbor"], 2)


def test_the_passages_are_kept_for_the_cold_start(server: RunningServer, tmp_path: Path) -> None:
    config = RetrievalConfig(kind="http", endpoint=RemoteRetrieverConfig(url=server.url))
    build_index(config, encyclopedia(), tmp_path / "index")
    assert list(open_store(tmp_path / "index").passages()) == encyclopedia()
    assert server.bodies == []


def test_an_evaluation_with_a_remote_retriever_is_that_with_the_runs_own(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished("tags"), tmp_path / "run"))
    assert evaluate.main(["--checkpoint", str(run), "--name", "local"]) == 0
    with serve(search_with(tiny_run.open_components(run).retriever)) as server:
        keys = ["retrieval.kind=http", f"retrieval.endpoint.url={server.url}"]
        assert evaluate.main(["--checkpoint", str(run), "--name", "remote", *keys]) == 0
        assert server.bodies
    local, remote = ((run / "trajectories" / f"{name}.jsonl").read_bytes() for name in ("local", "remote"))
    assert local == remote
    marks = [json.loads((run / "eval" / f"{name}.json").read_text())["fingerprint"] for name in ("local", "remote")]
    assert marks[0]["index"] != marks[1]["index"]
