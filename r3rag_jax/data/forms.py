"""The forms of a file of records, told by its first bytes: JSON Lines, a JSON array of objects, a table, or Parquet.

JSON and tables are UTF-8, with or without a byte order mark, and may be compressed by gzip, bzip2, xz or zstd. The name
of a file says nothing. `pyarrow`, which reads Parquet and zstd, is imported when it is needed.

An array may be the member "Data" of one object, as in TriviaQA's files. A table is TSV or CSV: its first line names the
fields (`id<tab>text<tab>title` in DPR's `psgs_w100.tsv`), at least two words; a field may stand in double quotes.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from r3rag_jax.data.fields import FieldError, Row, kind_of
from r3rag_jax.errors import UserError
from r3rag_jax.json_text import is_unicode, parse_json, parse_json_at

BOM = b"\xef\xbb\xbf"  # UTF-8's byte order mark
PARQUET = b"PAR1"
WRAPPER = "Data"  # the member of one object that holds the records
WRAPPED = re.compile(rb'\s*\{\s*("%s"\s*:\s*\[.*)?' % WRAPPER.encode(), re.DOTALL)  # the first line of such a file


def _open_zstd(path: Path) -> IO[bytes]:
    """A zstd file, decompressed as it is read. Python has no module for it before 3.14."""
    return io.BufferedReader(_import_pyarrow(path, "zstd").input_stream(str(path), compression="zstd"), 1 << 20)


COMPRESSIONS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
REFUSED = {  # first bytes -> what the file is, and what to do with it
    b"PK\x03\x04": "a zip archive: unzip it",
    b"ARROW1": "an Arrow file: write it as Parquet or JSON Lines",
    b"\xff\xfe": "UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
}
MAX_HEADER = 10_000  # characters of a table's first line
_BLANK = " \t\r\n"  # what JSON takes for white space


def read_objects(path: str | Path) -> Iterator[tuple[int, Row | FieldError]]:
    """Yield (line from 1, JSON object) of every record; a FieldError in place of one that is not an object.

    The line of an element of an array is the one on which it begins; of Parquet it is the number of the row.

    Raises:
        UserError: the file cannot be read, is in no form that is read, or ends in the middle.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
        for magic, remedy in REFUSED.items():
            if head.startswith(magic):
                raise UserError(f"{path}: expected JSON in UTF-8, or Parquet; got {remedy}")
        if head.startswith(PARQUET):
            yield from _parquet(path)
            return
        is_compressed = [open for magic, open in COMPRESSIONS.items() if head.startswith(magic)]
        with is_compressed[0](path) if is_compressed else path.open("rb") as file:
            first = next(file, b"").removeprefix(BOM)
            if names := _header(first):
                yield from _table(path, names, "\t" if b"\t" in first else ",", file)
            else:
                yield from _json(path, itertools.chain([first], file), file)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: expected a whole compressed file; {error}") from error
    except OSError as error:
        raise UserError(f"{path}: expected a readable file of records; {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------- JSON


def _json(path: Path, lines: Iterable[bytes], file: IO[bytes]) -> Iterator[tuple[int, Row | FieldError]]:
    """One array, alone or as a member of an object, if the first line that is not blank begins so; else JSON Lines."""
    lines = iter(lines)
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(BOM)
        if not line.strip():
            continue
        if line.lstrip().startswith(b"["):
            text = _decoded(path, number, line + file.read())
            end = yield from _elements(path, number, text, text.index("["))
            if _skip_blank(text, end) < len(text):
                line_of_end = number + text.count("\n", 0, end)
                raise UserError(f"{path}:{line_of_end}: expected one JSON array; something follows it")
            return
        if WRAPPED.fullmatch(line):
            rest = line + file.read()
            if (start := _wrapped_array(rest)) is not None:
                text = _decoded(path, number, rest)
                yield from _elements(path, number + text.count("\n", 0, start), text, start)
                return
            yield from _json_lines(number, rest.split(b"\n"))
            return
        yield from _json_lines(number, itertools.chain([line], lines))
        return


def _json_lines(first: int, lines: Iterable[bytes]) -> Iterator[tuple[int, Row | FieldError]]:
    """JSON Lines from line `first` on; blank ones count, but are no records."""
    for number, line in enumerate(lines, first):
        line = line.removeprefix(BOM)  # files that were joined have one in the middle
        if line.strip():
            yield number, _line(line)


def _line(line: bytes) -> Row | FieldError:
    """The object of one line."""
    try:
        text = line.decode("utf-8")
        return _object(parse_json(text), text)
    except UnicodeDecodeError as error:
        return FieldError(f"expected UTF-8; got byte {line[error.start]:#04x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return FieldError(f"expected one JSON object per line; {error.msg} at column {error.colno}")
    except ValueError as error:
        return FieldError(f"expected one JSON object per line; {error}")


def _decoded(path: Path, number: int, data: bytes) -> str:
    """The text of a file from line `number` on."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: expected UTF-8; got byte {data[error.start]:#04x}") from error


def _wrapped_array(data: bytes) -> int | None:
    """Where the array begins, in characters, that is the member "Data" of one object; None if there is no such object.

    What follows the array is not read.
    """
    text = data.decode("utf-8", "replace")
    end = text.index("{")
    try:
        while text[end : end + 1] in ("{", ","):
            name, end = parse_json_at(text, _skip_blank(text, end + 1))
            start = _skip_blank(text, _skip_blank(text, end) + 1)  # behind the colon
            if name == WRAPPER and text[start : start + 1] == "[":
                return start
            end = _skip_blank(text, parse_json_at(text, start)[1])
    except ValueError:  # no JSON: the reader of lines says where
        return None
    return None


def _elements(path: Path, number: int, text: str, start: int) -> Generator[tuple[int, Row | FieldError], None, int]:
    """The elements of the array that begins at `start`, on line `number`, and where it ends; a fault in its syntax ends
    the reading.
    """
    end = start + 1
    counted = start  # up to here line ends have been counted
    while True:
        start = _skip_blank(text, end)
        number, counted = number + text.count("\n", counted, start), start
        if text[start : start + 1] == "]":
            return start + 1
        try:
            item, end = parse_json_at(text, start)
        except json.JSONDecodeError as error:
            line = number + text.count("\n", counted, error.pos)
            raise UserError(f"{path}:{line}: expected a JSON array of objects; {error.msg}") from error
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected a JSON array of objects; {error}") from error
        yield number, _object(item, text[start:end])
        comma = _skip_blank(text, end)
        if text[comma : comma + 1] not in (",", "]"):
            line = number + text.count("\n", counted, comma)
            raise UserError(f"{path}:{line}: expected a JSON array of objects; expecting ',' or ']'")
        end = comma + 1 if text[comma] == "," else comma


def _skip_blank(text: str, start: int) -> int:
    """The first position from `start` on that is not blank."""
    while start < len(text) and text[start] in _BLANK:
        start += 1
    return start


def _object(value: Any, source: str) -> Row | FieldError:
    """A parsed value, which must be an object of Unicode text; `source` is its JSON."""
    if not is_unicode(value, source):
        return FieldError("expected Unicode text; got a lone surrogate escape")
    return value if isinstance(value, dict) else FieldError(f"expected a JSON object; got {kind_of(value)}")


# ----------------------------------------------------------------------------------------- tables


def _header(line: bytes) -> list[str]:
    """The names of the fields of a table that begins with this line; empty if it is no such line."""
    text = line[: MAX_HEADER + 1].decode("utf-8", "replace").rstrip("\r\n")
    if len(text) > MAX_HEADER or "\r" in text:  # a record, not names; for the csv module a carriage return ends a line
        return []
    names = [name.strip() for name in next(csv.reader([text], delimiter="\t" if "\t" in text else ","), [])]
    is_header = 1 < len(names) == len(set(names)) and all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in names)
    return names if is_header else []


def _table(path: Path, names: Sequence[str], delimiter: str, file: IO[bytes]) -> Iterator[tuple[int, Row | FieldError]]:
    """The rows behind the header, with the line on which each begins."""
    number = 2

    def texts() -> Iterator[str]:
        for line, data in enumerate(file, 2):
            try:
                yield data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{line}: expected UTF-8; got byte {data[error.start]:#04x}") from error

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}:{number}: expected the fields {', '.join(names)}; {error}") from error
        if row and len(row) != len(names):
            yield number, FieldError(f"expected {len(names)} fields, {', '.join(names)}; got {len(row)}")
        elif row:
            yield number, dict(zip(names, row, strict=True))
        number = reader.line_num + 2


# ---------------------------------------------------------------------------------------- Parquet


def _parquet(path: Path) -> Iterator[tuple[int, Row | FieldError]]:
    """The rows of a Parquet file, a few at a time."""
    pyarrow = _import_pyarrow(path, "Parquet")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _plain_row(row)
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path}: expected a whole Parquet file; {error}") from error


def _import_pyarrow(path: Path, form: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: a {form} file needs the package pyarrow: pip install pyarrow, or write it as JSON Lines"
        ) from None
    return pyarrow


def _plain_row(row: Row) -> Row | FieldError:
    try:
        return _plain(row)
    except UnicodeDecodeError as error:
        return FieldError(f"expected UTF-8; got byte {error.object[error.start]:#04x}")


def _plain(value: Any) -> Any:
    """A value of Parquet as one that JSON has: times and decimals become text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):  # how some writers store text
        return value.decode("utf-8")
    return value if value is None or isinstance(value, str | int | float) else str(value)
