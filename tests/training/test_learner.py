"""The training steps: one answer on every mesh, gradients where they belong, the sampler's own log-probabilities."""

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
from flax import nnx
from jax.sharding import AxisType, Mesh

from r3rag_jax.config import CriticConfig, KLConfig, MeshConfig, ModelConfig, RLConfig, RolloutConfig, SFTConfig
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.mesh import AXES, make_mesh
from r3rag_jax.parallel.shardings import device_put_batch, device_put_global, tree_shardings
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
from r3rag_jax.training import learner, optimizer
from r3rag_jax.training.batch import minibatches, pack, tabulate
from r3rag_jax.types import Passage, Question, Sample, SFTBatch, Status, Step, TrainBatch, Trajectory

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")

VOCAB = 272  # divides by the tensor axis, so that the embedding is really cut
MESHES = ((8, 1, 1), (2, 2, 2), (1, 4, 2))
Gradients = Callable[[Any, Any], tuple[tuple[Any, dict[str, Any]], Any]]
HEAD = CriticConfig(kind="head", lr=1e-3, gae_lambda=0.9)
RL = RLConfig(lr=1e-3, critic=HEAD, kl=KLConfig(coef=0.05), entropy_coef=0.01, warmup=0.0)


def one_device() -> Mesh:
    return jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 3)


