"""The sampler's own kernels against XLA's operations, which do the same where there is no compiler."""

from __future__ import annotations

import dataclasses
import platform as host
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from r3rag_jax.config import MeshConfig
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.parallel.mesh import make_mesh, make_sampler_mesh
from r3rag_jax.parallel.target import ONE_CPU, Target
from r3rag_jax.sampler.cache.cpu_kernels import KernelLayerCache
from r3rag_jax.sampler.cache.kv_cache import make_layer_cache
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.kernels.cpu import build
from r3rag_jax.sampler.kernels.cpu.kernels import CPUKernels, are_missing, load_kernels
from r3rag_jax.sampler.ops import SamplerOps
from r3rag_jax.types import Context

CONFIG = dataclasses.replace(tiny.decoder().config, head_dim=16, num_heads=6, num_kv_heads=2, hidden_size=64)
needs_compiler = pytest.mark.skipif(
    build.find_compiler() is None, reason=f"needs a C++ compiler: {', '.join(build.COMPILERS)} or $CXX"
)
# Jitted: an eager call compiles every operation by itself, which takes longer.
attend = jax.jit(lambda cache, *args: cache.attend(*args))
write = jax.jit(lambda cache, *args: cache.write(*args))
multiply = jax.jit(lambda ops, x, w: ops.multiply(x, w), static_argnums=0)
PRECISION = {jnp.float32: 2e-5, jnp.bfloat16: 2.0**-8}  # of a result, relative: its rounding or that of sums


def ops() -> SamplerOps:
    """With the kernels of the compiler that $CXX names at this moment."""
    return SamplerOps(ONE_CPU, load_kernels(ONE_CPU))


@pytest.fixture
def unknown() -> Iterator[None]:
    """Whether there are kernels is not known, before and after."""
    build.build_name.cache_clear()
    yield
    build.build_name.cache_clear()


def exact_attention(k: Any, v: Any, q: Any, positions: Any, rows: Any) -> np.ndarray:
    """In float64, a query at a time; k and v [rows, S, K, H]."""
    k, v, q = (np.asarray(x, np.float64) for x in (k, v, q))
    out = np.empty_like(q)
    for b, c, n in np.ndindex(q.shape[:3]):
        seen, head = slice(positions[b, c] + 1), n * k.shape[2] // q.shape[2]
        scores = k[rows[b], seen, head] @ q[b, c, n] / q.shape[3] ** 0.5
        weights = np.exp(scores - scores.max())
        out[b, c, n] = weights @ v[rows[b], seen, head] / weights.sum()
    return out


@needs_compiler
@pytest.mark.parametrize("held", PRECISION)
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("H", [16, 48])
@pytest.mark.parametrize(("N", "K"), [(6, 2), (4, 4), (7, 1)])
@pytest.mark.parametrize(("C", "last"), [(1, (0, 31, 319)), (5, (127, 128, 200)), (40, (39, 40, 319))])
def test_attention(dtype: Any, held: Any, H: int, N: int, K: int, C: int, last: tuple[int, ...]) -> None:
    """Of rows of every length, in an order of their own, whatever lies behind; more queries than a task has.

    The sums are float32, whatever the cache and the queries are.
    """
    S, config = 320, dataclasses.replace(CONFIG, head_dim=H, num_heads=N, num_kv_heads=K)
    k, v = (jnp.asarray(3 * np.asarray(tiny.normal(seed, 4, S, K, H)), held) for seed in (1, 2))
    cache = write(make_layer_cache(config, 4, S, held, ops()), k, v, np.tile(np.arange(S), (4, 1)))
    q = tiny.normal(3, 3, C, N, H, dtype=dtype)
    positions, rows = np.maximum(np.array(last)[:, None] - np.arange(C)[::-1], 0), np.array([3, 0, 1])
    assert isinstance(cache, KernelLayerCache)
    found = attend(cache, q, positions, rows)
    assert found.dtype == dtype
    expected = exact_attention(k, v, q, positions, rows)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=PRECISION[dtype], atol=2e-5)


