"""Reads W&B's offline files: records of the package's own message type, in blocks as of a LevelDB log.

The package writes these files by a program of its own, and has no reader in Python.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32 * 1024  # bytes at the start of a file, and of a block


def payloads(path: Path) -> Iterator[bytes]:
    """The records of a file; a record is in parts where it crosses blocks."""
    data, start, parts = path.read_bytes(), HEADER, b""
    while start + HEADER <= len(data):
        if BLOCK - start % BLOCK < HEADER:  # the rest of a block that holds no header is padding
            start += BLOCK - start % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, start)
        parts += data[start + HEADER : start + HEADER + length]
        start += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def records(directory: Path) -> Iterator[Any]:
    """The records of all runs under a directory, in the order written."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(directory.rglob("*.wandb")):
        yield from map(Record.FromString, payloads(path))


def history(directory: Path) -> list[dict[str, Any]]:
    """What was logged, an object a call; names that W&B adds, which begin with _, are left out."""
    found = []
    for record in records(directory):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append({name: value for name, value in items.items() if not name.startswith("_")})
    return found