def samples(count: int = 14) -> list[Sample]:
    """Trajectories of one to three steps: prompt, then written spans with passages in between."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        step_ids = [-1] * int(rng.integers(2, 6))
        for step in range(int(rng.integers(1, 4))):
            step_ids += [-1] * int(rng.integers(0, 4)) * (step > 0) + [step] * int(rng.integers(2, 6))
        ids, steps = rng.integers(0, VOCAB, len(step_ids)).astype(np.int32), np.asarray(step_ids, np.int32)
        logprobs = np.where(steps >= 0, -rng.uniform(1, 8, len(steps)), 0).astype(np.float32)
        made.append(Sample(ids, steps >= 0, logprobs, steps, float(rng.choice([0.0, 0.7, 1.0]))))
    return made


def rewards_of(made: list[Sample]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.uniform(-1, 2, sample.step_ids.max() + 1).astype(np.float32) for sample in made]


def rl_batch(row_length: int = 40, num_rows: int | None = 8) -> TrainBatch:
    made = samples()
    return pack(made, rewards_of(made), range(len(made)), row_length=row_length, num_rows=num_rows)


def sft_batch(**options: Any) -> SFTBatch:
    batch = rl_batch(**options)
    return SFTBatch(batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids, batch.loss_mask)


def targets_like(batch: TrainBatch) -> learner.Targets:
    rng = np.random.default_rng(2)
    return learner.Targets(*(rng.normal(size=batch.tokens.shape).astype(np.float32) for _ in range(3)))


def targets_of(
    mesh: Mesh, graphdefs: dict[str, Any], params: Any, reference: Any, batches: list[TrainBatch], config: RLConfig,
    groups: np.ndarray | None = None,
) -> tuple[list[learner.Targets], list[dict[str, Any]]]:  # fmt: skip
    """What an iteration makes of host batches: (targets, metrics of the scorer and the estimator)."""
    score = learner.make_scorer(mesh, graphdefs, graphdefs["policy"], ModelConfig(), config)
    scored = [score(params, reference, device_put_batch(mesh, batch)) for batch in batches]
    groups = np.arange(1 + max(batch.trajectory_ids.max() for batch in batches)) if groups is None else groups
    estimate = learner.make_estimator(mesh, config, num_steps=3)
    shape = batches[0].tokens.shape
    targets, stats = estimate([found for found, _ in scored], tabulate(batches, groups), config.kl.coef, shape)
    return targets, [metrics for _, metrics in scored] + [stats]


@functools.cache
def parts(critic: str = "head") -> tuple[dict[str, Any], dict[str, Any]]:
    """(graphdefs, params) of a policy and a critic whose head is not zero."""
    policy = tiny.decoder(VOCAB)
    value_model = learner.new_critic(policy, critic)
    value_model.head[...] = 0.1 * jax.random.normal(jax.random.key(5), value_model.head.shape)
    split = {"policy": nnx.split(policy), "critic": nnx.split(value_model)}
    return {name: graphdef for name, (graphdef, _) in split.items()}, {name: p for name, (_, p) in split.items()}


@functools.cache  # of every jitted function there is one, which is traced once for a shape and a mesh
def sft_gradients(remat: str, target: Target) -> Gradients:
    loss = functools.partial(learner.sft_loss, parts()[0]["policy"], remat=remat, target=target)
    return jax.jit(jax.value_and_grad(lambda p, b: loss(p, batch=b), has_aux=True))


@functools.cache
def rl_gradients(critic: str, config: RLConfig, target: Target) -> Gradients:
    loss = functools.partial(learner.rl_loss, parts(critic)[0], config=config, remat="none", target=target)
    return jax.jit(jax.value_and_grad(lambda p, bt: loss(p, batch=bt[0], targets=bt[1]), has_aux=True))


def sft_grads(mesh: Mesh, batch: SFTBatch, remat: str = "none") -> tuple[dict[str, Any], Any]:
    """(metrics, gradients) of the SFT loss, on the host."""
    return grads_on(mesh, sft_gradients(remat, Target.of(mesh)), parts()[1]["policy"], batch)


def rl_grads(mesh: Mesh, batch: TrainBatch, targets: learner.Targets | None = None, critic: str = "head",
             config: RLConfig = RL) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """(metrics, gradients) of the RL loss, on the host."""
    targets = targets_like(batch) if targets is None else targets
    return grads_on(mesh, rl_gradients(critic, config, Target.of(mesh)), parts(critic)[1], (batch, targets))


def grads_on(mesh: Mesh, gradients: Gradients, params: Any, batch: Any) -> tuple[dict[str, Any], Any]:
    params = device_put_global(params, tree_shardings(mesh, params, PARAM_AXES))
    (_, metrics), grads = gradients(params, device_put_batch(mesh, batch))
    return jax.device_get((metrics, grads))


@functools.cache
def on_one_device(phase: str) -> tuple[dict[str, Any], Any]:
    """What one device makes of the usual batch."""
    return sft_grads(one_device(), sft_batch()) if phase == "sft" else rl_grads(one_device(), rl_batch())


def assert_close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    """Every leaf within rtol of the largest size of its counterpart."""

    def one(path: Any, a: Any, b: Any) -> None:
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(one, got, want)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])


# ----------------------------------------------------------------------------- one answer on every mesh


@pytest.mark.parametrize("sizes", MESHES)
def test_sft_loss_and_gradients_on_a_mesh(sizes: tuple[int, int, int]) -> None:
    assert_close(sft_grads(make_mesh(tiny.mesh_config(*sizes)), sft_batch()), on_one_device("sft"))


@pytest.mark.parametrize("sizes", MESHES)
def test_rl_loss_and_gradients_on_a_mesh(sizes: tuple[int, int, int]) -> None:
    assert_close(rl_grads(make_mesh(tiny.mesh_config(*sizes)), rl_batch()), on_one_device("rl"))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["sft", "token", "sequence", "constant"])
def test_parts_add_up_to_the_batch(kind: str, sizes: tuple[int, int, int]) -> None:
    """Loss, metrics and gradients of micro-batches that hold unequal numbers of tokens, trajectories and gains."""
    mesh = one_device() if sizes == (1, 1, 1) else make_mesh(tiny.mesh_config(*sizes))
    target, (graphdefs, params) = Target.of(mesh), parts()
    params = device_put_global(params, tree_shardings(mesh, params, PARAM_AXES))
    if kind == "sft":

        def loss(params: Any, batch: SFTBatch, part: learner.Part) -> Any:
            return learner.sft_loss(graphdefs["policy"], params, batch, "none", part=part, target=target)

        params, batch = params["policy"], (sft_batch(),)
    else:
        rng, config = (
            np.random.default_rng(3),
            RL.replace(loss_aggregation=kind, kl=KLConfig(coef=0.05, placement="loss", estimator="k3")),
        )
        targets = targets_like(rl_batch())
        drawn = {
            name: rng.uniform(0.1, 1.0, targets.returns.shape).astype(np.float32) for name in ("shares", "weights")
        }
        targets = dataclasses.replace(
            targets, ref_logprobs=-8 * drawn["weights"], old_logprobs=-7 * drawn["shares"], **drawn
        )

        def loss(params: Any, batch: TrainBatch, targets: learner.Targets, part: learner.Part) -> Any:
            return learner.rl_loss(graphdefs, params, batch, targets, config, "none", part=part, target=target)

        batch = (rl_batch(), targets)

    def gradients(micro_tokens: int) -> tuple[int, Any]:
        num_parts = []

        def compute(params: Any, batch: Any) -> Any:
            cut = learner._parts(mesh, batch, micro_tokens)
            num_parts.append(cut[0])
            return learner._value_and_grad(loss, params, *cut, target)

        found = jax.device_get(jax.jit(compute)(params, device_put_batch(mesh, batch)))
        return num_parts[0], found

    one, whole = gradients(0)
    many, summed = gradients(40)
    assert (one, many) == (1, 8 if mesh.size == 1 else 2)  # rows of 40 tokens, 8 of them over 1 or 4 devices
    assert_close(summed, whole)


@pytest.mark.parametrize(
    ("micro_tokens", "num_parts"), [(0, 1), (1, 6), (79, 6), (80, 3), (119, 3), (120, 2), (10**6, 1)]
)
def test_parts_are_as_few_as_keep_to_the_bound(micro_tokens: int, num_parts: int) -> None:
    batch = jax.tree.map(lambda x: x[:6], sft_batch())
    cut, arrays = learner._parts(one_device(), (batch,), micro_tokens)
    assert cut == num_parts
    rows = arrays[0].tokens.reshape(6, 40)
    np.testing.assert_array_equal(rows, batch.tokens)


def two_sft_updates(mesh: Mesh) -> tuple[Any, Any]:
    graphdefs, params = parts()
    tx = optimizer.sft_optimizer(SFTConfig(lr=1e-3, warmup=0.0), 4)
    state = learner.init_state(mesh, params["policy"], tx)
    step = learner.make_sft_step(mesh, graphdefs["policy"], tx, ModelConfig(), state)
    logs = []
    for _ in range(2):
        state, metrics = step(state, device_put_batch(mesh, sft_batch()))
        logs.append(metrics)
    return state, logs


def two_rl_updates(mesh: Mesh) -> tuple[Any, Any]:
    graphdefs, params = parts()
    tx = optimizer.rl_optimizer(RL)
    state = learner.init_state(mesh, params, tx)
    step = learner.make_rl_step(mesh, graphdefs, tx, ModelConfig(), RL, state)
    batch = device_put_batch(mesh, rl_batch())
    [targets], logs = targets_of(mesh, graphdefs, state.params, params["policy"], [rl_batch()], RL)
    for _ in range(2):
        state, metrics = step(state, batch, targets, jnp.float32(1.0))
        logs.append(metrics)
    return state, logs


@pytest.mark.parametrize("updates", [two_sft_updates, two_rl_updates], ids=["sft", "rl"])
def test_updates_on_a_mesh(updates: Callable[[Mesh], tuple[Any, Any]]) -> None:
    """Whole updates: state laid out by the table, metrics and parameters those of one device."""
    want_state, want_logs = jax.device_get(updates(one_device()))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    state, logs = updates(mesh)
    assert jax.tree.map(lambda x: x.sharding, state) == tree_shardings(mesh, state, PARAM_AXES)
    assert int(state.step) == 2
    assert_close(jax.device_get(logs), want_logs, rtol=1e-4)
    # Adam divides by the gradient's size: where that is rounding, so is the update. All but a few agree.
    difference, moved = np.abs(flat(state.params) - flat(want_state.params)), 2e-3
    assert np.mean(difference > 1e-2 * moved) < 1e-3


# ------------------------------------------------------------------------- who gets a gradient, who none


def hidden_grads(monkeypatch: pytest.MonkeyPatch, loss: Callable[[Any], Any], shape: tuple[int, ...]) -> np.ndarray:
    """d loss / d (the hidden state that predicts token t), [B, L, D]."""
    previous = learner._previous

    def from_delta(delta: jax.Array) -> jax.Array:
        with monkeypatch.context() as patch:
            patch.setattr(learner, "_previous", lambda hidden: previous(hidden) + delta)
            return loss(None)[0]

    return np.asarray(jax.jit(jax.grad(from_delta))(jnp.zeros(shape, jnp.float32)))


@pytest.mark.parametrize("phase", ["sft", "rl"])
def test_only_the_policys_tokens_are_trained(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphdefs, params = parts()
    batch = rl_batch()

    def loss(_: Any) -> Any:
        if phase == "sft":
            return learner.sft_loss(graphdefs["policy"], params["policy"], sft_batch(), "none")
        return learner.rl_loss(graphdefs, params, batch, targets_like(batch), RL, "none")

    grads_BL = np.abs(hidden_grads(monkeypatch, loss, (*batch.tokens.shape, 32))).max(axis=-1)
    assert (grads_BL[~batch.loss_mask] == 0).all()  # prompts, passages, padding: exactly
    assert (grads_BL[batch.loss_mask] > 0).all()


def test_what_stands_at_masked_tokens_changes_nothing() -> None:
    batch = rl_batch()
    targets, mask = targets_like(batch), batch.loss_mask
    spoil = functools.partial(jax.tree.map, lambda x: np.where(mask, x, np.nan).astype(np.float32))
    spoilt = dataclasses.replace(batch, behaviour_logprobs=spoil(batch.behaviour_logprobs))
    assert_close(rl_grads(one_device(), spoilt, spoil(targets)), on_one_device("rl"), rtol=0)


def test_a_batch_without_policy_tokens_trains_nothing() -> None:
    batch = rl_batch()
    empty = dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    for metrics, grads in (
        sft_grads(one_device(), SFTBatch(empty.tokens, empty.positions, empty.segment_ids, None, empty.loss_mask)),
        rl_grads(one_device(), empty),
    ):
        assert metrics["loss"] == 0
        assert (flat(grads) == 0).all()


def test_packed_rows_are_separate_rows() -> None:
    made = samples()
    packed = rl_batch(num_rows=len(made))  # the same shape: the last rows are empty
    each = [pack([s], [r], [i], row_length=40) for i, (s, r) in enumerate(zip(made, rewards_of(made), strict=True))]
    separate = jax.tree.map(lambda *rows: np.concatenate(rows), *each)
    assert packed.tokens.shape == separate.tokens.shape
    assert packed.loss_mask.any(axis=1).sum() < separate.loss_mask.any(axis=1).sum() == len(made)
    mesh = one_device()
    sft_of = lambda b: SFTBatch(b.tokens, b.positions, b.segment_ids, None, b.loss_mask)  # noqa: E731
    assert_close(sft_grads(mesh, sft_of(packed)), sft_grads(mesh, sft_of(separate)))
    graphdefs, params = parts()
    results = []
    for batch in (packed, separate):
        [targets], logs = targets_of(mesh, graphdefs, params, params["policy"], [batch], RL)
        results.append((jax.device_get(logs), rl_grads(mesh, batch, targets)))
    assert_close(*results)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_and_not_gradients(remat: str) -> None:
    assert_close(sft_grads(one_device(), sft_batch(), remat), on_one_device("sft"))


# -------------------------------------------------------------------------- the sampler and the learner

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
JOBS = [
    RolloutRequest(QUESTION, sample, temperature, seed=3) for sample, temperature in enumerate((0.7, 1.0, 0.0, 1.0))
]
MAX_LENGTH = 512


@pytest.fixture(scope="module", params=["tags", "steps"])
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    tokenizer = tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Codec(tokenizer, make_protocol(request.param), passage_tokens=60)


def play(codec: Codec, jobs: list[RolloutRequest], truncation: Truncation = WHOLE) -> list[Trajectory]:
    """Trajectories of the tiny policy, sampled by the real engine."""
    graphdefs, params = parts()
    shape = {"slots": 4, "max_length": MAX_LENGTH}
    engine = Engine(graphdefs["policy"], tiny.decoder(VOCAB).config, one_device(), truncation=truncation, **shape)
    backend = EngineBackend(engine, engine.load(params["policy"]), codec.tokenizer, decode_chunk=32)
    config = RolloutConfig(max_length=MAX_LENGTH, max_new_tokens=110, max_steps=3)
    env_factory = search_env_factory(codec, config, top_k=1, max_passages=4)
    return rollout(backend, env_factory, tiny.DictRetriever(PASSAGES), jobs)


def force(monkeypatch: pytest.MonkeyPatch, codec: Codec, jobs: list[RolloutRequest]) -> None:
    """Make the engine sample the scripted steps, found by row key and position; all else stays as it is."""
    transcript, keys, table = Transcript(codec, QUESTION.question), [], []
    for number, (step, passage) in enumerate(zip(STEPS, [*PASSAGES, None], strict=True)):
        start, ids = len(transcript.context), codec.step_ids(step, number + 1)
        row = np.full(MAX_LENGTH, -1, np.int32)
        row[start : start + len(ids)] = ids
        keys += [job.key(number) for job in jobs]
        table += [row] * len(jobs)
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


def sampler_gap(
    trajectories: list[Trajectory],
    change: Callable[[TrainBatch], TrainBatch] = lambda b: b,
    truncation: Truncation = WHOLE,
) -> float:
    """Largest difference between recorded and recomputed log-probabilities, as the RL phase logs it."""
    graphdefs, params = parts()
    loss = jax.jit(functools.partial(learner.rl_loss, graphdefs, config=RL, remat="none", truncation=truncation))
    rewards = [np.zeros(len(t.steps), np.float32) for t in trajectories]
    options = {"row_length": MAX_LENGTH, "batch_rows": 4, "rng": np.random.default_rng(0)}
    batches = minibatches(trajectories, rewards, **options)
    logs = [loss(params, batch=change(batch), targets=targets_like(batch))[1] for batch in batches]
    return max(float(metrics["sampler_gap"]) for metrics in logs)


def test_recomputed_logprobs_are_the_samplers(codec: Codec) -> None:
    """Whatever a random policy writes, at three temperatures in one batch."""
    trajectories = play(codec, JOBS)
    assert sum(sample.loss_mask.sum() for t in trajectories for sample in t.samples) > 100
    assert sampler_gap(trajectories) < 1e-4
    cold = lambda b: dataclasses.replace(b, temperature=np.ones_like(b.temperature))  # noqa: E731
    assert sampler_gap(trajectories, cold) > 0.1  # the bug of sampling at T and training at 1 would show


def test_they_are_also_truncated(codec: Codec) -> None:
    how = Truncation(min_p=0.02, top_k=40, top_p=0.8)
    trajectories = play(codec, JOBS, how)
    assert sum(sample.loss_mask.sum() for t in trajectories for sample in t.samples) > 100
    assert sampler_gap(trajectories, truncation=how) < 1e-4
    assert sampler_gap(trajectories) > 0.1


def test_they_are_also_across_retrievals(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole well-formed trajectories: passages spliced in, the cache kept, and the same ids as the cold start's."""
    force(monkeypatch, codec, JOBS)
    trajectories = play(codec, JOBS)
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


