"""Products and their backward passes against autodiff's of plain ones."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from r3rag_jax.models.decoder import rms_norm
from r3rag_jax.models.matmul import adapted_matmul, matmul, transpose_copy
from r3rag_jax.parallel.target import ONE_CPU, Target
from r3rag_jax.sampler.ops import SamplerOps

BOUNDS = {"float32": 2e-6, "bfloat16": 1e-2}


def draw(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    return tiny.normal(seed, *shape, dtype=dtype)


def assert_close(found: Any, expected: Any, bound: float) -> None:
    """By the Euclidean norm of the difference, relative to the norm."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


def values_and_gradients(function: Any, *args: jax.Array) -> tuple[jax.Array, ...]:
    weights = draw(*jax.eval_shape(function, *args).shape, seed=9)

    def total(*args: jax.Array) -> jax.Array:
        return jnp.sum(weights * function(*args).astype(jnp.float32))

    return function(*args), *jax.jit(jax.grad(total, tuple(range(len(args)))))(*args)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("widths", [(16, 24), (24, 16)])
def test_matmul(widths: tuple[int, int], dtype: str, platform: str) -> None:
    ours = functools.partial(matmul, target=Target(platform))
    x, w = draw(2, 5, widths[0], dtype=dtype), draw(*widths, dtype=dtype, seed=1)
    plain = lambda x, w: jnp.matmul(x.astype("float32"), w.astype("float32")).astype(dtype)  # noqa: E731
    for found, expected in zip(values_and_gradients(ours, x, w), values_and_gradients(plain, x, w), strict=True):
        assert_close(found, expected, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
def test_adapted_matmul(dtype: str) -> None:
    args = [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(2, 5, 16), (16, 24), (16, 4), (4, 24)])]

    def plain(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        x, w, a, b = (y.astype("float32") for y in (x, w, a, b))
        return (x @ (w + a @ b)).astype(dtype)

    both = (
        values_and_gradients(functools.partial(adapted_matmul, target=ONE_CPU), *args),
        values_and_gradients(plain, *args),
    )
    for found, expected in zip(*both, strict=True):
        assert_close(found, expected, BOUNDS[dtype])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (3, 5), (2, 20)])
def test_products_of_few_rows_whichever_factor_comes_first(shape: tuple[int, ...], dtype: str, platform: str) -> None:
    x, w = draw(*shape, 16, dtype=dtype), draw(24, 16, dtype=dtype, seed=1)
    expected = x.astype("float32") @ w.astype("float32").T
    assert_close(jax.jit(SamplerOps(Target(platform)).multiply)(x, w), expected, 2e-6)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_transposed_copy_is_differentiable(dtype: str) -> None:
    x = draw(3, 4, 5, dtype=dtype)
    np.testing.assert_array_equal(transpose_copy(x, ONE_CPU).astype("float32"), jnp.swapaxes(x, 1, 2).astype("float32"))
    weights = draw(3, 5, 4, dtype=dtype, seed=1)
    found = jax.jit(jax.grad(lambda x: jnp.sum((transpose_copy(x, ONE_CPU) * weights).astype("float32"))))(x)
    np.testing.assert_array_equal(found.astype("float32"), jnp.swapaxes(weights, 1, 2).astype("float32"))


def test_a_transposed_bfloat16_factor_is_copied_on_a_cpu() -> None:
    """If XLA read the old layout, it would widen both factors; such a product has a float32 copy of each."""
    x, w = draw(256, 512, dtype="bfloat16"), draw(256, 512, dtype="bfloat16")

    def temporaries(turn: Any) -> int:
        product = jax.jit(lambda x, w: jnp.matmul(x, turn(w), preferred_element_type=jnp.float32))
        return int(product.lower(x, w).compile().memory_analysis().temp_size_in_bytes)

    assert temporaries(functools.partial(transpose_copy, target=ONE_CPU)) < temporaries(lambda w: w.T)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(2, 5, 16), (2, 5, 3, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: str) -> None:
    x, scale = draw(*shape, dtype=dtype), 1.0 + 0.3 * draw(16, seed=1)

    def plain(x: jax.Array, scale: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        return (y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5) * scale).astype(dtype)

    ours = values_and_gradients(lambda x, scale: rms_norm(x, scale, 1e-5, ONE_CPU), x, scale)
    for found, expected in zip(ours, values_and_gradients(plain, x, scale), strict=True):
        assert_close(found, expected, BOUNDS[dtype])
