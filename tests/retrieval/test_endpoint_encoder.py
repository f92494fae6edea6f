"""An encoder on a server: an index built and searched with it, by keys alone, and a model that was exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import encyclopedia
from openai_server import RunningServer, serve

from r3rag_jax.config import load_config
from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.encoders.endpoint import PROBE, EndpointEncoder
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.factory import build_index, open_retriever
from r3rag_jax.retrieval.faiss import FaissRetriever


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def hashed() -> HashEncoder:
    return HashEncoder(64).fit([*(passage.contents for passage in encyclopedia()), PROBE])


def answering(vectors_of: Callable[[list[str]], np.ndarray]) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        vectors = 3 * vectors_of(body["input"])  # a server need not normalise
        return 200, {"data": [{"index": i, "embedding": vector.tolist()} for i, vector in enumerate(vectors)]}

    return reply


@pytest.fixture
def server(hashed: HashEncoder) -> Iterator[RunningServer]:
    """Queries are told from passages by their prefix."""

    def vectors_of(texts: list[str]) -> np.ndarray:
        is_query = texts[0].startswith("query: ")
        plain = [text.removeprefix("query: ") for text in texts]
        return hashed.encode(plain, kind="query" if is_query else "passage")

    with serve(answering(vectors_of)) as running:
        yield running


def config(url: str, *overrides: str) -> RetrievalConfig:
    keys = ["retrieval.encoder.kind=endpoint", f"retrieval.encoder.endpoint.url={url}", *overrides]
    return load_config(None, [*keys, "retrieval.encoder.endpoint.retries=0", "phases=index"]).retrieval


def test_an_index_of_remote_vectors_finds_what_the_encoder_itself_finds(
    server: RunningServer, hashed: HashEncoder, tmp_path: Path
) -> None:
    settings = config(server.url, "retrieval.encoder.query_prefix='query: '", "retrieval.encoder.batch_texts=50")
    build_index(settings, encyclopedia(), tmp_path / "index")
    # A probe beside the passages.
    assert sorted(len(body["input"]) for body in server.bodies) == [1, 16, 50, 50, 50, 50]
    retriever = open_retriever(settings, tmp_path / "index")
    local = FaissRetriever.of(hashed, encyclopedia())
    queries = ["Who directed The Silver Harbor?", "", "The Iron Crown"]
    for row, expected in zip(retriever.search(queries, 3), local.search(queries, 3), strict=True):
        assert [hit.passage for hit in row] == [hit.passage for hit in expected]
        np.testing.assert_allclose([hit.score for hit in row], [hit.score for hit in expected], rtol=1e-5)
    assert server.bodies[-1]["input"] == ["query: Who directed The Silver Harbor?", "query: The Iron Crown"]


def test_a_server_of_another_model_does_not_search_the_index(
    server: RunningServer, hashed: HashEncoder, tmp_path: Path
) -> None:
    build_index(config(server.url), encyclopedia()[:9], tmp_path / "index")
    noise = np.random.default_rng(0).normal(0, 1e-4, 64)
    with serve(
        answering(lambda texts: hashed.encode(texts, kind="passage") + noise)
    ) as other:  # the same model on other hardware
        open_retriever(config(other.url), tmp_path / "index")
    with serve(answering(lambda texts: hashed.encode(texts, kind="passage")[:, ::-1])) as other:
        with pytest.raises(UserError, match=r"must serve tiny, which .*index was built with; the cosine of its vector"):
            open_retriever(config(other.url), tmp_path / "index")
    with serve(answering(lambda texts: hashed.encode(texts, kind="passage")[:, :32])) as other:
        with pytest.raises(UserError, match="got nan, sizes 64 and 32"):
            open_retriever(config(other.url), tmp_path / "index")
    with pytest.raises(UserError, match="the encoder must be the one that the index"):
        open_retriever(config(server.url, "retrieval.encoder.endpoint.model=named"), tmp_path / "index")
    (tmp_path / "index" / "encoder_probe.json").write_text("[]")
    with pytest.raises(UserError, match=r"encoder_probe\.json"):
        open_retriever(config(server.url), tmp_path / "index")


def test_vectors_are_normalised_and_a_blank_text_has_none(server: RunningServer, hashed: HashEncoder) -> None:
    encoder = EndpointEncoder(config(server.url).encoder)
    vectors = encoder.encode(["The Iron Crown", " \n", "harbor"], kind="passage")
    np.testing.assert_allclose(vectors[::2], hashed.encode(["The Iron Crown", "harbor"], kind="passage"), rtol=1e-5)
    assert not vectors[1].any()
    assert encoder.dim == 64 and encoder.encode([]).shape == (0, 64)
    other = EndpointEncoder(config(server.url, "retrieval.encoder.passage_prefix=p").encoder)
    assert encoder.fingerprint != other.fingerprint


def test_it_needs_a_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"retrieval\.encoder\.endpoint\.url must be given when .*kind is endpoint"):
        load_config(None, ["retrieval.encoder.kind=endpoint"])
    with pytest.raises(UserError, match=r"retrieval\.encoder\.endpoint\.url: .* failed, attempt 1 of 1"):
        build_index(config("http://127.0.0.1:9/v1"), encyclopedia()[:3], tmp_path / "index")
