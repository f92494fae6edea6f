"""Multi-process runs: start-up, a common end, barrier, and what process 0 decides and broadcasts."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax._src import distributed  # the coordination service's client has no public name

from r3rag_jax.config import MeshConfig
from r3rag_jax.errors import ServiceError, StopRun, UserError, report_error
from r3rag_jax.parallel.failures import HEARTBEAT_S, FailureWatch


def start_distributed(config: MeshConfig) -> None:
    """Initialise `jax.distributed`; call it once, before the first use of a device.

    On TPU pods and under Slurm JAX finds the coordinator itself; elsewhere the config must give its address.
    """
    if not config.distributed:
        return
    if config.coordinator:
        jax.distributed.initialize(
            config.coordinator, config.num_processes, config.process_id, heartbeat_timeout_seconds=HEARTBEAT_S
        )
    else:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_S)


_watch: FailureWatch | None = None  # that of this process, while it is one of several


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """Tell the other processes of an error in the block at once, before what is around the block is closed.

    Closing may have to wait for the others (asynchronous rollouts, checkpoints), which wait for this process.
    """
    try:
        yield
    except Exception as error:
        if _watch is not None:
            print(f"error: {type(error).__name__}: {error}; all processes end", file=sys.stderr, flush=True)
            _watch.tell(error)
        raise


@contextlib.contextmanager
def joined(config: MeshConfig) -> Iterator[None]:
    """Run the block as one of the processes that the config describes, all of which end together.

    If one raises, it prints its error and ends, and within half a minute every other prints that error, too, and ends,
    also while it waits for a device program; see `failures.py`. With one process nothing is done.
    """
    start_distributed(config)
    if not config.distributed:
        yield
        return
    global _watch
    state = distributed.global_state  # known before any device is
    watch = _watch = FailureWatch(state.client, state.process_id, state.num_processes)
    watch.start()
    try:
        yield
        barrier("end")  # the failure of a process that is not there yet still ends all
    except SystemExit:  # all processes leave with a status of their choice
        barrier("end")
        raise
    except StopRun as stop:
        watch.stop()
        leave_together(stop)
        raise
    except BaseException as error:
        watch.leave(error)
    finally:
        watch.stop()


def leave_together(stop: StopRun) -> None:
    """Wait until all processes have stopped; where one of them cannot, end this one."""
    try:
        barrier("stop", timeout_s=STOP_S)
    except (TimeoutError, jax.errors.JaxRuntimeError):
        os._exit(report_error(stop))


def service_client() -> Any:
    """The client of the coordination service of several processes."""
    return distributed.global_state.client


BARRIER_S = 3600.0  # default time limit of a barrier, in seconds; longer than process 0 takes to write a large policy
STOP_S = 30.0  # processes that stop wait so long for each other, in seconds
# Timeout of one request to the coordination service, in seconds; requests repeat until the time limit. No signal
# interrupts a request.
_WAIT_S = 5.0
_num_calls: collections.Counter[str] = collections.Counter()  # name of a broadcast or a barrier -> number of calls
_lock = threading.Lock()


def _key(kind: str, name: str) -> str:
    """The key of the next broadcast or barrier with this name: the same on all processes."""
    with _lock:
        key = f"r3rag_jax/{kind}/{name}"
        _num_calls[key] += 1
        return f"{key}/{_num_calls[key]}"


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
    key, client = _key("broadcast", name), service_client()
    if jax.process_index() == 0:
        client.key_value_set_bytes(f"{key}/value", json.dumps(value).encode())
        return value
    content = wait_for_value(client, f"{key}/value", timeout_s)
    if client.key_value_increment(f"{key}/readers", 1) == jax.process_count() - 1:
        client.key_value_delete(f"{key}/")  # all processes have read it
    return json.loads(content)


def wait_for_value(client: Any, key: str, timeout_s: float) -> bytes:
    """The bytes that a process sets under a key.

    Raises:
        TimeoutError: it did not in time.
    """
    end = time.monotonic() + timeout_s
    while (left_s := end - time.monotonic()) > 0:
        try:
            return client.blocking_key_value_get_bytes(key, max(1, int(1000 * min(left_s, _WAIT_S))))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    raise TimeoutError(f"a process must send {key} within {timeout_s:g} s; got nothing")


def on_process_0(
    compute: Callable[[], Any], name: str, *, error_type: type[Exception] = UserError, timeout_s: float = math.inf
) -> Any:
    """Run `compute` on process 0 and return its result, a JSON value, on every process; all processes must call this.

    Args:
        compute: called on process 0 only.
        name, timeout_s: see `broadcast_json`.
        error_type: the exception that the other processes raise if `compute` fails.

    Raises:
        Exception: on process 0 the exception of `compute`; on the others `error_type`, or a ServiceError for a
            ServiceError, with the same message. A ServiceError is then common to all.
    """
    if jax.process_index() != 0:
        reply = broadcast_json(None, name, timeout_s=timeout_s)
        if "error" in reply:
            raise _common_error(f"process 0: {reply['error']}", error_type, is_service=reply["is_service"])
        return reply["result"]
    try:
        result = compute()
    except Exception as error:
        is_service = isinstance(error, ServiceError)
        broadcast_json({"error": str(error) or type(error).__name__, "is_service": is_service}, name)
        if isinstance(error, ServiceError):
            error.is_common = True
        raise
    return broadcast_json({"result": result}, name)["result"]


def _common_error(message: str, error_type: type[Exception], *, is_service: bool) -> Exception:
    """The error of another process than 0 for one that process 0 has raised."""
    if not is_service:
        return error_type(message)
    kind = error_type if issubclass(error_type, ServiceError) else ServiceError
    return kind(message, is_common=True)


def from_process_0(compute: Callable[[], np.ndarray], name: str) -> np.ndarray:
    """Run `compute` on process 0 and return its array, as float32, on every process; see `on_process_0`."""
    if jax.process_count() == 1:
        return compute()
    return np.asarray(on_process_0(lambda: compute().tolist(), name), np.float32)


def barrier(name: str, *, timeout_s: float = BARRIER_S) -> None:
    """Block until all processes have called this as often with the same name.

    It goes through the coordination service, as `broadcast_json` does, and not through the devices.

    Raises:
        TimeoutError: a process did not come in time.
    """
    if jax.process_count() == 1:
        return
    try:
        service_client().wait_at_barrier(_key("barrier", name), int(1000 * timeout_s))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(f"all processes must reach barrier {name!r} within {timeout_s:g} s: {error}") from None


def exists(path: epath.Path | Path) -> bool:
    """Whether process 0 sees a path; all processes must call this.

    What is done next must not depend on what each process sees: a network file system shows a new file to one process
    earlier than to another.
    """
    return bool(on_process_0(path.exists, f"exists {path.name}"))  # each host may have a path of its own


def check_same(of: Callable[[], Any], what: str) -> None:
    """Compare a JSON value, e.g. a digest of what each process has read, with that of process 0; all must call this.

    Args:
        of: computes the value; with one process it is not called.
        what: a name that is the same on all processes; no path, which may be another one on each host.

    Raises:
        UserError: it differs. All processes then end (`joined`).
    """
    if jax.process_count() == 1:
        return
    value = of()
    expected = broadcast_json(value, f"same {what}")
    if value != expected:
        raise UserError(
            f"all processes must have the same {what}; process {jax.process_index()} has {value!r}, process 0 "
            f"{expected!r}: does a network file system show it an old file?"
        )


def post(name: str, value: str) -> None:
    """Leave a note for all processes, to be read with `posted`; a later one replaces it. Any thread may call."""
    if jax.process_count() > 1:
        service_client().key_value_set(f"r3rag_jax/post/{name}/{jax.process_index()}", value, allow_overwrite=True)


def posted(name: str) -> dict[int, str]:
    """The notes that processes have left under a name: process -> value. Any thread may call; never blocks for long."""
    if jax.process_count() == 1:
        return {}
    found = service_client().key_value_dir_get(f"r3rag_jax/post/{name}/")
    return {int(key.rpartition("/")[2]): value for key, value in found}
