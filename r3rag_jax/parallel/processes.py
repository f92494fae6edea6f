"""Multi-process runs: start-up, barrier, and broadcasts from process 0."""

from __future__ import annotations

import collections
import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordination service's client has no public name
from jax.experimental import multihost_utils

from r3rag_jax.config import MeshConfig
from r3rag_jax.errors import UserError


def start_distributed(config: MeshConfig) -> None:
    """Initialise `jax.distributed`; call it once, before the first use of a device.

    On TPU pods and under Slurm JAX finds the coordinator itself; elsewhere the config must give its address.
    """
    if not config.distributed:
        return
    if config.coordinator:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    else:
        jax.distributed.initialize()


_WAIT_S = 60.0  # timeout of one request to the coordination service; requests repeat until the time limit
_num_broadcasts: collections.Counter[str] = collections.Counter()  # name -> number of broadcasts
_lock = threading.Lock()


def broadcast_json(value: Any, name: str, *, timeout_s: float = math.inf) -> Any:
    """Return the `value` of process 0 on every process; all processes must call this.

    The value is sent through the coordination service of `jax.distributed`, not through the devices. So this may be
    called in one thread while another thread runs device programs. A collective on the devices may not: the processes
    could launch it in different orders.

    Args:
        value: a JSON value; floats are preserved exactly. It is ignored on processes other than 0.
        name: identifies the broadcast. The n-th call with a name returns the value of process 0's n-th call with that
            name. Calls with different names may happen in any order.
        timeout_s: maximum time to wait for process 0, in seconds. If process 0 dies, the coordination service
            terminates the other processes.

    Raises:
        TimeoutError: process 0 did not send its value in time.
    """
    if jax.process_count() == 1:
        return value
    with _lock:
        key = f"r3rag_jax/broadcast/{name}/{_num_broadcasts[name]}"
        _num_broadcasts[name] += 1
    client: Any = distributed.global_state.client
    if jax.process_index() == 0:
        client.key_value_set_bytes(f"{key}/value", json.dumps(value).encode())
        return value
    content = _wait_for(client, f"{key}/value", timeout_s)
    if client.key_value_increment(f"{key}/readers", 1) == jax.process_count() - 1:
        client.key_value_delete(f"{key}/")  # all processes have read it
    return json.loads(content)


def _wait_for(client: Any, key: str, timeout_s: float) -> bytes:
    end = time.monotonic() + timeout_s
    while (left_s := end - time.monotonic()) > 0:
        try:
            return client.blocking_key_value_get_bytes(key, max(1, int(1000 * min(left_s, _WAIT_S))))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    raise TimeoutError(f"process 0 must send {key} within {timeout_s:g} s; got nothing")


def on_process_0(
    compute: Callable[[], Any], name: str, *, error_type: type[Exception] = UserError, timeout_s: float = math.inf
) -> Any:
    """Run `compute` on process 0 and return its result, a JSON value, on every process; all processes must call this.

    Args:
        compute: called on process 0 only.
        name, timeout_s: see `broadcast_json`.
        error_type: the exception that the other processes raise if `compute` fails.

    Raises:
        Exception: on process 0 the exception of `compute`; on the others `error_type` with the same message.
    """
    if jax.process_index() != 0:
        reply = broadcast_json(None, name, timeout_s=timeout_s)
        if "error" in reply:
            raise error_type(f"process 0: {reply['error']}")
        return reply["result"]
    try:
        result = compute()
    except Exception as error:
        broadcast_json({"error": str(error) or type(error).__name__}, name)
        raise
    return broadcast_json({"result": result}, name)["result"]


def from_process_0(compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Run `compute` on process 0 and return its array, as float32, on every process; see `on_process_0`."""
    if jax.process_count() == 1:
        return compute()
    return np.asarray(on_process_0(lambda: compute().tolist(), "array"), np.float32)


def barrier(name: str) -> None:
    """Block until all processes have called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
