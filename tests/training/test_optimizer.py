"""The optimizer against optax's own, and what a step that is not finite leaves as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r3rag_jax.config import CriticConfig, RLConfig, SFTConfig
from r3rag_jax.training.optimizer import adamw, rl_optimizer, schedule, sft_optimizer

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.asarray([0.5, -2.0])}


def grads(number: int) -> Any:
    rng = np.random.default_rng(number)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), PARAMS)


def run(tx: optax.GradientTransformationExtraArgs, finite: Callable[[int], bool] = lambda _: True, **extra: Any) -> Any:
    """(parameters, state) behind ten updates; `extra` is what this optimizer is told besides `is_finite`."""
    params, state = PARAMS, tx.init(PARAMS)
    for number in range(10):
        told = {"is_finite": jnp.asarray(finite(number))}
        updates, state = tx.update(grads(number), state, params, **told)
        if finite(number):
            params = optax.apply_updates(params, updates)
    return params, state


def assert_same(found: Any, expected: Any, rtol: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), found, expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_optax_s(weight_decay: float) -> None:
    rates = lambda count: 0.1 / (1.0 + count)  # noqa: E731
    ours = adamw(rates, b1=0.8, b2=0.95, eps=1e-3, weight_decay=weight_decay)
    theirs = optax.adamw(lambda count: rates(count + 1), 0.8, 0.95, 1e-3, weight_decay=weight_decay)
    assert_same(run(ours)[0], run(optax.with_extra_args_support(theirs))[0])


def test_both_phases_clip_the_gradient_by_its_norm() -> None:
    clipped = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(1e-2, 0.9, 0.95, 1e-8))
    both = rl_optimizer(RLConfig(lr=1e-2, critic=CriticConfig(lr=0.0), max_grad_norm=0.3, adam_eps=1e-8))
    expected, _ = clipped.update(grads(0), clipped.init(PARAMS), PARAMS)
    twice = {"policy": PARAMS, "critic": PARAMS}
    found, _ = both.update(
        {"policy": grads(0), "critic": grads(0)}, both.init(twice), twice, is_finite=jnp.asarray(True)
    )
    assert_same(found["policy"], expected, 1e-5)
    assert all((x == 0).all() for x in jax.tree.leaves(found["critic"]))
    config = SFTConfig(lr=1e-2, max_grad_norm=0.3, warmup=0.5, weight_decay=0.0)
    sft, reference = sft_optimizer(config, 9), optax.chain(
        optax.clip_by_global_norm(0.3), optax.adam(lambda count: 1e-2 * schedule((count + 1) / 10, 0.5, 0.0))
    )  # fmt: skip
    assert_same(run(sft)[0], run(optax.with_extra_args_support(reference))[0], 1e-5)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was() -> None:
    tx = adamw(lambda _: 0.1)
    state = run(tx)[1]
    bad = jax.tree.map(lambda x: x * jnp.nan, grads(0))
    _, after = jax.jit(tx.update)(bad, state, PARAMS, is_finite=jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    _, skipped = run(tx, finite=lambda number: number != 3)
    assert int(skipped.count) == 9


def test_the_first_moment_may_be_narrow() -> None:
    wide, narrow = adamw(lambda _: 0.01), adamw(lambda _: 0.01, moment_dtype=jnp.bfloat16)
    (expected, _), (found, state) = run(wide), run(narrow)
    assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype("float32")}
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, PARAMS)
    off = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, found)
    assert all(0 < o < 0.02 * m for o, m in zip(jax.tree.leaves(off), jax.tree.leaves(moved), strict=True))


def test_new_moments_take_the_place_of_the_old() -> None:
    params = {"w": jnp.ones((512, 512))}
    size = params["w"].nbytes

    def temporaries(tx: Any, **told: Any) -> int:
        def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params, **told)
            return state, optax.apply_updates(params, updates)  # in the order of what is donated

        compiled = jax.jit(update, donate_argnums=(1, 2)).lower(params, tx.init(params), params).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    assert temporaries(adamw(lambda _: 0.1), is_finite=jnp.asarray(True)) < size / 10


def test_the_schedule_rises_and_falls() -> None:
    at = jnp.asarray([0.0, 0.1, 0.2, 0.6, 1.0])  # warm-up 0.2: half way down at 0.6
    np.testing.assert_allclose(schedule(at, 0.2, 0.1), [0.0, 0.5, 1.0, 0.55, 0.1], rtol=1e-6)
    np.testing.assert_allclose(schedule(at, 0.0, 0.0), 0.5 * (1 + np.cos(np.pi * at)), atol=1e-6)
