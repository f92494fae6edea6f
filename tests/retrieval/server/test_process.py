"""The server as a user starts it: its flags and its signals."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from corpora import encyclopedia
from serving import server_process

from r3rag_jax import serve
from r3rag_jax.config import RemoteRetrieverConfig, RetrievalConfig
from r3rag_jax.retrieval.factory import build_index, open_retriever
from r3rag_jax.retrieval.http import HttpRetriever


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "index"
    build_index(RetrievalConfig(), encyclopedia(), directory)
    return directory


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-k", "0"], "serve.max_k must be at least 1; got 0"),
        (["--port", "65536"], "serve.port must be in [0, 65535]; got 65536"),
        (["--max-k", "many"], "argument --max-k: invalid int value: 'many'"),
        (["--token-env", "a secret"], "serve.token_env must be the name of an environment variable, not a key itself"),
        (["--token-env", "NO_SUCH_VARIABLE"], "--token-env names NO_SUCH_VARIABLE: it must be set"),
        (["seed=3"], "only keys of section retrieval describe an index; got 'seed=3'"),
        (["retrieval.encoder.dimm=3"], "did you mean 'retrieval.encoder.dim'"),
        (["retrieval.kind=bm25"], "must hold an index of retrieval.kind=bm25; got one of faiss"),
        (["retrieval.encoder.dim=7"], "retrieval.encoder.dim must be 1024, the size of the vectors in"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 0 must be a free address; got"),
    ],
)
def test_what_cannot_be_served_ends_in_a_line(
    index: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--index", str(index), "--port", "0", *words]
    try:
        status: Any = serve.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.slow
def test_a_signal_ends_the_process_in_order(index: Path, tmp_path: Path) -> None:
    local = open_retriever(RetrievalConfig(), index)
    with server_process(index, "--token-env", "TOKEN", TOKEN="secret") as (process, url):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TOKEN", "secret")
            remote = HttpRetriever(RemoteRetrieverConfig(url=url, format="native", key_env="TOKEN"))
        assert remote.search(["harbor"], 3) == local.search(["harbor"], 3)
        assert remote.fingerprint == local.fingerprint
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