@needs_compiler
def test_attention_of_large_scores_and_of_rows_that_there_are_not() -> None:
    """A weight too small for float32 is nothing; a row beyond the last one is zeros, and harms none."""
    config = dataclasses.replace(CONFIG, num_heads=2, num_kv_heads=2)
    k = jnp.zeros((2, 64, 2, 16)).at[:, 40].set(100.0)
    v = jnp.broadcast_to(jnp.arange(64.0)[:, None, None], (2, 64, 2, 16))
    cache = make_layer_cache(config, 2, 64, jnp.float32, ops()).write(k, v, jnp.tile(jnp.arange(64), (2, 1)))
    q = jnp.stack([jnp.full((2, 16), 50.0), jnp.full((2, 16), -50.0), jnp.zeros((2, 16))])[None]
    found = cache.attend(jnp.tile(q, (2, 1, 1, 1)), jnp.full((2, 3), 63), jnp.array([1, 7]))
    others = (63 * 64 / 2 - 40) / 63
    np.testing.assert_allclose(found[0, :, 0, 0], [40.0, others, 63 / 2], rtol=1e-5)
    np.testing.assert_array_equal(found[1], 0)


@needs_compiler
@pytest.mark.parametrize("dtype", PRECISION)
def test_writing_drops_what_has_no_place_and_needs_no_copy(dtype: Any) -> None:
    """Positions and rows that there are not; the cache's memory is the same before and after, if it is donated."""
    S, K, H = 64, CONFIG.num_kv_heads, CONFIG.head_dim
    cache = make_layer_cache(CONFIG, 3, S, dtype, ops())
    cache = dataclasses.replace(cache, k=cache.k + 7, v=cache.v + 7)
    new = jnp.arange(1.0, 3 * 2 * K * H + 1).reshape(3, 2, K, H).astype(dtype)
    positions, rows = jnp.array([[31, 32], [63, 64], [5, 6]]), jnp.array([2, 0, 3])
    donating_write = jax.jit(lambda cache, *args: cache.write(*args), donate_argnums=0)
    held = cache.k.unsafe_buffer_pointer(), cache.v.unsafe_buffer_pointer()
    cache = donating_write(cache, new, -new, positions, rows)
    assert (cache.k.unsafe_buffer_pointer(), cache.v.unsafe_buffer_pointer()) == held
    k = jnp.moveaxis(cache.k, 3, 4).reshape(3, K, S, H)
    for found, written in ((k, new), (cache.v, -new)):
        expected = np.full((3, K, S, H), 7, np.float32)
        expected[2, :, 31], expected[2, :, 32], expected[0, :, 63] = written[0, 0], written[0, 1], written[1, 0]
        np.testing.assert_array_equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 9, 16, 33, 50, 256])
@pytest.mark.parametrize(("width", "outs"), [(32, 1), (64, 49), (1536, 70)])
def test_products(dtype: Any, num_rows: int, width: int, outs: int) -> None:
    """Whole tiles and rests of them; a bfloat16 product is exact, its sum is float32."""
    x, w = tiny.normal(0, num_rows, width, dtype=dtype), tiny.normal(1, outs, width, dtype=dtype)
    assert ops().kernels.can_multiply(x, w)
    found, exact = multiply(ops(), x, w), np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * width**0.5)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((2, 33, "float32"), (4, 33, "float32")),
        ((257, 32, "float32"), (4, 32, "float32")),
        ((2, 32, "bfloat16"), (4, 32, "float32")),
        ((2, 32, "float16"), (4, 32, "float16")),
    ],
)
def test_what_they_do_not_take(x: tuple[Any, ...], w: tuple[Any, ...]) -> None:
    x, w = (jnp.ones(shape[:2], shape[2]) for shape in (x, w))
    kernels = CPUKernels("any")
    assert not kernels.can_multiply(x, w)
    np.testing.assert_array_equal(SamplerOps(ONE_CPU, kernels).multiply(x, w), x.shape[1])
    for head_dim, dtype in ((12, jnp.float32), (16, jnp.int8)):
        assert not kernels.can_attend(head_dim, dtype)


