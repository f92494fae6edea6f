"""Work that process 0 hands out to all processes, and collects; through the coordination service, without a shared
disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax

from r3rag_jax.parallel.processes import service_client, wait_for_value

_END = b"end"
_PART = b"part"  # before the bytes of a part


class Crew:
    """On process 0: hands out the parts of a job. All other processes must be in `serve` with the same name.

    A process that fails on its part ends all (`processes.joined`).
    """

    def __init__(self, name: str):
        self._name, self._num_jobs = name, 0

    @property
    def size(self) -> int:
        """Number of processes, this one included."""
        return jax.process_count()

    def run(self, parts: Sequence[bytes], own: Callable[[bytes], bytes]) -> list[bytes]:
        """What each process makes of its part.

        Args:
            parts: a part for each process; that of process 0, the first, is given to `own`.
        """
        self._num_jobs += 1
        key, client = _key(self._name, self._num_jobs), service_client()
        for rank, part in enumerate(parts[1:], start=1):
            client.key_value_set_bytes(f"{key}/{rank}/part", _PART + part)
        made = [own(parts[0])]
        made += [wait_for_value(client, f"{key}/{rank}/made", math.inf) for rank in range(1, len(parts))]
        client.key_value_delete(f"{key}/")
        return made

    def close(self) -> None:
        """Let the other processes go on."""
        self._num_jobs += 1
        for rank in range(1, self.size):
            service_client().key_value_set_bytes(f"{_key(self._name, self._num_jobs)}/{rank}/part", _END)


def serve(name: str, work: Callable[[bytes], bytes]) -> None:
    """On every process but 0: do the parts of all jobs of `Crew(name)`, until it is closed."""
    client, number = service_client(), 1
    while True:
        key = f"{_key(name, number)}/{jax.process_index()}"
        found = wait_for_value(client, f"{key}/part", math.inf)
        if found == _END:
            return
        client.key_value_set_bytes(f"{key}/made", work(found.removeprefix(_PART)))
        number += 1


def _key(name: str, number: int) -> str:
    return f"r3rag_jax/crew/{name}/{number}"
