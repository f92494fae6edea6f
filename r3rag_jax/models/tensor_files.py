"""Hugging Face directories as models read them: `config.json` and the tensors of its safetensors files.

Hugging Face stores one [out, in] matrix per layer; our models keep [Ly, in, out] stacks. Tensors are
read one at a time, so host memory holds one stack beside the files' page cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

T = TypeVar("T")


def read_config(path: str | Path, parse: Callable[[Mapping[str, Any]], T]) -> T:
    """Return what `parse` makes of the dictionary in a directory's `config.json`.

    Raises:
        FileNotFoundError: the directory has no config.json.
        ValueError: the file is not JSON, or `parse` refuses it (the message names file and field).
    """
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"a model directory must hold {CONFIG_FILE}; {path} has none")
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


class TensorFiles:
    """The tensors of a Hugging Face directory by name, in one safetensors file or in shards."""

    def __init__(self, path: str | Path):
        """Find which file holds which tensor.

        Raises:
            FileNotFoundError: neither weights nor index exist, or a shard named by the index is
                missing.
            ValueError: a file is not valid safetensors.
        """
        self._directory = Path(path)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        index = self._directory / INDEX_FILE
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.file_of: dict[str, str] = dict(weight_map)
        elif (self._directory / WEIGHTS_FILE).is_file():
            self.file_of = dict.fromkeys(self._file(WEIGHTS_FILE).keys(), WEIGHTS_FILE)
        else:
            raise FileNotFoundError(f"a model directory must hold {WEIGHTS_FILE} or {INDEX_FILE}; {path} has neither")

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def where(self, name: str) -> Path:
        """Return the path of the file that holds (or, by the layout, should hold) a tensor."""
        return self._directory / self.file_of.get(name, WEIGHTS_FILE)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Read one tensor and check its shape.

        Raises:
            ValueError: the shape differs, or an index names a file that lacks the tensor.
        """
        try:
            array = self._file(self.file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.where(name)}: cannot read tensor {name}: {error}") from error
        if array.shape != shape:
            raise ValueError(
                f"{self.where(name)}: tensor {name} must have shape {shape} by config.json; got {array.shape}"
            )
        return array

    def _file(self, file: str) -> Any:
        """Open a shard once."""
        if file not in self._open:
            path = self._directory / file
            if not path.is_file():
                raise FileNotFoundError(f"{INDEX_FILE} names {file}; {self._directory} lacks it")
            try:
                self._open[file] = self._stack.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
        return self._open[file]


def tensor_names(hf_name: str, num_layers: int) -> list[str]:
    """Return the tensors of one parameter: one per layer where the name holds `{i}`, else itself."""
    return [hf_name.format(i=i) for i in range(num_layers)] if "{i}" in hf_name else [hf_name]


def check_names(files: TensorFiles, expected: Set[str], found: Set[str], model: str) -> None:
    """Compare the tensors that a model needs with those that its files hold.

    Args:
        model: the model in words, e.g. "a llama with 2 layers".

    Raises:
        ValueError: one is missing, or one is there that the model would not use.
    """
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            first = min(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{files.where(first)}: the tensors must be those of {model}; {what}: {first}{more}")


def read_param(
    files: TensorFiles, hf_name: str, shape: tuple[int, ...], dtype: np.dtype, *, transposed: bool
) -> np.ndarray:
    """Read one parameter in our layout: cast, transposed if asked, and stacked over layers if `{i}` is in its name.

    Args:
        shape: of the parameter, [Ly, …] of a stacked one.

    Raises:
        ValueError: a tensor has another shape (named, with file and both shapes).
    """
    is_stacked = "{i}" in hf_name
    out = np.empty(shape, dtype)
    for i, target in enumerate(out if is_stacked else out[None]):
        tensor = files.read(hf_name.format(i=i), target.shape[::-1] if transposed else target.shape)
        target[...] = tensor.T if transposed else tensor
    return out
