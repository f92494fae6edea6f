"""Reads and writes `config.json` and safetensors files of Hugging Face directories.

Hugging Face stores one [out, in] matrix per layer; our models keep [Ly, in, out] stacks. A stack is read one device
slice at a time and written one matrix at a time, so that a host never holds a second copy of the model.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from r3rag_jax.json_text import parse_json, read_json_object
from r3rag_jax.run.files import open_atomic_binary, write_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000  # maximum bytes of tensors per file, as on the Hugging Face hub
# Supported dtypes of tensors to read, and dtypes to write: name -> (name in safetensors, numpy dtype).
READ_DTYPES = ("BF16", "F16", "F32", "F64")
WRITE_DTYPES: dict[str, tuple[str, Any]] = {"bfloat16": ("BF16", ml_dtypes.bfloat16), "float32": ("F32", np.float32)}
_WEIGHTS_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)  # no folder, so no file outside of the directory
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

Shape = tuple[int, ...]
Index = tuple[slice, ...]
T = TypeVar("T")


def read_config(path: str | Path, parse: Callable[[Mapping[str, Any]], T]) -> T:
    """Read a directory's `config.json` and return `parse` of its dictionary.

    Raises:
        FileNotFoundError: the directory has no config.json.
        ValueError: the file is not JSON, or `parse` raised a ValueError; the message names the file.
    """
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"a model directory must hold {CONFIG_FILE}; {path} has none")
    fields = read_json_object(file)
    try:
        return parse(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


# ---------------------------------------------------------------------------------------- reading


class TensorFiles:
    """The tensors of a Hugging Face directory by name, from one safetensors file or several shards."""

    def __init__(self, path: str | Path):
        """Map tensor names to files.

        Raises:
            FileNotFoundError: neither weights nor index exist, or a shard named by the index is
                missing.
            ValueError: a safetensors file or the index is invalid.
        """
        self._directory = Path(path)
        self._stack = contextlib.ExitStack()
        self._open: dict[str, Any] = {}
        index = self._directory / INDEX_FILE
        if index.is_file():
            self.file_of = _read_index(index)
        elif (self._directory / WEIGHTS_FILE).is_file():
            self.file_of = dict.fromkeys(self._file(WEIGHTS_FILE).keys(), WEIGHTS_FILE)
        else:
            raise FileNotFoundError(f"a model directory must hold {WEIGHTS_FILE} or {INDEX_FILE}; {path} has neither")

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def where(self, name: str) -> Path:
        """Return the path of the file that holds a tensor; for unknown tensors, the default weights file."""
        return self._directory / self.file_of.get(name, WEIGHTS_FILE)

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor under its safetensors name, e.g. "BF16".

        Raises:
            ValueError: the file that the index names does not contain the tensor.
        """
        return self._tensor(name).get_dtype()

    def check(self, name: str, shape: Shape) -> None:
        """Check the shape and dtype of a tensor from the file's header, without reading its data.

        Raises:
            ValueError: the shape differs, the dtype is not supported, or the file lacks the tensor.
        """
        tensor = self._tensor(name)
        found = tuple(tensor.get_shape())
        if found != shape:
            raise ValueError(f"{self.where(name)}: tensor {name} must have shape {shape} by config.json; got {found}")
        if tensor.get_dtype() not in READ_DTYPES:
            raise ValueError(
                f"{self.where(name)}: tensor {name} must hold one of {READ_DTYPES}; got {tensor.get_dtype()}"
            )

    def read(self, name: str, index: Index) -> np.ndarray:
        """Read a slice of one tensor; the rest of it is not read."""
        return self._tensor(name)[index]

    def _tensor(self, name: str) -> Any:
        """Return a lazy safetensors slice of one tensor, which reads data when it is indexed."""
        try:
            return self._file(self.file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.where(name)}: cannot read tensor {name}: {error}") from error

    def _file(self, file: str) -> Any:
        """Return an open safetensors file; each file is opened once."""
        if file not in self._open:
            path = self._directory / file
            if not path.is_file():
                raise FileNotFoundError(f"{INDEX_FILE} names {file}; {self._directory} lacks it")
            try:
                self._open[file] = self._stack.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                cause = _truncation(path) or f"is not a valid safetensors file: {error}"
                raise ValueError(f"{path} {cause}") from error
        return self._open[file]


