"""Whole trajectories of a trained policy against a naive loop: nothing that makes rollouts fast may change them."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from flax import nnx

from r3rag_jax.components import Components
from r3rag_jax.config import MeshConfig, RolloutConfig
from r3rag_jax.parallel.mesh import make_sampler_mesh
from r3rag_jax.retrieval.base import Hit, Retriever
from r3rag_jax.retrieval.selection import select_passages
from r3rag_jax.rollout.backends import EngineBackend
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.rollout.search_env import search_env_factory
from r3rag_jax.run.progress import num_compiled
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.text.transcript import Transcript
from r3rag_jax.types import Trajectory

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
TEMPERATURES = (0.0, 0.7, 1.0)


@pytest.fixture(scope="module", params=["tags", pytest.param("steps", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, finished: Callable[[str], Path]) -> tuple[Components, Any]:
    components = tiny_run.open_components(finished(request.param))
    return components, components.policy.load(components.run.policy("rl"))


def requests_of(components: Components, count: int) -> list[RolloutRequest]:
    questions = components.dataset.questions("test")[:count]
    return [RolloutRequest(question, i, t, seed=5) for i, t in enumerate(TEMPERATURES) for question in questions]


@dataclasses.dataclass
class Slow:
    """A retriever of which each search takes another time."""

    inner: Retriever
    waits: Any = dataclasses.field(default_factory=lambda: itertools.cycle((0.0, 0.02, 0.005)))

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        time.sleep(next(self.waits))
        return self.inner.search(queries, k)


def sample_trajectories(
    components: Components,
    params: Any,
    requests: Sequence[RolloutRequest],
    slots: int = 8,
    retriever: Retriever | None = None,
    is_alone: bool = False,
    **options: Any,
) -> list[Trajectory]:
    """Trajectories by an engine of `slots`."""
    config = components.config.rollout.replace(slots=slots, **options)
    engine = engine_of(components, config, is_alone)
    return run(components, engine, engine.load(jax.device_get(params)), requests, config, retriever)


def engine_of(components: Components, config: RolloutConfig, is_alone: bool = False) -> Engine:
    """On all devices, or on one alone, which decodes fewer rows when fewer are left."""
    shape = {"slots": config.slots, "max_length": config.max_length}
    mesh = make_sampler_mesh(MeshConfig(sampler_devices=1), components.mesh) if is_alone else components.mesh
    return Engine(components.policy.graphdef, components.policy.decoder_config, mesh, **shape)


def run(
    components: Components,
    engine: Engine,
    policy: Any,
    requests: Sequence[RolloutRequest],
    config: RolloutConfig,
    retriever: Retriever | None = None,
) -> list[Trajectory]:
    backend = EngineBackend(engine, policy, components.policy.tokenizer, decode_chunk=config.decode_chunk)
    env_factory = search_env_factory(components.codec, config, top_k=components.config.retrieval.top_k, max_passages=10)
    overlap = config.search_overlap
    return rollout(backend, env_factory, retriever or components.retriever, requests, search_overlap=overlap)


def naive(components: Components, params: Any, request: RolloutRequest) -> list[tuple[list[int], list[float]]]:
    """Ids and log-probabilities of each step: a full forward per token, one search per step, no cache, no batch."""
    config, codec, model = components.config.rollout, components.codec, nnx.merge(components.policy.graphdef, params)
    forward = _forward(model, config.max_length)
    transcript, written, seen = Transcript(codec, request.question.question), [], set[str]()
    for number in range(config.max_steps):
        context, ids, logprobs = list(transcript.context), [], []
        while len(ids) < min(config.max_new_tokens, config.max_length - len(context)):
            logits = forward([*context, *ids])
            token = _draw(logits, request, number, len(context) + len(ids))
            scaled = logits / (request.temperature or 1.0)
            logprobs.append(float(scaled[token] - np.logaddexp.reduce(scaled)))
            ids.append(token)
            if token == codec.turn_end_id or token in codec.stop_ids:
                break
        written.append((ids, logprobs))
        transcript.write(ids, np.zeros(len(ids), np.float32))
        step = codec.parse_step(ids, number + 1)
        if ids[-1] not in {codec.turn_end_id, *codec.stop_ids} or not step.is_well_formed or step.answer is not None:
            break
        [hits] = components.retriever.search([step.query or ""], components.config.retrieval.top_k + len(seen))
        passages = select_passages(hits, seen, components.config.retrieval.top_k, max_passages=10)
        seen |= {passage.id for passage in passages}
        transcript.add_passages(passages)
        if len(transcript.context) >= config.max_length - 1:
            break
    return written


def _forward(model: Any, length: int) -> Callable[[list[int]], np.ndarray]:
    logits_of = jax.jit(lambda tokens, positions: model.logits(model(tokens, positions)))

    def forward(ids: list[int]) -> np.ndarray:
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(logits_of(tokens, np.arange(length)[None])[0, len(ids) - 1], np.float64)

    return forward


def _draw(logits: np.ndarray, request: RolloutRequest, step: int, position: int) -> int:
    if request.temperature == 0:
        return int(np.argmax(logits))
    key = jax.random.fold_in(jax.random.wrap_key_data(np.asarray(request.key(step), np.uint32)), position)
    weights = np.exp((logits - logits.max()) / request.temperature)
    return int(np.searchsorted(np.cumsum(weights) / weights.sum(), float(jax.random.uniform(key)), "right"))


def test_a_trajectory_is_that_of_a_naive_loop(trained: tuple[Components, Any]) -> None:
    components, params = trained
    requests = requests_of(components, 3)
    trajectories = sample_trajectories(components, params, requests)
    assert sum(t.num_retrievals for t in trajectories) > 3  # so that passages are in the contexts
    for request, trajectory in zip(requests, trajectories, strict=True):
        written = naive(components, params, request)
        assert len(written) == len(trajectory.steps)
        for number, (ids, logprobs) in enumerate(written):
            sample = trajectory.samples[0 if components.codec.protocol.is_one_sequence else number]
            mine = sample.loss_mask & (sample.step_ids == number if components.codec.protocol.is_one_sequence else True)
            assert sample.ids[mine].tolist() == ids
            np.testing.assert_allclose(sample.behaviour_logprobs[mine], logprobs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["tags", "steps"], indirect=True)
def test_order_slots_and_slow_searches_change_nothing(trained: tuple[Components, Any]) -> None:
    components, params = trained
    requests = requests_of(components, 4)
    plain = sample_trajectories(components, params, requests)
    order = np.random.default_rng(0).permutation(len(requests)).tolist()
    slow, shuffled = Slow(components.retriever), [requests[i] for i in order]
    ways = (8, 1, slow, False), (3, 0, None, False), (3, 2, slow, False), (8, 0, None, True)
    for slots, turns, retriever, is_alone in ways:
        others = sample_trajectories(
            components, params, shuffled, slots, retriever, is_alone, search_overlap=turns, decode_chunk=7
        )
        for i, other in zip(order, others, strict=True):
            assert other.steps == plain[i].steps and other.status == plain[i].status
            for one, sample in zip(plain[i].samples, other.samples, strict=True):
                assert sample.ids.tolist() == one.ids.tolist()
                np.testing.assert_allclose(sample.behaviour_logprobs, one.behaviour_logprobs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["tags", "steps"], indirect=True)
def test_how_slow_a_search_is_changes_no_bit(trained: tuple[Components, Any]) -> None:
    components, params = trained
    requests = requests_of(components, 4)
    fast, slow = (
        sample_trajectories(components, params, requests, 4, retriever, search_overlap=1)
        for retriever in (components.retriever, Slow(components.retriever))
    )
    for one, other in zip(fast, slow, strict=True):
        for a, b in zip(one.samples, other.samples, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.behaviour_logprobs, b.behaviour_logprobs)


@pytest.mark.slow
@pytest.mark.parametrize("is_alone", [False, True])
def test_nothing_is_compiled_after_a_warm_up(trained: tuple[Components, Any], is_alone: bool) -> None:
    """Two hundred trajectories of all lengths, groups and temperatures, some slots full and some not."""
    components, params = trained
    config = components.config.rollout.replace(slots=16)
    engine = engine_of(components, config, is_alone)
    policy = engine.load(jax.device_get(params))
    engine.warm_up(policy)
    run(components, engine, policy, requests_of(components, 1)[:1], config)  # what else is compiled once, outside of it
    before = num_compiled()
    questions = [
        dataclasses.replace(q, id=f"{q.id}-{i}") for i in range(50) for q in components.dataset.questions("test")
    ]
    assert len(questions) == 200
    requests = [RolloutRequest(q, i % 4, TEMPERATURES[i % 3]) for i, q in enumerate(questions)]
    trajectories = run(components, engine, policy, requests, config)
    assert num_compiled() == before
    assert len({len(sample) for t in trajectories for sample in t.samples}) > 10