# ------------------------------------------------------------------------ state, critics, credit, targets


def test_the_state_is_donated_and_its_source_is_not() -> None:
    mesh = one_device()
    graphdefs, params = parts()
    tx = optimizer.sft_optimizer(SFTConfig(), 4)
    state = learner.init_state(mesh, params["policy"], tx)
    step = learner.make_sft_step(mesh, graphdefs["policy"], tx, ModelConfig(), state)
    step(state, device_put_batch(mesh, sft_batch()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params["policy"]))


def test_a_new_critic_values_everything_at_zero_and_owns_its_model() -> None:
    policy, batch = tiny.decoder(VOCAB), rl_batch()
    for kind in ("head", "separate"):
        critic = learner.new_critic(policy, kind)
        assert (critic.decoder is None) is (kind == "head")
        values = critic(batch, jnp.ones((*batch.tokens.shape, 32)), "none")
        assert values.shape == batch.tokens.shape and not values.any()
    assert critic.decoder is not policy
    np.testing.assert_array_equal(critic.decoder.embed[...], policy.embed[...])


@pytest.mark.parametrize(("critic", "is_shared"), [("head", True), ("separate", False)])
def test_the_value_loss_reaches_the_policy_only_through_a_shared_trunk(critic: str, is_shared: bool) -> None:
    with_value = rl_grads(one_device(), rl_batch(), critic=critic)[1]
    without = rl_grads(one_device(), rl_batch(), critic=critic, config=RL.replace(critic=HEAD.replace(value_coef=0.0)))[
        1
    ]
    assert np.array_equal(flat(with_value["policy"]), flat(without["policy"])) is not is_shared
    assert (flat(without["critic"]) == 0).all()
    assert np.abs(flat(with_value["critic"])).max() > 0


