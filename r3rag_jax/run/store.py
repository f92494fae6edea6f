"""A run directory on Google Cloud Storage: the bucket keeps it, and every host works on a copy on its own disk.

    <cache>/runs/<digest>/<name>/   ◄── pull ──   gs://bucket/…/<name>/      configuration, data, index, metrics, …
                                     ── push ──►
    orbax                            ◄─────────►  gs://bucket/…/<name>/checkpoints/<phase>/      no copy

Weights and indexes are memory-mapped and metrics grow by lines, none of which an object store has. So all code works on
the copy, a run directory like any other. Process 0 uploads what has changed: every `UPLOAD_S` seconds, before each
checkpoint, after each phase and at the end. An object appears whole or not at all. A directory that must be whole
(a policy, the index) has an object `.complete`, which names its files and is written last; without it the directory
counts as missing.

The bucket is the truth. A run that starts makes its copy equal to it, so what a killed machine had not uploaded is
computed again; the checkpoint that it resumes from is never newer than the metrics beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.run.caches import cache_directory
from r3rag_jax.run.files import write_json
from r3rag_jax.run.lock import alone_on_host

SCHEME = "gs://"
UPLOAD_S = 60.0  # pause between two uploads while a run goes on, in seconds
WHOLE = (("policy", "*"), ("index",))  # directories that are complete or missing; * is any name
COMPLETE = ".complete"  # the object that says so
CHECKPOINTS = "checkpoints"  # its subdirectories are orbax's
Version = str  # of an object


def is_remote(place: str) -> bool:
    """Whether a run directory is in a bucket."""
    return place.startswith(SCHEME)


def open_filesystem() -> Any:
    """The fsspec file system of Google Cloud Storage; of the credentials it takes what the machine offers.

    Raises:
        UserError: gcsfs is not installed.
    """
    try:
        importlib.import_module("gcsfs")
    except ImportError as error:
        raise UserError(f"a run directory on gs:// needs gcsfs ({error}): pip install 'r3rag_jax[gcs]'") from error
    return importlib.import_module("fsspec").filesystem("gs")


class Store:
    """A run directory in a bucket, and its copy on this host."""

    def __init__(self, url: str):
        """Names the copy; nothing is read.

        Args:
            url: gs://BUCKET/…/NAME.

        Raises:
            UserError: gcsfs is not installed.
        """
        self.url = url.rstrip("/")
        root = cache_directory("runs") / hashlib.sha256(self.url.encode()).hexdigest()[:12]
        self.copy = root / PurePosixPath(self.url).name
        self._state, self._lock_file = root / "synchronised.json", root / "lock"
        self.filesystem = open_filesystem()
        self._check: Callable[[], None] = lambda: None

    # ---- both directions

    def pull(self, *, discard: bool) -> None:
        """Make the copy equal to the bucket, as far as that has changed.

        Args:
            discard: whether what the copy alone has, or has changed, is dropped: a run that starts. Otherwise it stays.

        Raises:
            UserError: the bucket cannot be read, or the URL holds something else than a run.
        """
        with alone_on_host(self._lock_file), self._reaching():
            known, found = self._read_state(), self._list()
            discard = discard or not found  # the run was removed from the bucket
            complete = self._complete_directories(found)
            files = {name: version for name, version in found.items() if not name.endswith(f"/{COMPLETE}")}
            wanted = {n: version for n, version in files.items() if (top := _whole(n)) is None or top in complete}
            local = self._local_files()
            stale = {
                name
                for name, version in wanted.items()
                if known.get(name, {}).get("version") != version
                or name not in local
                or (discard and local[name] != known[name]["stamp"])
            }
            for directory in sorted({top for name in stale if (top := _whole(name)) is not None}):
                self._download_directory(directory, [n for n in wanted if _whole(n) == directory])
            for name in sorted(name for name in stale if _whole(name) is None):
                self._download(name, self.copy / name)
            gone = {n for n in local.keys() - wanted.keys() if discard or known.get(n, {}).get("stamp") == local[n]}
            self._remove(gone)
            local = self._local_files()
            self._write_state(
                {n: {"version": v, "stamp": local[n]} if n in stale else known[n] for n, v in wanted.items()}
            )

    def push(self) -> None:
        """Upload the files that have changed since the last upload or download.

        Raises:
            UserError: the bucket cannot be written, or another process has taken the run over.
        """
        self._check()
        with alone_on_host(self._lock_file), self._reaching():
            known, local = self._read_state(), self._local_files()
            changed = [name for name, stamp in local.items() if known.get(name, {}).get("stamp") != stamp]
            whole = sorted({top for name in changed if (top := _whole(name)) is not None})
            for name in sorted(name for name in changed if _whole(name) is None):
                self._upload(name)
            for directory in whole:
                self._upload_directory(directory, [name for name in local if _whole(name) == directory])
            if changed:
                found = self._list()
                uploaded = {n for n in local if n in changed or _whole(n) in whole}
                new = {n: {"version": found[n], "stamp": local[n]} for n in uploaded if n in found}
                self._write_state({n: entry for n, entry in known.items() if n in local} | new)

    @contextlib.contextmanager
    def uploading(self, check: Callable[[], None]) -> Iterator[None]:
        """While the block runs, upload every `UPLOAD_S` seconds, and a last time when it ends, however it ends.

        An upload in between that fails is tried again; `push` by others and the last one raise.

        Args:
            check: is called before every upload, and raises a UserError if this process may not write any more.

        Raises:
            UserError: the last upload failed.
        """
        self._check = check
        has_ended = threading.Event()

        def upload() -> None:
            while not has_ended.wait(UPLOAD_S):
                with contextlib.suppress(UserError):
                    self.push()

        thread = threading.Thread(target=upload, name="upload", daemon=True)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()
            self.push()

    # ---- the bucket

    def path(self, name: str) -> str:
        """The URL of a file of the run."""
        return f"{self.url}/{name}"

    def _list(self) -> dict[str, Version]:
        """Every object of the run without checkpoints and locks: name -> version.

        Raises:
            UserError: there are objects, but no run.
        """
        self.filesystem.invalidate_cache()
        found: Mapping[str, dict[str, Any]] = self.filesystem.find(self.url, detail=True)
        prefix = self.filesystem._strip_protocol(self.url).rstrip("/") + "/"
        objects = {key.removeprefix(prefix): info for key, info in found.items() if key.startswith(prefix)}
        versions = {
            name: str(info.get("generation") or info.get("created"))
            for name, info in objects.items()
            if _is_copied(PurePosixPath(name)) or name.endswith(f"/{COMPLETE}")
        }
        if versions and not versions.keys() & {"config.yaml", "metrics.jsonl"}:
            raise UserError(f"{self.url} is not empty and holds no run: choose another name=… or run_dir=…")
        return versions

    def _complete_directories(self, found: Mapping[str, Version]) -> set[str]:
        """The directories that are whole: their `.complete` is there, and every file that it names."""
        markers = [name.removesuffix(f"/{COMPLETE}") for name in found if name.endswith(f"/{COMPLETE}")]
        return {top for top in markers if self._is_complete(top, found)}

    def _is_complete(self, top: str, found: Mapping[str, Version]) -> bool:
        try:
            files = parse_json(self.filesystem.cat_file(self.path(f"{top}/{COMPLETE}")))
        except ValueError:
            return False
        return isinstance(files, list) and all(f"{top}/{file}" in found for file in files)

    def _download(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        self.filesystem.get_file(self.path(name), str(partial))
        partial.replace(target)

    def _download_directory(self, directory: str, names: list[str]) -> None:
        """Replace a directory of the copy, which appears whole."""
        target = self.copy / directory
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name in names:
            self._download(name, partial / PurePosixPath(name).relative_to(directory))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    def _upload(self, name: str) -> None:
        path = self.copy / name
        if path.suffix in (".jsonl", ".yaml", ".json", ".html") or "tensorboard" in path.parts:
            # Read at once: a file that grows while it is uploaded would be longer than announced.
            self.filesystem.pipe_file(self.path(name), path.read_bytes())
        else:
            self.filesystem.put_file(str(path), self.path(name))

    def _upload_directory(self, directory: str, names: list[str]) -> None:
        """Upload a directory that is whole; while that lasts, it counts as missing."""
        marker = self.path(f"{directory}/{COMPLETE}")
        old = self.filesystem.find(self.path(directory)) if self.filesystem.exists(self.path(directory)) else []
        if self.filesystem.exists(marker):
            self.filesystem.rm_file(marker)
        kept = {self.filesystem._strip_protocol(self.path(name)) for name in names}
        for key in old:
            if key not in kept and not key.endswith(f"/{COMPLETE}"):
                self.filesystem.rm_file(key)
        for name in names:
            self._upload(name)
        files = [str(PurePosixPath(name).relative_to(directory)) for name in names]
        self.filesystem.pipe_file(marker, json.dumps(sorted(files)).encode())

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of gcsfs, aiohttp and google.auth, which share no base class
            what = f"{type(error).__name__}: {error}"[:300]
            raise UserError(f"{self.url} must be a place in a bucket that can be read and written; {what}") from error

    # ---- the copy

    def _local_files(self) -> dict[str, list[int]]:
        """Every file of the copy that belongs in the bucket: name -> size, time of change."""
        found = {}
        for path in sorted(self.copy.rglob("*")) if self.copy.exists() else ():
            name = path.relative_to(self.copy)
            if _is_copied(PurePosixPath(name)) and path.is_file():
                stat = path.stat()
                found[name.as_posix()] = [stat.st_size, stat.st_mtime_ns]
        return found

    def _remove(self, names: set[str]) -> None:
        for directory in {top for name in names if (top := _whole(name)) is not None}:
            shutil.rmtree(self.copy / directory, ignore_errors=True)
        for name in names:
            (self.copy / name).unlink(missing_ok=True)

    def _read_state(self) -> dict[str, Any]:
        """What was the same here and in the bucket: name -> version, stamp; nothing is known of a damaged file's."""
        try:
            state = parse_json(self._state.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _write_state(self, state: Mapping[str, Any]) -> None:
        write_json(self._state, state)


def _is_copied(name: PurePosixPath) -> bool:
    """Whether a file of a run is kept in both places: not orbax's, and no lock, scratch or unfinished file."""
    if name.parts[0] == CHECKPOINTS and len(name.parts) > 2:
        return False
    return not any(part.startswith(".") for part in name.parts)


def _whole(name: str) -> str | None:
    """The directory of a file that must be whole; None where the file stands for itself."""
    parts = PurePosixPath(name).parts
    for pattern in WHOLE:
        if len(parts) > len(pattern) and all(p in ("*", part) for p, part in zip(pattern, parts, strict=False)):
            return "/".join(parts[: len(pattern)])
    return None
