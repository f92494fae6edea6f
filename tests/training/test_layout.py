"""`mesh.layout=auto`, and the settings nearest to ones that do not fit, by arithmetic."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
import tiny_run

from r3rag_jax.compiling.chips import parse_topology
from r3rag_jax.compiling.devices import devices_of, topology_mesh
from r3rag_jax.compiling.programs import Architecture
from r3rag_jax.components import Components
from r3rag_jax.config import Config, ConfigError, MeshConfig
from r3rag_jax.parallel.mesh import Sizes, mesh_sizes
from r3rag_jax.training.layout import SHARE, Devices, choose_layout, layouts, nearest_fit, peak_bytes
from r3rag_jax.training.memory_plan import MemoryPlanner

PHASES = ("sft", "rl", "eval")
DECODER = dataclasses.replace(tiny.decoder().config, hidden_size=64, num_heads=8, num_kv_heads=4, ffn_size=128)


def config(**sections: Any) -> Config:
    base = Config()
    changed = {"sft": {"batch_rows": 8, "row_length": 512}, "rl": {"batch_rows": 8, "row_length": 512}}
    for name, values in sections.items():
        changed[name] = changed.get(name, {}) | values
    return base.replace(**{name: getattr(base, name).replace(**values) for name, values in changed.items()})


def devices(memory: int | None = None) -> Devices:
    """Eight GPUs that nothing runs on."""
    all_devices = devices_of(parse_topology("h100:8"), compiles=False)
    return Devices(8, memory, lambda sizes: topology_mesh(all_devices, sizes), lambda mesh: mesh, lambda _: jnp.float32)


@functools.cache
def planner(given: Config) -> MemoryPlanner:
    return MemoryPlanner(Architecture(given, devices().mesh((8, 1, 1)), DECODER))


def peak(given: Config, sizes: Sizes) -> int:
    return peak_bytes(given, planner(given), devices(2**40), sizes, PHASES)


def test_meshes_are_tried_from_the_simplest() -> None:
    assert list(layouts(8, DECODER))[:5] == [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2)]
    assert all(DECODER.num_heads % tensor == 0 for _, _, tensor in layouts(8, DECODER))


def test_a_model_that_fits_is_not_split_and_a_larger_one_is() -> None:
    given = config()
    roomy = choose_layout(given, planner(given), devices(2**40), PHASES)
    assert roomy.sizes == (8, 1, 1) and "mesh.data=8 mesh.fsdp=1 mesh.tensor=1 on 8 devices" in roomy.reason
    between = (peak(given, (4, 2, 1)) + peak(given, (8, 1, 1))) // 2
    assert choose_layout(given, planner(given), devices(int(between / SHARE)), PHASES).sizes == (4, 2, 1)
    nowhere = choose_layout(given, planner(given), devices(1), PHASES)
    assert "none fits" in nowhere.reason
    assert min(peak(given, sizes) for sizes in layouts(8, DECODER)) == peak(given, nowhere.sizes)


def test_rows_that_few_devices_divide_take_tensor_parallelism() -> None:
    given = config(sft={"batch_rows": 4}, rl={"batch_rows": 4})
    assert choose_layout(given, planner(given), devices(None), PHASES).sizes == (4, 1, 2)


def test_a_chosen_mesh_is_a_given_one() -> None:
    given = config(mesh={"layout": "auto"})
    layout = choose_layout(given, planner(given), devices(None), PHASES)
    assert mesh_sizes(layout.apply(given.mesh), 8) == layout.sizes
    with pytest.raises(ConfigError, match=r"mesh.fsdp .* must be unset when mesh.layout is auto"):
        MeshConfig(layout="auto", fsdp=8)


def applied(given: Config, changes: list[str]) -> Config:
    values = {key: value for key, _, value in (change.partition("=") for change in changes)}
    for key, text in values.items():
        section, name = key.split(".")
        value = {"true": True, "false": False}.get(text, text if section == "model" and name == "remat" else None)
        section_of = getattr(given, section)
        given = given.replace(**{section: section_of.replace(**{name: int(text) if value is None else value})})
    return given


@pytest.mark.parametrize("share", [1.1, 0.8, 0.5])
def test_the_nearest_settings_fit_and_are_none_where_everything_fits(share: float) -> None:
    given = config(rollout={"slots": 64, "max_length": 512})
    memory = int(share * peak(given, (8, 1, 1)) / SHARE)
    found = nearest_fit(given, planner(given), devices(memory), PHASES)
    assert found is not None and bool(found) == (share < 1)
    changed = applied(given, found)
    assert peak(changed, mesh_sizes(changed.mesh, 8)) <= SHARE * memory


def test_rows_are_part_of_the_nearest_settings() -> None:
    given = config(sft={"batch_rows": 12}, rl={"batch_rows": 16})
    assert nearest_fit(given, planner(given), devices(2**40), PHASES) == ["sft.batch_rows=16"]


def test_nothing_fits_no_memory() -> None:
    given = config()
    assert nearest_fit(given, planner(given), devices(1000), PHASES) is None
    assert nearest_fit(given, planner(given), devices(None), PHASES) == []


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
def test_a_run_takes_the_layout_that_is_chosen_and_can_say_why(base: Path, tmp_path: Path) -> None:
    """Rows of 8, 8 and 8 divide by all devices, and the little model fits each of them whole."""
    settings = tiny_run.config(tmp_path, base, mesh__layout="auto")
    components = Components(settings, settings.run_directory)
    assert components.layout is not None and components.layout.sizes == (8, 1, 1)
    assert dict(components.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    four_rows = tiny_run.config(tmp_path, base, mesh__layout="auto", rl__batch_rows=4)
    assert dict(Components(four_rows, tmp_path).mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert Components(tiny_run.config(tmp_path, base), tmp_path).layout is None