def test_without_a_critic_the_advantages_are_returns_and_the_loss_is_the_policys() -> None:
    graphdefs, params = ({"policy": part["policy"]} for part in parts())
    config = RLConfig(algorithm="rloo", kl=KLConfig(coef=0.0), entropy_coef=0.01, whiten_advantages=False)
    sample, rewards = two_steps()
    batch = pack([sample], [rewards], [0], row_length=6)
    [targets], [_, stats] = targets_of(one_device(), graphdefs, params, params["policy"], [batch], config)
    np.testing.assert_allclose(targets.advantages, [[0, 2.5, 2.5, 0, 2, 2]], atol=1e-6)  # no other sample: no baseline
    assert targets.returns is None and targets.old_values is None
    assert stats == {}  # nothing is explained where nothing explains
    loss, metrics = learner.rl_loss(graphdefs, params, batch, targets, config, "none")
    assert "value_loss" not in metrics
    assert float(loss) == pytest.approx(
        float(metrics["policy_loss"] - config.entropy_coef * metrics["entropy"]), rel=1e-6
    )
    tx = optimizer.rl_optimizer(config)
    state = learner.init_state(one_device(), params, tx)
    step = learner.make_rl_step(one_device(), graphdefs, tx, ModelConfig(), config, state)
    moved = step(
        state, device_put_batch(one_device(), batch), device_put_batch(one_device(), targets), jnp.float32(1.0)
    )[0]
    assert set(moved.params) == {"policy"}
    assert not np.array_equal(flat(moved.params), flat(params))


