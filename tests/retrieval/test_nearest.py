"""Exact search over vectors on the devices: NumPy's ranking, ties included, for any number of devices and chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from r3rag_jax.retrieval import nearest
from r3rag_jax.retrieval.nearest import Layout, load_vectors, make_search, quantise
from r3rag_jax.retrieval.vectors import VectorShards

RNG = np.random.default_rng(0)
VECTORS = RNG.integers(-3, 4, (3000, 16)).astype(np.float32)  # small integers: exact in every dtype, and full of ties
QUERIES = RNG.integers(-3, 4, (5, 16)).astype(np.float32)


def mesh_of(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]), (nearest.AXIS,))


def search(vectors: np.ndarray, num_devices: int, dtype: nearest.VectorType, k: int) -> tuple[np.ndarray, ...]:
    """(scores, positions) of QUERIES; the vectors lie in three shards."""
    shards = VectorShards([part for part in np.array_split(vectors, 3) if len(part)])
    mesh = mesh_of(num_devices)
    layout = Layout.of(len(vectors), mesh.size)
    program = make_search(mesh, layout, lambda params, queries_BD: queries_BD * params)
    found = program(load_vectors(shards, layout, mesh, dtype), jnp.float32(1), QUERIES, k=k)
    np.testing.assert_array_equal(found[2], QUERIES)
    return np.asarray(found[0]), np.asarray(found[1])


def ranked(scores_BP: np.ndarray, k: int) -> np.ndarray:
    positions = np.broadcast_to(np.arange(scores_BP.shape[1]), scores_BP.shape)
    return np.lexsort((positions, -scores_BP))[:, :k]


@pytest.mark.parametrize(
    ("num_devices", "chunk", "dtype", "k"),
    [(1, 65_536, "float32", 5), (1, 512, "bfloat16", 3), (8, 65_536, "bfloat16", 200), (8, 256, "float32", 1)],
)
def test_the_devices_find_what_sorting_all_scores_finds(
    num_devices: int, chunk: int, dtype: nearest.VectorType, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "_CHUNK", chunk)
    scores, positions = search(VECTORS, num_devices, dtype, k)
    expected = ranked(QUERIES @ VECTORS.T, k)
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(QUERIES @ VECTORS.T, expected, axis=1))


def test_rows_without_a_vector_are_never_found() -> None:
    vectors = -np.abs(VECTORS[:3])  # their scores may be below 0, the score of the rows that fill the devices
    positions = search(vectors, 8, "float32", 3)[1]
    assert np.sort(positions, axis=1).tolist() == [[0, 1, 2]] * len(QUERIES)


def test_int8_scores_are_those_of_the_rounded_vectors() -> None:
    values = RNG.integers(-127, 128, VECTORS.shape).astype(np.float32)
    values[:, 0] = 127  # the largest magnitude: a row's scale is exactly the factor below
    vectors = values * 2.0 ** -RNG.integers(0, 4, (len(values), 1)).astype(np.float32)
    scores, positions = search(vectors * 1.001, 8, "int8", 4)
    np.testing.assert_array_equal(positions, ranked(QUERIES @ vectors.T, 4))
    np.testing.assert_allclose(scores, 1.001 * np.take_along_axis(QUERIES @ vectors.T, positions, axis=1), rtol=1e-5)


def test_quantising_by_hand() -> None:
    values, scales = quantise(np.float32([[1.27, -0.1, 0.004], [0, 0, 0], [-254, 127, 3]]))
    assert values.tolist() == [[127, -10, 0], [0, 0, 0], [-127, 64, 2]]
    np.testing.assert_allclose(scales, [0.01, 1, 2], rtol=1e-6)


def test_layouts_by_hand() -> None:
    tiny, small, wikipedia = Layout.of(1000, 8), Layout.of(3000, 8), Layout.of(21_015_324, 64)
    assert (tiny.chunk, tiny.num_chunks, tiny.rows) == (125, 1, 125)
    assert (small.chunk, small.num_chunks, small.rows) == (384, 1, 384)
    assert (wikipedia.chunk, wikipedia.num_chunks, wikipedia.rows) == (54_784, 6, 328_704)
    assert wikipedia.bytes_per_device(768, "bfloat16") == 328_704 * 768 * 2
    assert wikipedia.bytes_per_device(768, "int8") == 328_704 * (768 + 4)


def test_a_program_is_compiled_once_for_a_shape_of_queries_and_a_k() -> None:
    mesh = mesh_of(1)
    layout = Layout.of(len(VECTORS), 1)
    vectors = load_vectors(VectorShards([VECTORS]), layout, mesh, "float32")
    traced = []

    def embed(params: None, queries_BD: jax.Array) -> jax.Array:
        traced.append(queries_BD.shape)
        return queries_BD

    program = make_search(mesh, layout, embed)
    for rows, k in ((5, 2), (5, 2), (4, 2), (5, 3), (4, 2)):
        program(vectors, None, QUERIES[:rows], k=k)
    assert traced == [(5, 16), (4, 16), (5, 16)]


def test_vectors_that_are_not_finite_are_refused() -> None:
    broken = VECTORS.copy()
    broken[2000, 3] = np.nan
    with pytest.raises(ValueError, match="vectors must be finite; one of 0 to 2999 is not"):
        load_vectors(VectorShards([broken]), Layout.of(len(broken), 1), mesh_of(1), "bfloat16")
