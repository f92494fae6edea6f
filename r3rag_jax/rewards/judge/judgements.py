"""The file of judgements: what a judge has said is paid for once, by whichever run asks first."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.run.files import naming


class Judgements:
    """A JSONL file of rows {key, score, reply}; a failure is kept as {key, failure} and asked again.

    Each line is written at once and as a whole, so that several runs may share the file, and the judgements of a run
    that was killed are there for the next one.
    """

    def __init__(self, path: Path):
        """Read the file, if there is one.

        Raises:
            UserError: the file cannot be read.
        """
        self.path = path
        self._scores: dict[str, float] = {}
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        except OSError as error:
            raise UserError(f"judge.cache: {path} cannot be read: {error.strerror}") from None
        for line in lines:
            try:
                row = parse_json(line)
                key, value = row["key"], row["score"]
            except (ValueError, KeyError, TypeError):
                continue  # a failure, or the half line of a run that was killed: it is asked again
            if isinstance(key, str) and type(value) in (int, float) and 0 <= value <= 1:
                self._scores[key] = value

    def get_all(self, keys: Sequence[str]) -> np.ndarray:
        """float32 [N], the verdicts with these keys; NaN = not known."""
        return np.asarray([self._scores.get(key, np.nan) for key in keys], np.float32)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
        """Open the file and give `add(key, row)`, which remembers a row; process 0 writes it as a line.

        Raises:
            UserError: the file cannot be written.
        """
        stream = None
        if jax.process_index() == 0:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stream = self.path.open("a+b", buffering=0)
            except OSError as error:
                raise UserError(f"judge.cache: {self.path} cannot be written: {error.strerror}") from None
            if stream.seek(0, os.SEEK_END) and os.pread(stream.fileno(), 1, stream.tell() - 1) != b"\n":
                stream.write(b"\n")  # end the half line of a run that was killed

        def add(key: str, row: Mapping[str, Any]) -> None:
            if "score" in row:
                self._scores[key] = row["score"]
            if stream is not None:
                line = json.dumps({"key": key, **row}, ensure_ascii=False)
                left = line.encode("utf-8", "replace") + b"\n"  # a reply may hold half a surrogate pair
                with naming(self.path):
                    while left:  # a disk that becomes full takes a part first
                        left = left[stream.write(left) or 0 :]

        with stream or contextlib.nullcontext():
            yield add