def test_policy_and_critic_have_rates_of_their_own() -> None:
    config, mesh = RL.replace(critic=HEAD.replace(lr=0.0)), one_device()
    graphdefs, params = parts()
    tx = optimizer.rl_optimizer(config)
    step = learner.make_rl_step(mesh, graphdefs, tx, ModelConfig(), config, learner.init_state(mesh, params, tx))
    batch = device_put_batch(mesh, rl_batch())
    moved, still = (
        step(
            learner.init_state(mesh, params, tx),
            batch,
            device_put_batch(mesh, targets_like(rl_batch())),
            jnp.float32(scale),
        )[0]
        for scale in (1.0, 0.0)
    )
    assert np.array_equal(flat(moved.params["critic"]), flat(params["critic"]))
    assert np.abs(flat(moved.params["policy"]) - flat(params["policy"])).max() == pytest.approx(1e-3, rel=1e-2)
    assert np.array_equal(flat(still.params), flat(params))


def two_steps() -> tuple[Sample, np.ndarray]:
    step_ids = np.asarray([-1, 0, 0, -1, 1, 1], np.int32)
    logprobs = np.where(step_ids >= 0, -2.0, 0).astype(np.float32)
    return Sample(np.arange(6, dtype=np.int32), step_ids >= 0, logprobs, step_ids), np.asarray([0.5, 2.0], np.float32)


