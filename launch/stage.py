"""Copy models, data and indexes to this host before training: `python launch/stage.py SOURCE=TARGET …`.

SOURCE is a folder that fsspec reads: gs://bucket/path, s3://bucket/path, hf://ORG/NAME, or a local path; TARGET a local
folder. A file that is there with its full size is not copied again, so the same command goes on after a failure.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fsspec

PARTIAL = ".staging"  # suffix of a file that is being copied
BLOCK = 16 * 2**20  # bytes in memory at once


def stage(source: str, target: Path) -> tuple[int, int]:
    """Copy the files of a folder that are missing or of another size; returns how many, and their bytes.

    Raises:
        FileNotFoundError: the source holds no file.
    """
    files, root = fsspec.core.url_to_fs(source)
    found = files.find(root, detail=True)
    if not found:
        raise FileNotFoundError(f"SOURCE must be a folder with files; {source} holds none")
    num_files = num_bytes = 0
    for path, info in sorted(found.items()):
        local = target / Path(path).relative_to(root)
        if local.is_file() and local.stat().st_size == info["size"]:
            continue
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f"{local.name}{PARTIAL}")
        with files.open(path, "rb", block_size=BLOCK) as reader, partial.open("wb") as writer:
            while block := reader.read(BLOCK):
                num_bytes += writer.write(block)
        os.replace(partial, local)
        num_files += 1
    return num_files, num_bytes


def main(argv: Sequence[str]) -> int:
    for argument in argv:
        source, equals, target = argument.rpartition("=")
        if not (source and equals and target):
            print(f"stage.py: arguments must be SOURCE=TARGET; got {argument!r}", file=sys.stderr)
            return 2
        started = time.monotonic()
        try:
            num_files, num_bytes = stage(source, Path(target))
        except (OSError, ImportError, ValueError) as error:  # ValueError: fsspec knows no such protocol
            print(f"stage.py: {source} could not be copied to {target}: {error}", file=sys.stderr)
            return 1
        took = time.monotonic() - started
        print(f"{target}: {num_files} files, {num_bytes / 1e9:.2f} GB copied from {source} in {took:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
