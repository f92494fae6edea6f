"""The sampler that is a user's inference server: what is asked of it, and which of its replies count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from openai_server import MODEL, Reply, completion, serve

from r3rag_jax.clients.completions import CompletionsClient
from r3rag_jax.config import RolloutConfig, ServerConfig
from r3rag_jax.errors import UserError
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Context

Open = Callable[..., CompletionsClient]
SERVER_KEYS = set(ServerConfig.model_fields)


@pytest.fixture
def open_at(tokenizer: Tokenizer) -> Open:
    """A client of the server at a URL; keyword arguments are keys of `rollout` and of `rollout.server`."""

    def open_at(url: str, stop_ids: tuple[int, ...] = (), **settings: Any) -> CompletionsClient:
        server = {name: settings.pop(name) for name in SERVER_KEYS & settings.keys()}
        config = RolloutConfig(server=ServerConfig(url=url, **{"retries": 1} | server), **settings)
        return CompletionsClient(config, tokenizer, stop_ids=stop_ids, first_wait_s=0.01)

    return open_at


def hello(_: dict[str, Any]) -> Reply:
    return 200, completion("hello")


def context(*ids: int, budget: int = 8, **fields: Any) -> Context:
    return Context(ids or (70, 71), budget, **fields)


def test_a_request_holds_the_context_and_how_to_sample(open_at: Open, tokenizer: Tokenizer) -> None:
    stops = (tokenizer.token_id("</answer>"), tokenizer.encode("\n")[0])
    key = np.asarray([(1 << 32) - 3, 7], np.uint32)
    with serve(hello) as server:
        client = open_at(server.url, stops, max_length=100, top_p=0.9, min_p=0.1, top_k_tokens=40)
        client.complete(Context(np.asarray([70, 71]), 300, temperature=0.7, key=key))
    assert server.bodies == [
        {
            "model": MODEL, "prompt": [70, 71], "max_tokens": 98, "temperature": 0.7, "top_p": 0.9,
            "stop": ["</answer>", "\n", "<|im_end|>"], "logprobs": 1, "seed": (1 << 31) - 2,
            "stop_token_ids": [*stops, tokenizer.eos_id], "include_stop_str_in_output": True, "no_stop_trim": True,
            "skip_special_tokens": False, "spaces_between_special_tokens": False, "add_special_tokens": False,
            "return_token_ids": True, "return_tokens_as_token_ids": True, "min_p": 0.1, "top_k": 40,
            "repetition_penalty": 1.0,
        }
    ]  # fmt: skip


def test_a_server_without_extra_fields_is_sent_openai_fields_alone(open_at: Open) -> None:
    with serve(hello) as server:
        open_at(server.url, extra_fields=False, model="mine").complete(context(budget=3))
    assert server.bodies == [
        {
            "model": "mine", "prompt": [70, 71], "max_tokens": 3, "temperature": 0.0, "top_p": 1.0,
            "stop": ["<|im_end|>"], "logprobs": 1,
        }
    ]  # fmt: skip


def test_openai_takes_four_stop_strings(open_at: Open, tokenizer: Tokenizer) -> None:
    with serve(hello) as server:
        open_at(server.url, tuple(range(70, 78))).complete(context())
    [body] = server.bodies
    assert len(body["stop"]) == 4 and body["stop_token_ids"] == [*range(70, 78), tokenizer.eos_id]


def test_a_prompt_may_be_sent_as_text(open_at: Open, tokenizer: Tokenizer) -> None:
    with serve(hello) as server:
        open_at(server.url, prompt_format="text").complete(context(*tokenizer.encode("<think> é")))
    assert server.bodies[0]["prompt"] == "<think> é"


def test_logprobs_count_only_where_they_are_those_of_the_sampling(open_at: Open) -> None:
    reply = completion("", "length", token_ids=[70, 71], logprobs={"token_logprobs": [-0.5, -0.25]})
    with serve(lambda _: (200, reply)) as server:
        for temperature, settings, is_known in (
            (1.0, {}, True),
            (0.0, {}, True),
            (0.7, {}, False),
            (1.0, {"min_p": 0.1}, False),
            (1.0, {"top_p": 0.9}, False),
            (0.7, {"top_k_tokens": 40}, False),
            (0.0, {"top_k_tokens": 40, "min_p": 0.1, "top_p": 0.9}, True),  # greedy: nothing is left out
        ):
            read = open_at(server.url, **settings).complete(context(temperature=temperature))
            assert read.ids == [70, 71]
            assert np.isnan(read.behaviour_logprobs).tolist() == [not is_known] * 2
            assert not is_known or read.behaviour_logprobs.tolist() == [-0.5, -0.25]
    assert [server.bodies[-1][name] for name in ("top_k", "min_p", "top_p")] == [-1, 0.0, 1.0]


@pytest.mark.parametrize("length", [0, 512, 600])
def test_a_context_without_tokens_or_without_space_is_an_error(open_at: Open, length: int) -> None:
    with pytest.raises(UserError, match=f"a context must hold 1 to 511 tokens; got {length}"):
        open_at("http://x").complete(Context([5] * length, 8))


# ------------------------------------------------------------------------------------------ errors


def test_a_malformed_reply_names_the_server_the_rule_and_the_reply(open_at: Open) -> None:
    with serve(lambda _: (200, {"choices": []})) as server, pytest.raises(UserError) as caught:
        open_at(server.url).complete(context())
    assert str(caught.value) == (
        f"rollout.server.url: {server.url}/completions must answer choices with text and finish_reason; "
        'got {"choices": []}'
    )
    assert len(server.bodies) == 1


def test_a_refusal_says_what_may_help(open_at: Open) -> None:
    with serve(lambda _: (400, {"error": "unknown field"})) as server:
        with pytest.raises(UserError, match=r'400 \{"error": "unknown field"\} .*rollout\.server\.extra_fields=false'):
            open_at(server.url).complete(context())
        with pytest.raises(UserError, match=r'400 \{"error": "unknown field"\}$'):
            open_at(server.url, extra_fields=False).complete(context())
    assert len(server.bodies) == 2


def test_the_key_is_sent(open_at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"rollout\.server\.key_env names the environment variable MY_KEY: it is not"):
        open_at("http://x", key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret-1")
    with serve(hello) as server:
        open_at(server.url, key_env="MY_KEY").complete(context())
    assert server.headers[0]["Authorization"] == "Bearer secret-1"