def per_step(sample: Sample) -> list[Sample]:
    """The same trajectory in the protocol `steps`."""
    first = Sample(sample.ids[:3], sample.loss_mask[:3], sample.behaviour_logprobs[:3], sample.step_ids[:3])
    later = np.where(sample.step_ids == 1, 1, -1).astype(np.int32)
    return [first, Sample(sample.ids, later == 1, np.where(later == 1, -2.0, 0).astype(np.float32), later)]


@pytest.mark.parametrize(("step_discount", "first"), [(1.0, 2.5), (0.5, 1.5), (0.0, 0.5)])
@pytest.mark.parametrize("protocol", ["tags", "steps"])
def test_credit_flows_along_a_trajectory_in_both_protocols(protocol: str, step_discount: float, first: float) -> None:
    """Also where its steps are samples of their own, in rows or batches of their own."""
    sample, rewards = two_steps()
    graphdefs, params = parts()
    blind = {"policy": params["policy"], "critic": jax.tree.map(jnp.zeros_like, params["critic"])}
    config = RLConfig(
        critic=CriticConfig(kind="head"), kl=KLConfig(coef=0.0), step_discount=step_discount, whiten_advantages=False
    )
    if protocol == "tags":
        batches, want = [pack([sample], [rewards], [0], row_length=6)], [[[0, first, first, 0, 2, 2]]]
    else:
        batches = [pack([s], [rewards], [0], row_length=6) for s in per_step(sample)]
        want = [[[0, first, first, 0, 0, 0]], [[0, 0, 0, 0, 2, 2]]]
    targets, _ = targets_of(one_device(), graphdefs, blind, params["policy"], batches, config)
    for found, numbers in zip(targets, want, strict=True):
        np.testing.assert_allclose(found.returns, numbers, atol=1e-6)
        np.testing.assert_allclose(found.advantages, numbers, atol=1e-6)
        assert not np.asarray(found.old_values).any()


