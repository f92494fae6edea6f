"""The peak rates of the devices that a run has, where their chip is known."""

from __future__ import annotations

from jax.sharding import Mesh

from r3rag_jax.compiling.chips import CHIPS, Chip
from r3rag_jax.config import Config
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.training.utilization import Peaks, Utilization

# `device_kind` of JAX -> name in CHIPS. Another variant of a chip (H100 PCIe) has other rates, and no entry.
DEVICE_KINDS = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device; None where its rates are not known."""
    return CHIPS.get(DEVICE_KINDS.get(device_kind, ""))


def utilization_of(config: Config, decoder: DecoderConfig, mesh: Mesh) -> Utilization | None:
    """What tells how much of the devices' peak rates is used; None where these are not known, as on CPUs."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    return Utilization(Peaks(chip.flops, chip.hbm_rate), config, decoder, devices=mesh.size)
