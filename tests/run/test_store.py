"""A run directory in a bucket: what arrives there, in which order, and what a copy takes back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import pytest
from etils.epath.backend import fsspec_backend
from fake_gcs import FakeGCS
from fsspec.implementations.memory import MemoryFileSystem
from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.errors import UserError
from r3rag_jax.run import lease as lease_module
from r3rag_jax.run import store as store_module
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.run.directory import RunDirectory, hold_run, open_run
from r3rag_jax.run.lease import Lease
from r3rag_jax.run.store import Store

URL = "gs://bucket/runs/one"


class Bucket(MemoryFileSystem):
    """Objects in memory under gs:// names; remembers the order of writes and fails where it is told to."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    written: ClassVar[list[str]] = []
    fails_at = ""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **named: Any) -> Any:
        name = path.removeprefix(f"{URL}/")
        if name == self.fails_at:
            raise OSError("the network is gone")
        self.written.append(name)
        return super().pipe_file(path, value, mode, **named)

    def put_file(self, local: str, remote: str, **named: Any) -> None:
        self.pipe_file(remote, Path(local).read_bytes())

    def names(self) -> list[str]:
        return sorted(key.lstrip("/").removeprefix(f"{URL}/") for key in self.store)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    bucket = Bucket()
    bucket.store.clear(), bucket.written.clear()
    monkeypatch.setattr(store_module, "open_filesystem", lambda: bucket)
    monkeypatch.setattr(fsspec_backend, "fs", lambda path: bucket)  # that of epath's gs:// paths
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    yield bucket


def lose_machine(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "machine")


def write(run: RunDirectory, **files: str) -> None:
    """Files of the copy; `__` in a name stands for a slash."""
    for name, text in files.items():
        path = run.path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_run_comes_back_on_another_machine(bucket: Bucket, tmp_path: Path) -> None:
    config = Config(run_dir=URL)
    with hold_run(config) as run:
        assert bucket.names() == [".lock", "config.yaml"]
        write(run, metrics="{}\n", trajectories__rl="x", policy__sft__weights="w", policy__sft__vocab="v")
        write(run, index__vectors="i", checkpoints__bad_step="b", data__rl="d")
        (run.path / ".scratch").mkdir()
        write(run, **{".scratch__half": "?", "eval__.x": "?"})
        assert run.shown(run.evaluation("r3rag")) == f"{URL}/eval/r3rag.json"
        assert str(run.checkpoints("rl")) == f"{URL}/checkpoints/rl"
    expected = ["checkpoints/bad_step", "config.yaml", "data/rl", "index/vectors", "metrics"]
    expected += ["policy/sft/vocab", "policy/sft/weights", "trajectories/rl"]
    assert bucket.names() == sorted([*expected, "index/.complete", "policy/sft/.complete"])
    assert bucket.written.index("policy/sft/.complete") > bucket.written.index("policy/sft/weights")
    lose_machine(tmp_path)
    again = open_run(config)
    assert sorted(str(p.relative_to(again.path)) for p in again.path.rglob("*") if p.is_file()) == expected
    assert again.policy("sft").is_dir() and (again.policy("sft") / "weights").read_text() == "w"


def test_only_what_has_changed_is_uploaded(bucket: Bucket) -> None:
    run = open_run(Config(run_dir=URL))
    write(run, metrics="1\n", data__rl="d", policy__sft__w="w")
    run.publish()
    bucket.written.clear()
    run.publish()
    assert bucket.written == []
    write(run, metrics="1\n2\n", policy__sft__v="v")
    run.publish()
    assert bucket.written == ["metrics", "policy/sft/v", "policy/sft/w", "policy/sft/.complete"]
    shutil.rmtree(run.policy("sft"))
    write(run, policy__sft__v="again")
    run.publish()  # a policy that was trained again: nothing of the old one stays
    assert [name for name in bucket.names() if name.startswith("policy")] == ["policy/sft/.complete", "policy/sft/v"]


def test_half_a_policy_is_none(bucket: Bucket, tmp_path: Path) -> None:
    run = open_run(Config(run_dir=URL))
    write(run, policy__sft__a="a", policy__sft__b="b")
    bucket.fails_at = "policy/sft/b"
    with pytest.raises(UserError, match=r"gs://bucket/runs/one must be a place .* OSError: the network is gone"):
        run.publish()
    assert "policy/sft/a" in bucket.names()
    bucket.fails_at = ""
    lose_machine(tmp_path)
    assert not RunDirectory.at(URL).policy("sft").exists()
    run = open_run(Config(run_dir=URL))
    write(run, policy__sft__a="a", policy__sft__b="b")
    run.publish()
    bucket.rm_file(f"{URL}/policy/sft/b")
    lose_machine(tmp_path)
    assert not RunDirectory.at(URL).policy("sft").exists()  # whoever removed the file, no half is loaded


@pytest.mark.parametrize("marker", [b"", b"{", b"3", b'{"a": 1}', b"[" * 100_000], ids=len)
def test_a_damaged_list_of_files_is_of_half_a_policy(bucket: Bucket, tmp_path: Path, marker: bytes) -> None:
    run = open_run(Config(run_dir=URL))
    write(run, policy__sft__a="a")
    run.publish()
    bucket.pipe_file(f"{URL}/policy/sft/.complete", marker)
    lose_machine(tmp_path)
    assert not RunDirectory.at(URL).policy("sft").exists()