@needs_compiler
def test_they_are_for_one_device() -> None:
    mesh = make_mesh(MeshConfig())
    one = make_sampler_mesh(MeshConfig(sampler_devices=1), mesh)
    assert [load_kernels(Target.of(devices)) is not None for devices in (mesh, one)] == [False, True]
    assert load_kernels(Target("gpu")) is None


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_the_engine_writes_the_same_with_and_without(dtype: Any) -> None:
    """Prefilled in chunks, grown, some rows alone; one device, one model, several lengths and temperatures."""
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=dtype))
    mesh = make_sampler_mesh(MeshConfig(sampler_devices=1), make_mesh(MeshConfig()))
    ids = np.random.default_rng(0).integers(20, 260, (8, 400)).tolist()

    def sampled(ops: SamplerOps) -> np.ndarray:
        """[contexts, 2, 20]."""
        engine = Engine(graphdef, CONFIG, mesh, slots=8, max_length=500, dtype=dtype, ops=ops)
        policy, found = engine.load(params), []
        for length, num in ((100, 4), (330, 8), (200, 1)):
            contexts = {
                row: Context(ids[row][: length - 9 * row], 20, row / 8, np.array([row, 1], np.uint32))
                for row in range(num)
            }
            engine.set_context(policy, contexts)
            engine.decode(policy, 20, leave_at=8)
            for row, context in contexts.items():
                end = len(context.ids)
                found.append([x[row, end : end + 20].copy() for x in (engine.rows.tokens, engine.rows.logprobs)])
        return np.array(found)

    tokens, logprobs = np.moveaxis(sampled(SamplerOps.of(mesh)), 1, 0)
    their_tokens, their_logprobs = np.moveaxis(sampled(SamplerOps(Target.of(mesh))), 1, 0)
    num = 20 if dtype == jnp.float32 else 1  # in bfloat16 a token may differ, and with it all that follow
    is_same = (tokens == their_tokens)[:, :num]
    assert is_same.all() if dtype == jnp.float32 else is_same.mean() > 0.9
    difference = np.abs(logprobs - their_logprobs)[:, :num][is_same]
    assert difference.max() < (1e-4 if dtype == jnp.float32 else 0.05)


@needs_compiler
def test_calls_on_three_quarters_of_the_rows_write_what_calls_on_all_do() -> None:
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    mesh = make_sampler_mesh(MeshConfig(sampler_devices=1), make_mesh(MeshConfig()))
    ids = np.random.default_rng(0).integers(20, 260, (8, 100)).tolist()
    engines = [Engine(graphdef, CONFIG, mesh, slots=8, max_length=160) for _ in range(2)]
    assert [window.rows for window in engines[0].programs.windows] == [2, 4, 6, 8]
    engines[1].programs.windows = engines[1].programs.windows[-1:]
    for engine in engines:
        policy = engine.load(params)
        rows = {row: Context(ids[row], 20, row / 8, np.array([row, 1], np.uint32)) for row in (0, 1, 3, 4, 5, 7)}
        engine.set_context(policy, rows)
        engine.decode(policy, 20, leave_at=8)
    for name in ("tokens", "lengths", "status"):
        np.testing.assert_array_equal(*(getattr(engine.rows, name) for engine in engines))
    np.testing.assert_allclose(*(engine.rows.logprobs for engine in engines), atol=1e-4)


@needs_compiler
@pytest.mark.parametrize(
    "option",
    [
        pytest.param("-mno-avx512bf16", marks=pytest.mark.slow),
        "-mno-avx512f",
        pytest.param("-mno-avx", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(host.machine() not in ("x86_64", "AMD64"), reason="options of x86")
def test_on_a_lesser_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unknown: None, option: str) -> None:
    """Without bfloat16 instructions, with vectors of eight and of four numbers; compiled once."""
    compiler = shlex.join(build.find_compiler() or [])
    before = build.build_name()
    monkeypatch.setenv("CXX", f"{compiler} {option}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.build_name.cache_clear()
    name = build.build_name()
    assert name not in (None, before)
    [made] = (tmp_path / "r3rag_jax" / "kernels").iterdir()
    compiled_at = made.stat().st_mtime_ns
    build.build_name.cache_clear()
    assert build.build_name() == name == made.stem
    assert made.stat().st_mtime_ns == compiled_at
    for dtype in PRECISION:
        for held in PRECISION:
            test_attention(dtype, held, 48, 6, 2, 5, (4, 130, 319))
        for num_rows in (1, 2, 3, 8, 9, 40):
            test_products(dtype, num_rows, 64, 49)


def test_an_empty_name_is_no_compiler(monkeypatch: pytest.MonkeyPatch, unknown: None) -> None:
    monkeypatch.setenv("CXX", "")
    assert build.build_name() is None and load_kernels(ONE_CPU) is None
    assert are_missing(ONE_CPU)
    assert not are_missing(Target.of(make_mesh(MeshConfig())))  # kernels are for one device


@pytest.mark.parametrize("is_there", [True, False])
def test_a_compiler_that_fails_is_named_with_what_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unknown: None, is_there: bool
) -> None:
    compiler = tmp_path / "broken c++"
    if is_there:
        compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] || { echo 'out of order' >&2; exit 1; }\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"'{compiler}'")
    told = "out of order" if is_there else ".*No such file"
    with pytest.warns(RuntimeWarning, match=rf"broken c\+\+' must compile kernels.cc .*; got {told}"):
        assert build.build_name() is None
    assert not list((tmp_path / "r3rag_jax").rglob("*.so"))
