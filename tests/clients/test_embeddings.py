"""`/v1/embeddings`: what is sent, the forms of a vector, and replies that are none."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from openai_server import MODEL, Reply, serve
from test_endpoint import open_at

from r3rag_jax.clients.embeddings import EmbeddingsClient, MalformedEmbeddingsError, read_embeddings
from r3rag_jax.errors import UserError


def reply_of(vectors: list[list[float]], *, as_base64: bool = False) -> dict[str, Any]:
    """OpenAI's reply, in another order than the texts."""
    shown = [base64.b64encode(np.asarray(v, "<f4")).decode() if as_base64 else v for v in vectors]
    data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(shown)]
    return {"object": "list", "model": MODEL, "data": data[::-1], "usage": {"prompt_tokens": 3}}


@pytest.mark.parametrize("as_base64", [True, False])
def test_texts_are_embedded_in_their_order(as_base64: bool) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return 200, reply_of([[float(text), 0.1] for text in body["input"]], as_base64=as_base64)

    with serve(reply) as server:
        client = EmbeddingsClient(open_at(server.url, model=""), batch_texts=2, encoding_format="base64")
        found = client.embed([str(number) for number in range(7)])
        assert client.embed([]).shape == (0, 0)
        EmbeddingsClient(open_at(server.url), batch_texts=2, encoding_format="float", max_tokens=9).embed(["1"])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray([[number, 0.1] for number in range(7)], np.float32))
    first = min(server.bodies[:-1], key=lambda body: body["input"])
    assert first == {"model": MODEL, "input": ["0", "1"], "encoding_format": "base64"}
    assert sorted(len(body["input"]) for body in server.bodies[:-1]) == [1, 2, 2, 2]
    assert server.bodies[-1] == {
        "model": "m", "input": ["1"], "encoding_format": "float", "truncate_prompt_tokens": 9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        (None, "data with index and embedding"),
        ({"data": [{"embedding": [1.0]}]}, "data with index and embedding"),
        ({"data": [{"index": 0, "embedding": [1.0]}]}, "an embedding for each index below 2"),
        (reply_of([[1.0], [2.0], [3.0]]), "an embedding for each index below 2"),
        ({"data": [{"index": index, "embedding": [1.0]} for index in (False, True)]}, "an embedding for each index"),
        (reply_of([[1.0], [1.0, 2.0]]), "vectors of one size"),
        (reply_of([[], []]), "vectors of one size"),
        (reply_of([[1.0], [float("nan")]]), "finite numbers"),
        (reply_of([[1.0], [1e39]]), "finite numbers"),
        (reply_of([[1.0], ["one"]]), "embeddings as lists of numbers or base64 of float32"),  # type: ignore[list-item]
        (reply_of([[1.0], [[1.0]]]), "embeddings as lists of numbers or base64 of float32"),  # type: ignore[list-item]
        (reply_of([[1.0], {"x": 1}]), "embeddings as lists of numbers or base64 of float32"),  # type: ignore[list-item]
        (reply_of([[1.0], "!"]), "embeddings as lists of numbers or base64 of float32"),  # type: ignore[list-item]
        (reply_of([[1.0], "AAA="]), "embeddings as lists of numbers or base64 of float32"),  # type: ignore[list-item]
    ],
)
def test_replies_that_are_none(reply: Any, rule: str) -> None:
    with pytest.raises(MalformedEmbeddingsError, match=rule):
        read_embeddings(reply, 2)


def test_one_batch_that_fails_fails_the_call() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return (400, {"error": "too long"}) if "3" in body["input"] else (200, reply_of([[1.0]] * len(body["input"])))

    with serve(reply) as server:
        client = EmbeddingsClient(open_at(server.url), batch_texts=1, encoding_format="float")
        with pytest.raises(UserError, match=r"/embeddings answered 400 .*too long"):
            client.embed(list("12345"))
        assert client.embed(list("12")).shape == (2, 1)
    with serve(lambda body: (200, reply_of([[1.0] * (1 + len(body["input"][0]))]))) as server:
        client = EmbeddingsClient(open_at(server.url), batch_texts=1, encoding_format="float")
        with pytest.raises(UserError, match=r"/embeddings must answer vectors of one size; got \[2, 3\]"):
            client.embed(["a", "bb"])
