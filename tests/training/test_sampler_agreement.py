"""Log-probabilities recomputed in training are those that the sampler recorded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_training import RL, VOCAB, modules, one_device, targets_like

from r3rag_jax.config import RolloutConfig
from r3rag_jax.parallel.target import Target
from r3rag_jax.rollout.backends import EngineBackend
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.rollout.search_env import search_env_factory
from r3rag_jax.sampler import decode as decode_module
from r3rag_jax.sampler.distribution import WHOLE, Truncation
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.transcript import Codec, Transcript, teacher_samples
from r3rag_jax.training.batch import minibatches
from r3rag_jax.training.losses import rl_loss
from r3rag_jax.types import Passage, Question, Status, Step, TrainBatch, Trajectory

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


PASSAGES = [
    Passage("a", '"Origin"\nOrigin is by Charles Darwin.'),
    Passage("b", '"Darwin"\nCharles Darwin was born in Shrewsbury.'),
]


QUESTION = Question("q", "Where was the author of Origin born?", ("Shrewsbury",))


STEPS = (
    Step("Who wrote it?", query="author Origin"),
    Step("It is Charles Darwin.", query="Charles Darwin born"),
    Step("He is of Shrewsbury.", answer="Shrewsbury"),
)


REQUESTS = [
    RolloutRequest(QUESTION, sample, temperature, seed=3) for sample, temperature in enumerate((0.7, 1.0, 0.0, 1.0))
]


MAX_LENGTH = 512
FILLER = 50  # sampled after the end of a step by a row that a stop string ends, and dropped


@pytest.fixture(scope="module", params=["tags", "steps"])
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    tokenizer = tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    protocol = make_protocol(request.param)
    if request.param == "search_r1":  # its instruction alone is longer than MAX_LENGTH in bytes
        protocol.user_message = make_protocol("tags").user_message  # type: ignore[method-assign]
    return Codec(tokenizer, protocol, passage_tokens=60)


def new_engine(truncation: Truncation) -> Engine:
    config = tiny.decoder(VOCAB).config
    return Engine(modules()[0]["policy"], config, one_device(), truncation=truncation, slots=4, max_length=MAX_LENGTH)


shared_engine = functools.cache(new_engine)  # compiled once for both protocols


def sampled(codec: Codec, engine: Engine) -> list[Trajectory]:
    """Trajectories of the tiny policy, sampled by the real engine."""
    backend = EngineBackend(engine, engine.load(modules()[1]["policy"]), codec.tokenizer, decode_chunk=32)
    config = RolloutConfig(max_length=MAX_LENGTH, max_new_tokens=110, max_steps=3)
    env_factory = search_env_factory(codec, config, top_k=1, max_passages=4)
    return rollout(backend, env_factory, tiny.DictRetriever(PASSAGES), REQUESTS)


def force(monkeypatch: pytest.MonkeyPatch, codec: Codec) -> None:
    """Make the engine sample the scripted steps, found by row key and position; all else stays as it is."""
    transcript, keys, table = Transcript(codec, QUESTION.question), [], []
    for number, (step, passage) in enumerate(zip(STEPS, [*PASSAGES, None], strict=True)):
        start, ids = len(transcript.context), codec.step_ids(step, number + 1)
        row = np.full(MAX_LENGTH, FILLER, np.int32)
        row[start : start + len(ids)] = ids
        keys += [request.key(number) for request in REQUESTS]
        table += [row] * len(REQUESTS)
        transcript.write(ids)
        if passage is not None:
            transcript.add_passages([passage])
    keys_K2, table_KS = np.asarray(keys), np.asarray(table)
    original = decode_module.sample

    def scripted(logits_BV: jax.Array, rows: Any, truncation: Truncation, can_branch: bool) -> Any:
        script_B = jnp.argmax((rows.keys[:, None] == keys_K2).all(axis=-1), axis=1)
        token = jnp.asarray(table_KS)[script_B, rows.lengths]
        certain_BV = jnp.where(jnp.arange(VOCAB) == token[:, None], 1e9, -1e9)
        temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        assert original(certain_BV, rows, truncation, can_branch)[0].shape == token.shape
        score = lambda x: jnp.take_along_axis(jax.nn.log_softmax(x), token[:, None], axis=1)[:, 0]  # noqa: E731
        return token, score(logits_BV / temperature)

    monkeypatch.setattr(decode_module, "sample", scripted)


@functools.cache
def jitted_loss(truncation: Truncation) -> Callable[..., Any]:
    options = {"config": RL, "remat": "none", "truncation": truncation, "target": Target.of(one_device())}
    return jax.jit(functools.partial(rl_loss, modules()[0], **options))


def sampler_gap(
    trajectories: list[Trajectory],
    change: Callable[[TrainBatch], TrainBatch] = lambda b: b,
    truncation: Truncation = WHOLE,
) -> float:
    """Largest difference between recorded and recomputed log-probabilities, as the RL phase logs it."""
    loss, params = jitted_loss(truncation), modules()[1]
    options = {"row_length": MAX_LENGTH, "batch_rows": 4, "rng": np.random.default_rng(0)}
    samples = [sample for trajectory in trajectories for sample in trajectory.samples]
    batches, _ = minibatches(samples, **options)
    logs = [loss(params, batch=change(batch), targets=targets_like(batch))[1] for batch in batches]
    return max(float(metrics["sampler_gap"]) for metrics in logs)


def test_recomputed_logprobs_are_the_samplers(codec: Codec) -> None:
    """Whatever a random policy writes, at three temperatures in one batch."""
    trajectories = sampled(codec, shared_engine(WHOLE))
    assert sum(sample.loss_mask.sum() for t in trajectories for sample in t.samples) > 100
    assert sampler_gap(trajectories) < 1e-4
    cold = lambda b: dataclasses.replace(b, temperature=np.ones_like(b.temperature))  # noqa: E731
    assert sampler_gap(trajectories, cold) > 0.1  # the bug of sampling at T and training at 1 would show


def test_they_are_also_truncated(codec: Codec) -> None:
    how = Truncation(min_p=0.02, top_k=40, top_p=0.8)
    trajectories = sampled(codec, shared_engine(how))
    assert sum(sample.loss_mask.sum() for t in trajectories for sample in t.samples) > 100
    assert sampler_gap(trajectories, truncation=how) < 1e-4
    assert sampler_gap(trajectories) > 0.1


@pytest.mark.parametrize("codec", ["tags", "steps", "search_r1"], indirect=True)
@pytest.mark.usefixtures("own_programs")
def test_they_are_also_across_retrievals(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole well-formed trajectories: passages spliced in, the cache kept, and the same ids as the cold start's."""
    force(monkeypatch, codec)
    trajectories = sampled(codec, new_engine(WHOLE))
    for trajectory in trajectories:
        assert trajectory.status == Status.ANSWERED
        assert trajectory.retrieved_ids == ("a", "b")
        taught = teacher_samples(codec, trajectory)
        for sample, teacher in zip(trajectory.samples, taught, strict=True):
            np.testing.assert_array_equal(sample.ids, teacher.ids)
            np.testing.assert_array_equal(sample.step_ids, teacher.step_ids)
    assert sampler_gap(trajectories) < 1e-4
    blind = lambda b: dataclasses.replace(b, segment_ids=np.where(b.loss_mask, 1, 2))  # noqa: E731
    assert sampler_gap(trajectories, blind) > 0.1
