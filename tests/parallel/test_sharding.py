"""The mesh and the one table from logical to mesh axes, on eight forced devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from r3rag_jax.config import MeshConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.mesh import AXES, make_mesh
from r3rag_jax.parallel.processes import start_distributed
from r3rag_jax.parallel.shardings import RULES, device_put_batch, partition_spec, tree_shardings

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2)), ((-1, 8, 1), (1, 8, 1))],
)
def test_mesh_shapes(sizes: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    mesh = make_mesh(tiny.mesh_config(*sizes))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}  # jax.make_mesh alone would give Explicit axes


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (8, 2, 1), (-1, 16, 1)])
def test_sizes_that_are_not_the_devices_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"must be the number of devices, 8; got {} \* {} \* {}$".format(*sizes)):
        make_mesh(tiny.mesh_config(*sizes))


def test_every_logical_axis_has_a_rule_and_every_rule_names_mesh_axes() -> None:
    used = {axis for axes in PARAM_AXES.values() for axis in axes if axis is not None}
    assert used <= RULES.keys()
    assert {axis for axes in RULES.values() for axis in axes} <= set(AXES)


def test_an_axis_that_does_not_divide_is_replicated() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    assert partition_spec(mesh, ("vocab", "embed"), (272, 32)) == P(("tensor",), ("fsdp",))
    assert partition_spec(mesh, ("vocab", "embed"), (267, 30)) == P(None, None)
    assert partition_spec(mesh, ("batch", None), (8, 3)) == P(("data", "fsdp"), None)
    assert partition_spec(mesh, ("batch", None), (6, 4)) == P(None, None)
    assert partition_spec(mesh, ("layers", None), (2, 32)) == P(None, None)


def test_parameters_and_their_moments_lie_alike_and_the_rest_is_whole() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = nnx.split(tiny.decoder(272))[1]
    state = {"params": params, "opt": optax.adamw(1e-3).init(params), "head": jnp.zeros(32), "step": jnp.int32(0)}
    flat = jax.tree_util.tree_flatten_with_path(tree_shardings(mesh, state, PARAM_AXES))[0]
    specs: dict[str, set[P]] = {}
    for path, sharding in flat:
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        name = next((n for n in reversed(names) if n in PARAM_AXES), names[-1])
        specs.setdefault(name, set()).add(sharding.spec)
    assert specs["q_proj"] == {P(None, ("fsdp",), ("tensor",))}  # of the parameter and of both moments
    assert specs["down_proj"] == {P(None, ("tensor",), ("fsdp",))}
    assert specs["embed"] == {P(("tensor",), ("fsdp",))}
    assert specs["head"] == specs["step"] == specs["count"] == {P()}
    q_proj = jax.device_put(params["layers"]["q_proj"][...], NamedSharding(mesh, *specs["q_proj"]))
    assert {shard.data.shape for shard in q_proj.addressable_shards} == {(2, 8, 16)}


def test_a_batch_is_split_by_rows() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    host = {"tokens": np.arange(32, dtype=np.int32).reshape(8, 4), "odd": np.ones((3, 2), np.float32)}
    batch = device_put_batch(mesh, host)
    assert batch["tokens"].sharding.spec == P(("data", "fsdp"), None)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 4)}
    assert batch["odd"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, batch, host)


def test_without_a_word_about_it_a_process_stays_alone() -> None:
    start_distributed(MeshConfig())
    assert jax.process_count() == 1
