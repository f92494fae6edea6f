"""Checkpoints: what is saved comes back, on whatever mesh, and a broken save is never the newest."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from r3rag_jax.config import SFTConfig
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.training import optimizer
from r3rag_jax.training.state import TrainState, init_state

NOTE = {"batches": {"rows": 16, "examples": 40, "plan": 123}, "iteration": 2}


def state_on(sizes: tuple[int, int, int], scale: float = 1.0) -> TrainState:
    """A training state whose optimizer has moved, on a mesh of these sizes."""
    params = jax.tree.map(lambda x: scale * x, nnx.split(tiny.decoder(272))[1])
    tx = optimizer.sft_optimizer(SFTConfig(lr=1e-3), 10)
    state = init_state(make_mesh(tiny.mesh_config(*sizes)), params, tx)
    return jax.tree.map(lambda x: x + jnp.asarray(scale, x.dtype), state)


def assert_equal_but_for_layout(one: object, other: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def test_another_mesh_restores_the_same_numbers(tmp_path: Path) -> None:
    saved = state_on((8, 1, 1))
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "sft")
    assert checkpoints.latest is None and checkpoints.note() is None
    checkpoints.save(3, saved, NOTE)
    checkpoints.close()
    for sizes in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
        like = state_on(sizes, scale=0.0)
        reader = Checkpoints(tmp_path / "checkpoints" / "sft")
        assert reader.latest == 3
        restored, note = reader.restore(like)
        assert note == reader.note() == NOTE
        assert_equal_but_for_layout(restored, saved)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
        reader.close()


def test_the_newest_is_kept_and_phases_are_apart(tmp_path: Path) -> None:
    state = {"x": jnp.arange(4.0)}
    sft, rl = Checkpoints(tmp_path / "checkpoints" / "sft"), Checkpoints(tmp_path / "checkpoints" / "rl")
    sft.save(2, state, {"at": 2})
    sft.save(4, {"x": jnp.arange(4.0) + 1}, {"at": 4})
    rl.save(1, state, {"at": 1})
    assert (sft.latest, rl.latest) == (4, 1)
    assert sft.note() == {"at": 4}
    restored, _ = sft.restore(state)
    assert restored["x"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "sft").iterdir() if p.name.isdigit()) == ["4"]
    sft.close(), rl.close()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that are donated before the checkpoint is complete are saved as they were."""
    path = tmp_path / "checkpoints" / "sft"
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"x": jnp.zeros((512, 256)), "n": jnp.zeros((), jnp.int32)}
    order: list[str] = []
    with Checkpoints(path, keep=2, before_save=lambda: order.append("files")) as checkpoints:
        write = checkpoints._manager.save
        monkeypatch.setattr(
            checkpoints._manager, "save", lambda *args, **named: (order.append("checkpoint"), write(*args, **named))
        )
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"at": step})
            assert checkpoints.latest == step
            for _ in range(3):
                state = update(state)
        assert checkpoints.note() == {"at": 3}
    assert order == ["files", "checkpoint"] * 3
    assert sorted(p.name for p in path.iterdir()) == ["2", "3"]
    with Checkpoints(path) as reader:
        for step, value in ((2, 3), (3, 6)):
            restored, note = reader.restore(state, step)
            assert (float(restored["x"].min()), float(restored["x"].max())) == (value, value)
            assert (int(restored["n"]), note) == (value, {"at": step})


def test_a_half_written_step_does_not_count(tmp_path: Path) -> None:
    state = {"x": jnp.arange(4.0)}
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "rl")
    checkpoints.save(2, state, {"at": 2})
    checkpoints.close()
    partial = tmp_path / "checkpoints" / "rl" / "3.orbax-checkpoint-tmp-0"  # what a killed save leaves behind
    (partial / "state").mkdir(parents=True)
    reader = Checkpoints(tmp_path / "checkpoints" / "rl", read_only=True)
    assert reader.latest == 2
    assert reader.restore(state)[1] == {"at": 2}
    reader.close()
    left = tmp_path / "checkpoints" / "rl" / "4.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    with Checkpoints(tmp_path / "checkpoints" / "rl", read_only=True):
        assert left.exists()  # another process may be writing it
    with Checkpoints(tmp_path / "checkpoints" / "rl") as owner:
        owner.save(4, state, {"at": 4})
    assert sorted(p.name for p in left.parent.iterdir() if p != partial) == ["4"]


