"""Several processes: start-up, barrier, broadcast from process 0."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from r3rag_jax.config import MeshConfig
from r3rag_jax.errors import UserError


def start_distributed(config: MeshConfig) -> None:
    """Join the other processes; to be called once, before any device is touched.

    TPU pods and Slurm tell the coordinator by themselves; elsewhere the config names it.
    """
    if not config.distributed:
        return
    if config.coordinator:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    else:
        jax.distributed.initialize()


def from_process_0(compute: Callable[[], np.ndarray], length: int) -> np.ndarray:
    """What `compute` gives in process 0, in every process: float32 [length]. All must call.

    Raises:
        Exception: whatever `compute` raises in process 0; the others, who would wait for ever, get a UserError.
    """
    if jax.process_count() == 1:
        return compute()
    told, error = np.zeros(1 + length, np.float32), None  # whether it failed, and the values
    if jax.process_index() == 0:
        try:
            told[1:] = compute()
        except Exception as caught:
            told[0], error = 1, caught
    told = np.asarray(multihost_utils.broadcast_one_to_all(told))
    if error is not None:
        raise error
    if told[0]:
        raise UserError("process 0 has failed; see what it says")
    return told[1:].copy()


def barrier(name: str) -> None:
    """Wait for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
