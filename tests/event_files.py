"""Reads TensorBoard event files without TensorBoard."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def events(directory: Path) -> Iterator[Any]:
    """The events of a directory in the order written.

    A TFRecord is a length (uint64), a checksum of it (uint32), the bytes and a checksum of those.
    """
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(directory.glob("events.out.tfevents.*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            yield Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length


def scalars(directory: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of every scalar."""
    values = [(value, event.step) for event in events(directory) for value in event.summary.value]
    return [(v.tag, step, v.simple_value) for v, step in values if v.WhichOneof("value") == "simple_value"]


def texts(directory: Path) -> dict[tuple[str, int], str]:
    """(name, step) -> text."""
    values = [(value, event.step) for event in events(directory) for value in event.summary.value]
    return {
        (v.tag.removesuffix("/text_summary"), step): v.tensor.string_val[0].decode()
        for v, step in values
        if v.WhichOneof("value") == "tensor"
    }