def test_what_was_the_same_is_asked_again_where_its_record_is_damaged(bucket: Bucket, tmp_path: Path) -> None:
    run = open_run(Config(run_dir=URL))
    write(run, metrics="1\n")
    run.publish()
    [record] = [path for path in tmp_path.rglob("*.json") if path.parent != run.path]
    record.write_text("[" * 100_000)
    assert (RunDirectory.at(URL).path / "metrics").read_text() == "1\n"


def test_the_bucket_is_the_truth_for_a_run_that_starts(bucket: Bucket) -> None:
    """A machine that was killed has lines, and a policy, that were never uploaded: they are computed again."""
    config = Config(run_dir=URL)
    run = open_run(config)
    write(run, metrics="1\n", eval__r3rag="old", policy__sft__w="w")
    run.publish()
    write(run, metrics="1\n2\n3\n", policy__rl__w="w")
    bucket.rm_file(f"{URL}/eval/r3rag")
    reader = RunDirectory.at(URL)  # beside the run on its machine, e.g. `ask`: what is written there stays
    assert (reader.path / "metrics").read_text() == "1\n2\n3\n" and reader.policy("rl").exists()
    assert not (reader.path / "eval" / "r3rag").exists()
    with hold_run(config) as run:
        assert (run.path / "metrics").read_text() == "1\n"
        assert run.policy("sft").exists() and not run.policy("rl").exists()


def test_a_run_that_was_removed_from_the_bucket_begins_anew(bucket: Bucket) -> None:
    run = open_run(Config(run_dir=URL))
    write(run, metrics="1\n")  # not uploaded when the machine was killed
    bucket.store.clear()
    with hold_run(Config(run_dir=URL, seed=7)) as run:
        assert [path.name for path in run.path.iterdir()] == ["config.yaml"]


def test_what_is_no_run_is_not_downloaded(bucket: Bucket, tmp_path: Path) -> None:
    bucket.pipe_file(f"{URL}/holiday.mp4", b"0" * 100)
    with pytest.raises(UserError, match=r"gs://bucket/runs/one is not empty and holds no run: choose another name=…"):
        RunDirectory.at(URL)
    assert not list(tmp_path.rglob("holiday.mp4"))


@pytest.mark.parametrize("place", ["s3://bucket/run", "gs://bucket", "https://host/run", "hdfs://x/y"])
def test_other_places_are_refused(place: str) -> None:
    with pytest.raises(UserError, match=r"run_dir must be a path, or gs://BUCKET/… with a folder of the bucket; got"):
        Config(run_dir=place)


def test_one_run_at_a_time(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 0.05)
    lock = f"{URL}/.lock"
    with Lease(bucket, lock, Console(quiet=True)).held():
        first = json.loads(bucket.cat_file(lock))
        with pytest.raises(UserError, match=f"is of {first['owner']}: wait for its end"):
            Lease(bucket, lock, Console(quiet=True))._acquire()
        assert json.loads(bucket.cat_file(lock))["id"] == first["id"]
    assert not bucket.exists(lock)


def test_the_lease_of_a_dead_process_is_taken_over(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BEAT_S", 0.02), ("LEASE_S", 0.1), ("SETTLE_S", 0.01)):
        monkeypatch.setattr(lease_module, name, value)
    lock = f"{URL}/.lock"
    for content in (b'{"owner": "process 7 on another-machine", "id": "x", "beat": 3}', b"rubbish"):
        bucket.pipe_file(lock, content)
        with Lease(bucket, lock, Console(quiet=True)).held():
            assert "owner" in json.loads(bucket.cat_file(lock))
        assert not bucket.exists(lock)


def test_who_lost_the_lease_writes_no_more(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine was frozen for minutes, and another one has gone on with the run."""
    monkeypatch.setattr(lease_module, "BEAT_S", 0.02)
    lock = f"{URL}/.lock"
    lease = Lease(bucket, lock, Console(quiet=True))
    with lease.held():
        lease.check()
        bucket.pipe_file(lock, b'{"owner": "process 7 on another-machine", "id": "x", "beat": 0}')
        end = time.monotonic() + 20
        while lease._lost_to is None and time.monotonic() < end:
            time.sleep(0.01)
        store = Store(URL)
        with (
            pytest.raises(UserError, match="was taken over by process 7 on another-machine"),
            store.uploading(lease.check),
        ):
            write(RunDirectory(store.copy, store), metrics="late\n")
    assert not bucket.exists(f"{URL}/metrics") and b"another-machine" in bucket.cat_file(lock)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs, of a chunk that it uploads
def test_checkpoints_and_files_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs and TensorStore over HTTP, against a server with the API of Google Cloud Storage."""
    with FakeGCS().used_here(monkeypatch, tmp_path / "machine") as gcs:
        with hold_run(Config(run_dir=URL)) as run:
            write(run, metrics="1\n")
            (run.path / "large").write_bytes(bytes(range(256)) * 40_000)
            with Checkpoints(run.checkpoints("sft"), keep=2, before_save=run.publish) as checkpoints:
                for step in (1, 2, 3):
                    checkpoints.save(step, {"x": jnp.full((64, 8), step)}, {"at": step})
        names = gcs.names("bucket/runs/one/")
        assert {name.split("/")[2] for name in names if name.startswith("checkpoints/sft")} == {"2", "3"}
        lose_machine(tmp_path)
        run = RunDirectory.at(URL)
        assert (run.path / "large").read_bytes() == bytes(range(256)) * 40_000
        with Checkpoints(run.checkpoints("sft")) as checkpoints:
            assert (checkpoints.latest, checkpoints.note()) == (3, {"at": 3})
            restored, _ = checkpoints.restore({"x": jnp.zeros((64, 8), int)}, 2)
            assert restored["x"].min() == restored["x"].max() == 2
