"""`python -m r3rag_jax.compile`: whether a recipe fits a topology, and how fast its programs could be there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from r3rag_jax.compiling.calculated import calculate_program
from r3rag_jax.compiling.chips import Topology
from r3rag_jax.compiling.devices import devices_of, topology_mesh
from r3rag_jax.compiling.programs import PHASES, PROGRAMS, Architecture, RunPrograms
from r3rag_jax.compiling.report import PhaseReport, ProgramReport, compile_all, phase_reports
from r3rag_jax.config import Config
from r3rag_jax.errors import UserError
from r3rag_jax.json_text import read_json_object
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.hf.decoder_files import load_config
from r3rag_jax.models.paths import reading
from r3rag_jax.models.policy import model_directory
from r3rag_jax.parallel.mesh import mesh_sizes, num_training_devices
from r3rag_jax.sampler.cache.kv_cache import default_kv_dtype
from r3rag_jax.training.layout import SHARE, Devices, choose_layout, nearest_fit
from r3rag_jax.training.memory_plan import MemoryPlanner, check_rows

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the command found."""

    phases: list[PhaseReport]
    programs: list[ProgramReport]
    nearest: list[str] | None  # settings that fit, if this configuration does not; None: none were found

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases) and all(program.fits for program in self.programs)


def use_cpu() -> None:
    """Keep this process off the accelerators that the machine may have: it only compiles."""
    jax.config.update("jax_platforms", "cpu")


def chosen_programs(text: str, config: Config) -> list[str]:
    """The programs that `--programs` names; empty: all of the configuration's phases.

    Raises:
        UserError: a name is unknown.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in PROGRAMS]:
        raise UserError(f"--programs must be among {', '.join(PROGRAMS)}; got {', '.join(unknown)}")
    of_phases = {name for phase in config.phases for name in PHASES.get(phase, ())}
    return [name for name in PROGRAMS if (name in wanted if wanted else name in of_phases)]


def read_architecture(config: Config, file: str) -> DecoderConfig:
    """The model of `--model-config`, a config.json or a directory with one, or else of `model.path`.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(file) if file else model_directory(config.model)
    if path.is_dir():
        with reading(path):
            return load_config(path)
    if not path.is_file():
        raise UserError(f"{'--model-config' if file else 'model.path'} must be a config.json; got {path}, not there")
    with reading(path):
        return DecoderConfig.from_hf(read_json_object(path))


def run(
    config: Config,
    topology: Topology,
    decoder: DecoderConfig,
    names: Sequence[str],
    say: Say,
    *,
    only_calculates: bool = False,
    text_directory: Path | None = None,
) -> Outcome:
    """Plan, compile (for GPUs: calculate) and compare with the memory of a device.

    Args:
        names: of the programs.
        say: is told what is being done.
        only_calculates: do not compile for TPUs either.
        text_directory: where the texts of compiled programs are kept, NAME.txt; None: nowhere.

    Raises:
        UserError: rows or devices do not divide, or libtpu is missing.
    """
    compiles = topology.chip.platform == "tpu" and not only_calculates
    all_devices = devices_of(topology, compiles=compiles)
    devices = _devices(config, topology, decoder, all_devices)
    phases = [phase for phase in config.phases if phase in PHASES and set(PHASES[phase]) & set(names)]
    policy = Architecture(config, devices.mesh((1, devices.num, 1)), decoder)
    planner = MemoryPlanner(policy)
    if config.mesh.layout == "auto":
        layout = choose_layout(config, planner, devices, phases)
        say(layout.reason)
        config = config.replace(mesh=layout.apply(config.mesh))
    mesh = devices.mesh(mesh_sizes(config.mesh, devices.num))
    sampler_mesh = devices.sampler_mesh(mesh)
    check_rows(config, phases, mesh, sampler_mesh)
    arguments = mesh, sampler_mesh, devices.kv_dtype(sampler_mesh)
    plans = {phase: planner.plan(config, phase, *arguments, topology.chip.memory) for phase in phases}
    programs = RunPrograms(config, policy, *arguments)
    if compiles:
        reports = compile_all(programs, names, topology, say, text_directory)
    else:
        say("nothing is compiled (XLA can for TPUs alone, without --calculate): all numbers are calculated")
        estimated = {
            name: size for planned in plans.values() for plan in planned for name, size in plan.temporaries.items()
        }
        reports = [calculate_program(programs, name, topology, estimated.get(name, 0)) for name in names]
    found = phase_reports(plans, programs.cache_bytes, reports, topology.chip.memory)
    outcome = Outcome(found, reports, [])
    if outcome.fits:
        return outcome
    # What the estimate of the temporaries is short of counts as memory that is not there.
    planned_peak = max(plan.peak_bytes for planned in plans.values() for plan in planned)
    excess = max(phase.total for phase in found) - planned_peak
    memory = int(topology.chip.memory - max(0, excess) / SHARE)
    nearest = nearest_fit(config, planner, dataclasses.replace(devices, memory=memory), phases)
    return dataclasses.replace(outcome, nearest=nearest)


def _devices(config: Config, topology: Topology, decoder: DecoderConfig, all_devices: Sequence[Any]) -> Devices:
    """The devices that train, and how meshes are made of them."""
    num = num_training_devices(config.mesh, len(all_devices))

    def sampler_mesh_of(mesh: Mesh) -> Mesh:
        reserved = config.mesh.sampler_devices
        return topology_mesh(all_devices[num:], (reserved, 1, 1)) if reserved else mesh

    def kv_dtype(mesh: Mesh) -> Any:
        given = config.rollout.kv_dtype
        return default_kv_dtype(config.model.dtype, decoder, mesh) if given == "auto" else jax.numpy.dtype(given)

    mesh_of_sizes = functools.cache(lambda sizes: topology_mesh(all_devices[:num], sizes))
    return Devices(num, topology.chip.memory, mesh_of_sizes, functools.cache(sampler_mesh_of), kv_dtype)
