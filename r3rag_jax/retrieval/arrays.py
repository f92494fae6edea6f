"""Arrays in numpy's format, memory-mapped: the one place of the package that opens them for an index."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from r3rag_jax.errors import UserError

MAGIC = b"\x93NUMPY"


def open_array(path: Path, advice: str = "") -> np.ndarray:
    """Memory-map an array; never an archive, nor an object that is pickled.

    Args:
        advice: what to do about a damaged file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is no array.
    """
    with path.open("rb") as file:
        is_array = file.read(len(MAGIC)) == MAGIC
    try:
        if not is_array:
            raise ValueError("it begins with other bytes")
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy reads a header by Python's tokenizer and parser, with the errors of both
        raise UserError(f"{path} must be an array in numpy's format: {error}{advice}") from error