def _read_index(file: Path) -> dict[str, str]:
    """Read an index and return tensor name -> file name; raises ValueError if the index is invalid."""
    rule = f'{file} must hold {{"weight_map": {{tensor: file, …}}}}'
    try:
        weight_map = read_json_object(file).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{rule}; got something else: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise ValueError(f"{rule}; got something else")
    for value in set(weight_map.values()):
        if not _WEIGHTS_NAME.fullmatch(value):
            raise ValueError(f"{rule} with names of files beside it, *.safetensors; got {reprlib.repr(value)}")
    return weight_map


def _truncation(path: Path) -> str | None:
    """Describe which tensor is cut off in a truncated file; None if the file is complete or has no valid header."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        try:
            header = parse_json(file.read(start - 8)) if start <= size else {}
            ends = {name: start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
            cut = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > size]
            shape = tuple(header[cut[0]]["shape"]) if cut else ()
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
    if not cut:
        return None
    name, more = cut[0], f" (nor {len(cut) - 1} more)" if len(cut) > 1 else ""
    return f"is truncated: tensor {name} of shape {shape} must end at byte {ends[name]}{more}; got {size} bytes"


def tensor_shapes(hf_name: str, shape: Shape, *, transposed: bool) -> dict[str, Shape]:
    """Return name -> shape of the tensors that hold one parameter: one per layer if `hf_name` contains `{i}`, else one.

    Args:
        shape: shape of the parameter; stacked parameters have a leading axis Ly.
        transposed: whether the files hold the transposed matrices.
    """
    is_stacked = "{i}" in hf_name
    one = shape[1:] if is_stacked else shape
    return {hf_name.format(i=i): one[::-1] if transposed else one for i in range(shape[0] if is_stacked else 1)}


def check_tensors(files: TensorFiles, expected: Mapping[str, Shape], found: Set[str], model: str) -> None:
    """Check that the files hold exactly the tensors of a model, with their shapes, without reading data.

    Args:
        expected: name -> shape.
        found: names of the tensors in the files.
        model: description of the model for messages, e.g. "a llama with 2 layers".

    Raises:
        FileNotFoundError: a shard named by the index is missing.
        ValueError: a tensor is missing, unexpected, truncated or of another shape.
    """
    for kind, names in (("missing", expected.keys() - found), ("unexpected", found - expected.keys())):
        if names:
            first = min(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lacks = f" of shape {expected[first]}" if first in expected else ""
            raise ValueError(
                f"{files.where(first)}: the tensors must be those of {model}; {kind}: {first}{lacks}{more}"
            )
    for name, shape in expected.items():
        files.check(name, shape)


def read_param(
    files: TensorFiles,
    hf_name: str,
    shape: Shape,
    dtype: np.dtype,
    *,
    transposed: bool,
    sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """Read one parameter: cast, optionally transposed, and stacked over layers if `hf_name` contains `{i}`.

    Each slice is read once and copied to its devices before the next one is read. (`make_array_from_callback` would
    first read the slices of all devices of this process to the host.)

    Args:
        shape: shape of the parameter; stacked parameters have a leading axis Ly. It must fit the tensors.
        dtype: dtype of the result.
        sharding: only the slices of this process's devices are read; None: everything goes to the default device.
    """
    is_stacked = "{i}" in hf_name

    def read(spans: tuple[range, ...]) -> np.ndarray:
        out = np.empty([len(span) for span in spans], dtype)
        inner = tuple(slice(span.start, span.stop) for span in (spans[1:] if is_stacked else spans))
        for i, target in zip(spans[0] if is_stacked else (0,), out if is_stacked else out[None], strict=True):
            tensor = files.read(hf_name.format(i=i), inner[::-1] if transposed else inner)
            target[...] = tensor.T if transposed else tensor
        return out

    if sharding is None:
        return jnp.asarray(read(tuple(map(range, shape))))
    devices_of: dict[tuple[range, ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(range(*axis_slice.indices(size)) for axis_slice, size in zip(index or (), shape, strict=True))
        devices_of.setdefault(spans, []).append(device)
    shards: list[jax.Array] = []
    for spans, devices in devices_of.items():
        shards += jax.block_until_ready(jax.device_put([read(spans)] * len(devices), devices))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


# ---------------------------------------------------------------------------------------- writing


def write_tensors(
    path: Path,
    shapes: Mapping[str, Shape],
    tensor: Callable[[str], np.ndarray],
    *,
    dtype: str,
    max_file_bytes: int = MAX_FILE_BYTES,
    is_writer: bool = True,
) -> None:
    """Write tensors to `model.safetensors`, or to several files with an index; one tensor is in memory at a time.

    Existing weight files in the directory are removed.

    Args:
        path: an existing directory.
        shapes: name -> shape of every tensor, in the order of writing.
        tensor: name -> array of that shape; it is cast to `dtype`.
        dtype: "bfloat16" or "float32".
        max_file_bytes: maximum bytes of tensors per file; a larger tensor gets its own file.
        is_writer: whether this process writes. All processes call `tensor` for every name, because gathering a
            sharded tensor is a collective operation.

    Raises:
        ValueError: `dtype` is neither of them, or an array has another shape.
    """
    code, numpy_dtype = write_dtype(dtype)
    itemsize = np.dtype(numpy_dtype).itemsize
    groups = _split({name: math.prod(shape) * itemsize for name, shape in shapes.items()}, max_file_bytes)
    if is_writer:
        for old in path.iterdir():
            if _WEIGHTS.fullmatch(old.name):
                old.unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = WEIGHTS_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with open_atomic_binary(path / file) if is_writer else contextlib.nullcontext() as out:
            if out is not None:
                out.write(_header({name: shapes[name] for name in names}, code, itemsize))
            for name in names:
                array = tensor(name)
                if array.shape != shapes[name]:
                    raise ValueError(f"tensor {name} must have shape {shapes[name]}; got {array.shape}")
                if out is not None:
                    _write_array(out, array.astype(numpy_dtype, copy=False))
    if is_writer and len(groups) > 1:
        size = sum(math.prod(shape) for shape in shapes.values()) * itemsize
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(path / INDEX_FILE, index)


def write_dtype(dtype: str) -> tuple[str, Any]:
    """Return (name in safetensors, numpy dtype) of a dtype to write.

    Raises:
        ValueError: it is neither "bfloat16" nor "float32".
    """
    if dtype not in WRITE_DTYPES:
        raise ValueError(f"dtype must be one of {sorted(WRITE_DTYPES)}; got {dtype!r}")
    return WRITE_DTYPES[dtype]


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split names into consecutive groups of at most `limit` bytes; a larger tensor forms its own group."""
    groups: list[list[str]] = [[]]
    free = limit
    for name, size in sizes.items():
        if groups[-1] and size > free:
            groups.append([])
            free = limit
        groups[-1].append(name)
        free -= size
    return groups


def _header(shapes: Mapping[str, Shape], code: str, itemsize: int) -> bytes:
    """Return the header of a safetensors file whose tensors follow in the order of `shapes`.

    The format is eight bytes of header length, JSON padded to a multiple of eight bytes, then the data. safetensors'
    own `save_file` is not used because it needs all tensors of a file in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_array(out: BinaryIO, array: np.ndarray) -> None:
    """Append the data of an array in row-major order, as bytes, since numpy exposes no bfloat16 buffer."""
    out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
