"""Every baseline is a row of the tables, and plays on the engine and on an inference server."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from fake_backend import FakeBackend
from flax import nnx
from openai_server import Reply, completion, serve
from playing import QUESTION, Retriever, config_of

from r3rag_jax import evaluate
from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.config import EvalConfig, MeshConfig, RolloutConfig, ServerConfig
from r3rag_jax.config.evaluation import BASE_SYSTEMS
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.systems import BASE_POLICY, SYSTEMS
from r3rag_jax.parallel.mesh import make_mesh, make_sampler_mesh
from r3rag_jax.rollout.backends import EngineBackend, RolloutBackend, ServerBackend
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Question, Status

DOCS = Path(__file__).parents[2] / "docs" / "baselines.md"
# What a model writes at the end of a prompt, the longest end that fits.
REPLIES = {
    "Answer:": " Shrewsbury\n",
    "Reasoning:": " The author is Charles Darwin.",
    "Darwin.": " So the answer is: Shrewsbury.",
    "answer is:": " Shrewsbury",
    "needed here:": " Yes.\nFollow up: Who wrote Origin then?\nIntermediate answer:",
    "Intermediate answer:": " Charles Darwin\nSo the final answer is: Shrewsbury",
    "Thought 1:": " I need the author.\nAction 1: Search[Origin]",
    "Thought 2:": " I know.\nAction 2: Finish[Shrewsbury]",
}
SEARCHES = {
    "closed_book": 0, "cot": 0, "naive_rag": 1, "rag_cot": 1, "ircot": 2, "self_ask": 1, "iter_retgen": 3,
    "react": 1, "flare": 3,
}  # fmt: skip
# Small budgets, for a random model that never stops.
SMALL = {
    "max_answer_tokens": 4, "cot__max_tokens": 8, "rag_cot__max_tokens": 8, "ircot__sentence_tokens": 8,
    "ircot__max_sentences": 2, "self_ask__max_tokens": 8, "iter_retgen__max_tokens": 8, "react__max_tokens": 8,
    "react__max_steps": 2, "flare__look_ahead": 8, "flare__max_tokens": 16, "flare__mask_below": 0.0,
}  # fmt: skip


def reply_to(prompt: str) -> str:
    return next(reply for end, reply in REPLIES.items() if prompt.endswith(end))


def test_every_table_has_the_same_baselines() -> None:
    assert tuple(BASELINES) == BASE_SYSTEMS == tuple(SEARCHES)
    assert tuple(name for name, system in SYSTEMS.items() if system.policy == BASE_POLICY) == BASE_SYSTEMS
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", DOCS.read_text("utf-8"), re.MULTILINE)
    assert [(name, title.strip()) for name, title in rows] == [(name, SYSTEMS[name].title) for name in BASELINES]


@pytest.mark.parametrize("name", BASELINES)
def test_evaluate_and_the_eval_phase_take_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert EvalConfig(systems=(name,)).systems == (name,)
    assert evaluate.main(["--checkpoint", "/nowhere", "--system", name]) == 2
    assert "--checkpoint must be a run directory" in capsys.readouterr().err  # not: --system


@pytest.mark.parametrize("name", BASELINES)
def test_a_server_plays_it_as_any_other_backend(name: str, tokenizer: Tokenizer) -> None:
    env_factory = BASELINES[name](config_of(), tokenizer)
    own = FakeBackend(lambda slot, context: tokenizer.encode(reply_to(tokenizer.decode(context.ids))))
    [played] = rollout(own, env_factory, Retriever(), [RolloutRequest(QUESTION)])

    def reply(body: dict[str, Any]) -> Reply:
        ids = tokenizer.encode(reply_to(tokenizer.decode(body["prompt"])))
        logprobs = {"tokens": [f"token_id:{id}" for id in ids], "token_logprobs": [-0.5] * len(ids)}
        return 200, completion(tokenizer.decode(ids), token_ids=ids, logprobs=logprobs)

    with serve(reply) as endpoint:
        server = ServerConfig(url=endpoint.url, retries=0)
        backend = ServerBackend(RolloutConfig(max_length=8000, server=server, min_p=0.1), tokenizer)
        [served] = rollout(backend, env_factory, Retriever(), [RolloutRequest(QUESTION)])
    assert (served.steps, served.status) == (played.steps, played.status)
    assert (served.status, served.answer) == (Status.ANSWERED, "Shrewsbury")
    assert served.num_retrievals == SEARCHES[name]
    assert all(body["logprobs"] == 1 for body in endpoint.bodies)


def test_a_server_without_logprobs_is_refused_by_flare_alone(tokenizer: Tokenizer) -> None:
    def play(name: str) -> Status:
        backend = ServerBackend(
            RolloutConfig(max_length=8000, server=ServerConfig(url=endpoint.url, retries=0)), tokenizer
        )
        env_factory = BASELINES[name](config_of(), tokenizer)
        return rollout(backend, env_factory, Retriever(), [RolloutRequest(QUESTION)])[0].status

    with serve(lambda body: (200, completion(reply_to(tokenizer.decode(body["prompt"]))))) as endpoint:
        assert play("ircot") == Status.ANSWERED
        with pytest.raises(UserError, match="flare needs the log-probability of each sampled token; the inference"):
            play("flare")


@pytest.fixture(scope="module")
def engine_backend(tokenizer: Tokenizer) -> Callable[[int], RolloutBackend]:
    """Number of slots -> the tiny random model on a real engine."""
    graphdef, params = nnx.split(tiny.decoder())

    def backend(slots: int) -> RolloutBackend:
        mesh = make_sampler_mesh(MeshConfig(sampler_devices=1), make_mesh(MeshConfig()))
        engine = Engine(graphdef, tiny.decoder().config, mesh, slots=slots, max_length=1600)
        return EngineBackend(engine, engine.load(params), tokenizer, decode_chunk=16)

    return backend


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
def test_the_engine_plays_all_of_them(tokenizer: Tokenizer, engine_backend: Callable[[int], RolloutBackend]) -> None:
    """A random model writes bytes: its completions are cut by their budgets, or end where a stop is drawn."""
    requests = [RolloutRequest(Question(str(i), f"Who is {i} of Origin?", ("x",)), i, 1.0, seed=2) for i in range(3)]
    backends = [engine_backend(slots) for slots in (3, 1)]
    for name in BASELINES:
        env_factory = BASELINES[name](config_of(max_length=1600, **SMALL), tokenizer)
        together, alone = (rollout(backend, env_factory, Retriever(), requests) for backend in backends)
        assert [t.steps for t in together] == [t.steps for t in alone], name
        assert [t.sample_index for t in together] == [0, 1, 2]
        assert all(np.isfinite(t.num_policy_tokens) and t.num_retrievals <= 8 for t in together)
        assert {t.num_retrievals for t in together} == {0} or name not in ("closed_book", "cot")
        if name not in ("closed_book", "cot", "self_ask", "react"):  # they begin with a search for the question
            assert all(t.steps[0].query == t.question.question for t in together), name