def changed_policy(params: Any) -> tuple[Any, np.ndarray]:
    """A reference policy, and its log-probabilities of the policy tokens 1, 2, 4, 5 of `two_steps`."""
    sample, _ = two_steps()
    reference = jax.tree.map(lambda x: 0.9 * x, params["policy"])
    policy = nnx.merge(parts()[0]["policy"], reference)
    positions = np.arange(6, dtype=np.int32)[None]
    logits = policy.logits(policy(sample.ids[None], positions, np.ones_like(positions)))
    return reference, np.asarray(jax.nn.log_softmax(logits)[0, np.arange(5), sample.ids[1:]])[[0, 1, 3, 4]]


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_the_kl_penalty_sits_on_every_token(estimator: str) -> None:
    """return of the last token = its reward - kl * (behaviour - reference log-probability)."""
    sample, rewards = two_steps()
    batch = pack([sample], [rewards], [0], row_length=6)
    graphdefs, params = parts()
    reference, logprobs = changed_policy(params)
    config = RLConfig(
        critic=CriticConfig(kind="head"), kl=KLConfig(coef=0.1, estimator=estimator), whiten_advantages=False
    )
    blind = {"policy": params["policy"], "critic": jax.tree.map(jnp.zeros_like, params["critic"])}
    [targets], [metrics, _] = targets_of(one_device(), graphdefs, blind, reference, [batch], config)
    difference = -2.0 - logprobs
    kl = difference if estimator == "k1" else difference**2 / 2
    np.testing.assert_allclose(targets.returns[0, 5], 2.0 - 0.1 * kl[3], rtol=1e-5)
    np.testing.assert_allclose(targets.returns[0, 1], 2.5 - 0.1 * kl.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], difference.mean(), rtol=1e-5)
    assert targets.ref_logprobs is None


def test_a_kl_in_the_loss_leaves_the_rewards_alone_and_pulls_the_policy() -> None:
    sample, rewards = two_steps()
    batch = pack([sample], [rewards], [0], row_length=6)
    graphdefs, params = parts()
    reference, logprobs = changed_policy(params)
    config = RLConfig(
        algorithm="rloo", kl=KLConfig(coef=0.1, placement="loss", estimator="k3"), whiten_advantages=False
    )
    graphdefs, params = {"policy": graphdefs["policy"]}, {"policy": params["policy"]}
    [targets], [metrics, _] = targets_of(one_device(), graphdefs, params, reference, [batch], config)
    np.testing.assert_allclose(targets.advantages, [[0, 2.5, 2.5, 0, 2, 2]], atol=1e-6)
    np.testing.assert_allclose(np.asarray(targets.ref_logprobs)[0, [1, 2, 4, 5]], logprobs, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], np.mean(-2.0 - logprobs), rtol=1e-5)

    def loss(params: Any, kl: float | None = None) -> Any:
        return learner.rl_loss(graphdefs, params, batch, targets, config, "none", kl=kl)

    found, metrics = loss(params)
    np.testing.assert_allclose(found, metrics["policy_loss"] + 0.1 * metrics["kl_loss"], rtol=1e-6)
    np.testing.assert_allclose(loss(params, 2.0)[0], metrics["policy_loss"] + 2 * metrics["kl_loss"], rtol=1e-6)
    grads = {kl: flat(jax.grad(lambda p, kl=kl: loss(p, kl)[0])(params)) for kl in (0.0, 1.0, 3.0)}
    assert np.abs(grads[1.0] - grads[0.0]).max() > 1e-4
    np.testing.assert_allclose(grads[3.0] - grads[0.0], 3 * (grads[1.0] - grads[0.0]), atol=1e-5)
    # at the reference nothing pulls
    at_home = {kl: flat(jax.grad(lambda p, kl=kl: loss(p, kl)[0])({"policy": reference})) for kl in (0.0, 3.0)}
    np.testing.assert_allclose(at_home[3.0], at_home[0.0], atol=1e-5)


