"""Samples in trees: every sample is still there, and a tree teaches exactly what its samples teach."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import merging
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from r3rag_jax.config import CriticConfig, KLConfig, RLConfig
from r3rag_jax.data.sft import SFTBatches, SFTSample
from r3rag_jax.models.attention import attention
from r3rag_jax.parallel.target import ONE_CPU
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.transcript import Codec, Transcript
from r3rag_jax.training.batch import minibatches, pack
from r3rag_jax.training.losses import rl_loss, sft_loss
from r3rag_jax.training.prefix_tree import share_prefixes
from r3rag_jax.training.state import Targets, new_critic
from r3rag_jax.types import Passage, Question, Sample, SFTBatch, Status, Step, TrainBatch, Trajectory

Q, A, B, C, X, Y, Z = range(10, 17)


def sample(prompt: list[int], written: list[int], step: int = 0, temperature: float = 1.0) -> Sample:
    ids = np.asarray([*prompt, *written], np.int32)
    step_ids = np.where(np.arange(len(ids)) < len(prompt), -1, step).astype(np.int32)
    logprobs = np.where(step_ids >= 0, -0.1 * ids, 0).astype(np.float32)
    return Sample(ids, step_ids >= 0, logprobs, step_ids, temperature)


def split(tree: Sample) -> list[tuple[list[int], list[int], list[int], list[bool]]]:
    """What a token of each branch sees: (ids, positions, step ids, loss mask) on the way from the root to its end."""
    branch_ids: Any = tree.branch_ids
    found = []
    for branch in np.unique(branch_ids[branch_ids > 0]):
        end = np.flatnonzero(branch_ids == branch)[-1]
        path = np.flatnonzero(((branch_ids == 0) | (branch_ids == branch)) & (np.arange(len(tree)) <= end))
        fields = (tree.ids, tree.positions, tree.step_ids, tree.loss_mask)
        found.append(tuple(np.asarray(field)[path].tolist() for field in fields))
    return found  # type: ignore[return-value]


def assert_predicted(tree: Sample) -> None:
    """What the policy wrote stands in the row right after the token of its own sample that predicts it."""
    assert tree.branch_ids is not None and tree.positions is not None
    written = np.flatnonzero(tree.loss_mask)
    np.testing.assert_array_equal(tree.positions[written], tree.positions[written - 1] + 1)
    before = tree.branch_ids[written - 1]
    assert np.all((before == 0) | (before == tree.branch_ids[written]))


def as_they_were(samples: list[Sample]) -> list[Any]:
    return [(s.ids.tolist(), list(range(len(s))), s.step_ids.tolist(), s.loss_mask.tolist()) for s in samples]


def test_typed_out() -> None:
    samples = [sample([Q, A], [X], 0), sample([Q, B, A], [Y], 1), sample([Q, B, C, A], [Z], 2)]
    [tree] = share_prefixes(samples, max_length=9)
    assert tree.ids.tolist() == [Q, A, X, B, A, Y, C, A, Z]
    assert tree.branch_ids is not None and tree.branch_ids.tolist() == [0, 1, 1, 0, 2, 2, 0, 0, 3]
    assert tree.positions is not None and tree.positions.tolist() == [0, 1, 2, 1, 2, 3, 2, 3, 4]
    assert tree.loss_mask.tolist() == [False, False, True, False, False, True, False, False, True]
    assert tree.step_ids.tolist() == [-1, -1, 0, -1, -1, 1, -1, -1, 2]
    np.testing.assert_allclose(tree.behaviour_logprobs, -0.1 * tree.ids * tree.loss_mask, rtol=1e-6)
    assert split(tree) == as_they_were(samples)
    assert_predicted(tree)


def test_samples_of_the_same_prompt_keep_its_end_which_predicts_what_was_written() -> None:
    samples = [sample([Q, A], [X], 0), sample([Q, A], [Y, Z], 1)]
    [tree] = share_prefixes(samples, max_length=9)
    assert tree.ids.tolist() == [Q, A, X, A, Y, Z]
    assert split(tree) == as_they_were(samples)
    assert_predicted(tree)


def test_what_cannot_share_opens_a_tree() -> None:
    samples = [sample([Q, A], [X], 0), sample([Q, B, A], [Y], 1), sample([Q, B, C, A], [Z], 2)]
    short = share_prefixes(samples, max_length=8)
    assert [len(tree) for tree in short] == [6, 5]
    assert [path for tree in short for path in split(tree)] == as_they_were(samples)
    warm = [samples[0], dataclasses.replace(samples[1], temperature=0.5), samples[2]]
    assert len(share_prefixes(warm, 99)) == 3
    back = [*samples, sample([Q, A], [X, Y], 3)]  # begins with less than the trunk so far
    assert [len(split(tree)) for tree in share_prefixes(back, 99)] == [3, 1]
    assert share_prefixes([], 9) == ()


GROWN = st.tuples(st.lists(st.integers(0, 3), max_size=4), st.integers(0, 3))  # tokens more, and tokens written


@given(st.lists(GROWN, min_size=1, max_size=5), st.data())
def test_every_sample_is_on_its_path(grown: list[tuple[list[int], int]], data: st.DataObject) -> None:
    """Prompts that grow, end alike or not, and are sometimes cut back; written parts may be empty."""
    history, samples = [Q], []
    for step, (more, num_written) in enumerate(grown):
        history = history[: data.draw(st.integers(1, len(history)))] if data.draw(st.booleans()) else history
        history = [*history, *more]
        samples.append(sample([*history, A], [X] * num_written, step))
    limit = data.draw(st.integers(max(map(len, samples)), 40))
    trees = share_prefixes(samples, limit)
    assert all(len(tree) <= limit for tree in trees)
    assert sum(map(len, trees)) <= sum(map(len, samples))
    for tree in trees:
        assert_predicted(tree)
    kept = [one for one, written in zip(as_they_were(samples), grown, strict=True) if written[1] > 0]
    assert [path for tree in trees for path in split(tree) if any(path[3])] == kept


def test_prompts_that_are_encoded_anew_still_share_a_tree(tmp_path: Path) -> None:
    """A prompt begins with the prompt before it but for its last tokens: `?` and what follows may be one token."""
    tokenizer = merging.tokenizer(tmp_path, "qwen2")
    codec, steps = Codec(tokenizer, make_protocol("steps"), passage_tokens=40), list[Step]()
    transcript = Transcript(codec, "Who wrote it?")
    for number in range(1, 4):
        steps.append(Step("I need the author.", query=f"{number}?", passages=(Passage("p", f"Passage {number}?"),)))
        transcript.write(codec.step_ids(steps[-1], number))
        transcript.add_passages(steps[-1].passages)
    samples = transcript.samples(temperature=1.0)
    for one, other in itertools.pairwise(samples):
        prompt = one.ids[: int(np.argmax(one.loss_mask))]
        before = prompt.tolist().index(tokenizer.token_id("<|im_end|>")) - 1
        assert other.ids[:before].tolist() == prompt[:before].tolist() and other.ids[before] != prompt[before]
    [tree] = share_prefixes(samples, max_length=1000)
    assert split(tree) == as_they_were(list(samples))


# ------------------------------------------------------------------------------------- gradients

VOCAB = 272
LENGTH = 640


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    """Of one to five steps in the published layout, in random words."""
    codec = Codec(tiny.tokenizer(tmp_path_factory.mktemp("tokenizer")), make_protocol("steps"), passage_tokens=40)
    rng, made = np.random.default_rng(0), []
    for number in range(5):
        transcript, steps = Transcript(codec, f"Question {number}?"), []
        for step in range(number + 1):
            ids = [*rng.integers(20, 260, 12).tolist(), codec.turn_end_id]
            transcript.write(ids, rng.uniform(-8, -4, len(ids)).astype(np.float32))
            transcript.add_passages([Passage("p", "".join(map(chr, rng.integers(97, 122, 60))))])
            steps.append(Step("", query=str(step)))
        samples = transcript.samples(temperature=0.7)
        made.append(Trajectory(Question(str(number), "q", ("a",)), tuple(steps), Status.NO_ANSWER, samples))
    return made


def in_trees(trajectories: list[Trajectory]) -> list[Trajectory]:
    return [dataclasses.replace(t, samples=share_prefixes(t.samples, LENGTH)) for t in trajectories]


def batch_of(trajectories: list[Trajectory]) -> TrainBatch:
    return packed(trajectories)[0]


def packed(trajectories: list[Trajectory]) -> tuple[TrainBatch, np.ndarray]:
    """The batch, and for each token of it a number that depends on the trajectory and the step that it is of."""
    samples = [sample for trajectory in trajectories for sample in trajectory.samples]
    [batch], starts = minibatches(samples, row_length=LENGTH, batch_rows=8, rng=np.random.default_rng(0))
    owners = [number for number, trajectory in enumerate(trajectories) for _ in trajectory.samples]
    numbers = np.zeros(batch.tokens.size, int)
    for sample, start, owner in zip(samples, starts, owners, strict=True):
        numbers[start : start + len(sample)] = 7 * sample.step_ids + 31 * owner
    return batch, numbers.reshape(batch.tokens.shape)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_same_gradient(one: Any, other: Any) -> None:
    one, other = flat(one), flat(other)
    assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
    assert np.linalg.norm(other) > 1e-3


@pytest.mark.slow
def test_the_cold_start_learns_the_same(trajectories: list[Trajectory]) -> None:
    graphdef, params = nnx.split(tiny.decoder(VOCAB))

    def learn(batch: TrainBatch) -> Any:
        rows = SFTBatch(batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids, batch.loss_mask)
        loss = lambda p: sft_loss(graphdef, p, rows, "none", ONE_CPU)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    trees, single = batch_of(in_trees(trajectories)), batch_of(trajectories)
    assert trees.branch_ids is not None and single.branch_ids is None
    num_tokens = [int((batch.segment_ids > 0).sum()) for batch in (trees, single)]
    assert num_tokens[0] < 0.6 * num_tokens[1]
    (loss, metrics), grads = learn(trees)
    (loss_of_single, metrics_of_single), grads_of_single = learn(single)
    np.testing.assert_allclose(loss, loss_of_single, rtol=1e-5)
    assert_same_gradient(grads, grads_of_single)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, metrics_of_single[name], rtol=1e-5, err_msg=name)


def test_rl_learns_the_same(trajectories: list[Trajectory]) -> None:
    """With a critic, KL and entropy, from advantages that differ from token to token."""
    policy = tiny.decoder(VOCAB)
    critic = new_critic(policy, "head")
    critic.head[...] = 0.1 * tiny.normal(5, *critic.head.shape)
    split_of = {"policy": nnx.split(policy), "critic": nnx.split(critic)}
    graphdefs, params = ({name: part[i] for name, part in split_of.items()} for i in (0, 1))
    config = RLConfig(critic=CriticConfig(kind="head", gae_lambda=0.9), kl=KLConfig(coef=0.05), entropy_coef=0.01)

    def learn(batch: TrainBatch, numbers: np.ndarray) -> Any:
        size = np.where(batch.loss_mask, np.sin(batch.tokens + numbers), 0)
        targets = Targets(*(np.float32(scale) * size.astype(np.float32) for scale in (1.0, 0.5, 0.2)))
        loss = lambda p: rl_loss(graphdefs, p, batch, targets, config, "none", ONE_CPU)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (loss, metrics), grads = learn(*packed(in_trees(trajectories)))
    (loss_of_single, metrics_of_single), grads_of_single = learn(*packed(trajectories))
    np.testing.assert_allclose(loss, loss_of_single, rtol=1e-5)
    assert_same_gradient(grads, grads_of_single)
    np.testing.assert_allclose(metrics["sampler_gap"], metrics_of_single["sampler_gap"], rtol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "blocks", pytest.param("splash", marks=pytest.mark.slow)])
def test_the_mask_of_attention(implementation: str) -> None:
    """Against all scores at once, for outputs and gradients; also across the borders of query chunks and of blocks."""
    L = 600 if implementation == "splash" else 300
    q, k, v = (tiny.normal(seed, 2, L, heads, 8) for seed, heads in enumerate((4, 2, 2)))
    segments = jnp.where(jnp.arange(L) < 220, 1, 2) * jnp.ones((2, 1), jnp.int32)
    branches = tiny.integers(3, 2, L, high=4)
    mask = (segments[:, :, None] == segments[:, None]) & (jnp.arange(L)[:, None] >= jnp.arange(L))
    mask &= (branches[:, None] == 0) | (branches[:, :, None] == branches[:, None])

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * 8**-0.5
        return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf)), v)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, segments, branches, implementation=implementation)

    results = []
    for function in (ours, plain):
        loss = lambda q, k, v, f=function: jnp.sum(jnp.sin(f(q, k, v)))  # noqa: E731
        results.append((jax.jit(function)(q, k, v), *jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)))
    for mine, want in zip(*results, strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-6 * float(jnp.abs(want).max()) + 1e-6)


def test_trees_and_others_are_not_mixed() -> None:
    tree, plain = share_prefixes([sample([Q], [X])], 9)[0], sample([Q], [X])
    with pytest.raises(ValueError, match="all sequences or none of them must have branch_ids"):
        pack([tree, plain], row_length=9, has_branches=True)
    samples = [SFTSample(s.ids, s.loss_mask, s.positions, s.branch_ids) for s in (tree, tree)]
    batch = next(SFTBatches(samples, row_length=6, batch_rows=2, epochs=1, seed=0))
    assert np.asarray(batch.branch_ids).tolist() == [[0, 1, 0, 1, 0, 0], [0] * 6]
    assert np.asarray(batch.positions).tolist() == [[0, 1, 0, 1, 0, 0], [0] * 6]