def test_a_full_disk_is_reported_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 256 bytes to file 4: No space left [os_error_code='28']")

    with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(OSError, match="No space left on device") as raised:
            checkpoints.save(1, {"x": jnp.zeros(4)}, {})
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "sft")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.restore({"x": jnp.zeros(4)})
    checkpoints.save(1, {"x": jnp.zeros(4)}, {})
    with pytest.raises(UserError, match=r"checkpoints/sft/1 does not fit this configuration"):
        checkpoints.restore({"x": jnp.zeros(5)})
    with pytest.raises(UserError, match=r"checkpoints/sft/1 does not fit this configuration"):
        checkpoints.restore({"x": jnp.zeros(4), "y": jnp.zeros(1)})
    checkpoints.close()


def damage(path: Path, what: str) -> None:
    """Change a checkpoint: four bytes of its largest array file, its note, or all of its array files are lost."""
    if what == "lost":
        shutil.rmtree(path / "state")
        return
    files = [path / "note" / "metadata"] if what == "note" else [f for f in path.rglob("d/*") if f.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(byte ^ 0x55 for byte in content[middle : middle + 4])
    file.write_bytes(content)


@pytest.mark.parametrize("what", ["bytes", "note", "lost"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(what: str, tmp_path: Path) -> None:
    state = {"x": jax.random.normal(jax.random.key(0), (64, 32))}
    with Checkpoints(tmp_path / "rl", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, jax.tree.map(lambda x, step=step: x * step, state), {"at": step})
    damage(tmp_path / "rl" / "2", what)
    said: list[str] = []
    with Checkpoints(tmp_path / "rl", keep=2, read_only=True) as reader:
        assert reader.restore(state)[1] == {"at": 1}
    assert (tmp_path / "rl" / "2").exists()  # it may be another process's
    with Checkpoints(tmp_path / "rl", keep=2, say=said.append) as checkpoints:
        assert checkpoints.note() == {"at": 1 if what == "note" else 2}
        restored, note = checkpoints.restore(state)
        np.testing.assert_array_equal(restored["x"], state["x"])
        assert (note, checkpoints.latest) == ({"at": 1}, 1)
        checkpoints.save(2, state, {"at": 22})
        assert checkpoints.note() == {"at": 22}
    [sentence] = said
    assert f"checkpoint {tmp_path}/rl/2 " in sentence and "damaged" in sentence
    assert sentence.endswith("it is deleted, and the checkpoint before, 1, is taken")


def test_where_no_checkpoint_is_whole_nothing_is_deleted(tmp_path: Path) -> None:
    state = {"x": jnp.arange(4000.0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    damage(tmp_path / "1", "bytes")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore(state)
    assert f"checkpoint {tmp_path}/1 " in str(caught.value) and "from the beginning of the phase" in str(caught.value)
    assert (tmp_path / "1").exists()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    state, kept = {"x": jnp.arange(4.0)}, lambda: sorted(int(path.name) for path in tmp_path.iterdir())
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        for step, score in ((1, 0.5), (2, 0.75), (3, None), (4, 0.25)):
            checkpoints.save(step, state, {}, score=score)
    assert kept() == [2, 3, 4]
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:  # of a process that goes on
        checkpoints.save(5, state, {}, score=0.5)
        checkpoints.save(6, state, {}, score=0.75)  # as good, and newer
        checkpoints.save(7, state, {})
        checkpoints.save(8, state, {})
    assert kept() == [6, 7, 8]


def test_without_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"x": jnp.zeros(1000), "n": jnp.int32(0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"at": 1})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4003))
            with pytest.raises(UserError, match=r"must have 4,004 bytes free for a checkpoint; got 4,003: make room"):
                checkpoints.save(2, state, {"at": 2})
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        checkpoints.save(2, state, {"at": 2})