def test_truncated_weights_take_the_ratio_against_the_policy_before_the_update() -> None:
    """The sampler's log-probabilities are of another policy: whatever it is, the first ratio is 1 and nothing clips."""
    made = samples()
    batch = rl_batch()
    graphdefs, params = parts()
    config = RL.replace(max_importance_weight=2.0, kl=KLConfig(coef=0.0))
    [targets], [metrics, _] = targets_of(one_device(), graphdefs, params, params["policy"], [batch], config)
    ratio = np.exp(np.asarray(targets.old_logprobs) - batch.behaviour_logprobs)[batch.loss_mask]
    np.testing.assert_allclose(np.asarray(targets.weights)[batch.loss_mask], np.minimum(ratio, 2.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["truncated_fraction"], np.mean(ratio > 2), rtol=1e-5)
    assert 0.1 < metrics["truncated_fraction"] < 0.9 and len(made) > 1
    metrics, _ = rl_grads(one_device(), batch, targets, config=config)
    assert metrics["clip_fraction"] == 0 and abs(metrics["approx_kl"]) < 1e-8
    assert metrics["sampler_gap"] > 1
    np.testing.assert_allclose(
        metrics["policy_loss"], -np.mean(np.minimum(ratio, 2.0) * np.asarray(targets.advantages)[batch.loss_mask]),
        rtol=1e-4,
    )  # fmt: skip
    plain, _ = rl_grads(one_device(), batch, dataclasses.replace(targets, old_logprobs=None, weights=None))
    assert plain["clip_fraction"] > 0.5


def test_every_trajectory_counts_alike_in_a_sequence_mean_whatever_batches_its_steps_are_in() -> None:
    sample, rewards = two_steps()
    batches = [pack([s], [rewards], [0], row_length=6) for s in per_step(sample)]
    graphdefs, params = ({"policy": part["policy"]} for part in parts())
    config = RLConfig(algorithm="reinforce++", kl=KLConfig(coef=0.0), loss_aggregation="sequence")
    targets, _ = targets_of(one_device(), graphdefs, params, params["policy"], batches, config)
    np.testing.assert_allclose(targets[0].shares, [[0, 0.25, 0.25, 0, 0, 0]])
    np.testing.assert_allclose(targets[1].shares, [[0, 0, 0, 0, 0.25, 0.25]])


def test_a_critic_is_told_how_much_it_explains() -> None:
    sample, rewards = two_steps()
    batch = pack([sample], [rewards], [0], row_length=6)
    config = RLConfig(critic=CriticConfig(kind="head"), kl=KLConfig(coef=0.0))
    estimate = learner.make_estimator(one_device(), config, num_steps=2)
    explained = []
    for values in ([0, 0, 0, 0, 0, 0], [0, 2.5, 2.5, 0, 2, 2]):
        scored = [learner.Scored(values=jnp.asarray([values], jnp.float32))]
        _, metrics = estimate(scored, tabulate([batch], np.zeros(1, int)), 0.0, (1, 6))
        explained.append(float(metrics["explained_variance"]))
    np.testing.assert_allclose(explained, [0, 1], atol=1e-6)
    np.testing.assert_allclose(metrics["value"], 2.25)
