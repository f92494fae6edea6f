"""What a phase was trained from is recorded, and a phase does not go on from something else."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
import tiny_run
from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.run.digests import PROVENANCE_FILE
from r3rag_jax.run.directory import RunDirectory, open_checkpoints, open_run
from r3rag_jax.run.provenance import check_provenance, has_finished, read_provenance

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
FROM_BASE = {"base": "b", "cold_start": "", "data": "d", "corpus": "c"}
FROM_COLD_START = FROM_BASE | {"cold_start": "s"}


def write_policy(directory: Path, provenance: dict[str, str] | None) -> Path:
    directory.mkdir(parents=True)
    if provenance is not None:
        (directory / PROVENANCE_FILE).write_text(json.dumps(provenance))
    return directory


@pytest.mark.parametrize(
    ("recorded", "expected", "words"),
    [
        (FROM_BASE, FROM_COLD_START, r"began from the base model, and this run now has the cold start s\. Choose"),
        (FROM_COLD_START, FROM_BASE, "began from the cold start s, and this run now has the base model"),
        (FROM_COLD_START, FROM_BASE | {"cold_start": "t"}, "the cold start s, and this run now has the cold start t"),
        (FROM_BASE, FROM_BASE | {"base": "x"}, r"^model\.path must be what phase rl began with: here was .*b; got x"),
        (FROM_BASE, FROM_BASE | {"data": "x"}, r"^data\.rl must be what phase rl began with: here was .*d; got x"),
        (FROM_BASE, FROM_BASE | {"corpus": "x"}, r"^data\.corpus must be what .*c; got x.* choose another name="),
    ],
)
def test_each_difference_is_told(recorded: dict[str, str], expected: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_provenance("rl", Path("here"), recorded, expected)


def test_what_is_not_known_is_not_compared(tmp_path: Path) -> None:
    check_provenance("rl", Path("here"), FROM_BASE, FROM_BASE)
    check_provenance("rl", Path("here"), {}, FROM_BASE)
    check_provenance("rl", Path("here"), FROM_BASE, {"cold_start": ""})
    unknown = write_policy(tmp_path / "unknown", None)
    assert read_provenance(unknown) == {} and has_finished(unknown, FROM_BASE)
    (unknown / PROVENANCE_FILE).write_text('{"ba')
    assert read_provenance(unknown) == {}


def test_a_finished_phase_is_of_what_it_began_from(tmp_path: Path) -> None:
    assert not has_finished(tmp_path / "rl", FROM_BASE)
    policy = write_policy(tmp_path / "rl", FROM_COLD_START)
    assert has_finished(policy, FROM_COLD_START)
    assert has_finished(policy, FROM_BASE)  # the cold start's policy was removed since
    with pytest.raises(UserError, match="began from the cold start s, and this run now has the cold start t"):
        has_finished(policy, FROM_BASE | {"cold_start": "t"})


def test_a_phase_resumes_from_checkpoints_of_the_same_origin(tmp_path: Path) -> None:
    state = {"x": jnp.arange(2.0)}
    run, console = RunDirectory(tmp_path), Console(file=io.StringIO())
    flat, cube = (make_mesh(tiny.mesh_config(*sizes)) for sizes in ((8, 1, 1), (2, 2, 2)))
    with open_checkpoints(run, "rl", FROM_BASE, keep=1, mesh=flat, console=console) as checkpoints:
        checkpoints.save(1, state, {"iteration": 1})
    topology = {"mesh": {"data": 8, "fsdp": 1, "tensor": 1}, "processes": 1}
    with open_checkpoints(run, "rl", FROM_BASE, keep=1, mesh=flat, console=console) as again:
        assert again.note() == {"iteration": 1, "provenance": FROM_BASE, "topology": topology}
    assert console.file.getvalue() == ""
    with open_checkpoints(run, "rl", FROM_BASE, keep=1, mesh=cube, console=console) as again:
        assert again.latest == 1
    assert console.file.getvalue() == (
        "rl resumes on another mesh (data=8 fsdp=1 tensor=1, processes=1 before, data=2 fsdp=2 tensor=2, processes=1 "
        "now): numbers are equal within rounding\n"
    )
    with pytest.raises(UserError, match="began from the base model, and this run now has the cold start s"):
        open_checkpoints(run, "rl", FROM_COLD_START, keep=1, mesh=flat, console=console)


@pytest.mark.parametrize("has_policy", [True, False], ids=["finished", "begun"])
def test_no_cold_start_is_trained_after_rl_from_the_base(has_policy: bool, tmp_path: Path) -> None:
    """RL alone first, then all phases: the table would show RL from the base as RL after this cold start."""
    config = Config(run_dir=str(tmp_path / "run"))
    run = open_run(config.replace(phases=("index", "rl")))
    if has_policy:
        write_policy(run.policy("rl"), FROM_BASE)
    else:
        mesh = make_mesh(tiny.mesh_config(8, 1, 1))
        with open_checkpoints(run, "rl", FROM_BASE, keep=1, mesh=mesh, console=Console(quiet=True)) as checkpoints:
            checkpoints.save(1, {"x": jnp.arange(2.0)}, {})
    before = tiny_run.files(tmp_path)
    with pytest.raises(UserError, match=r"phases must not have sft after RL has begun from the base model .*policy/rl"):
        open_run(config)
    assert tiny_run.files(tmp_path) == before
    open_run(config.replace(phases=("index", "rl", "eval")))
    shutil.rmtree(run.policy("rl") if has_policy else run.checkpoints("rl"))
    open_run(config)


def test_a_cold_start_may_be_trained_again(tmp_path: Path) -> None:
    """RL knows the one that it began from: whether this is the same is seen when RL's turn comes."""
    config = Config(run_dir=str(tmp_path / "run"))
    write_policy(RunDirectory(tmp_path / "run").policy("rl"), FROM_COLD_START)
    (tmp_path / "run" / "config.yaml").write_text("name: run\n")
    run = open_run(config)
    assert read_provenance(run.policy("rl")) == FROM_COLD_START and not run.policy("sft").exists()


def test_a_run_records_it_and_an_edited_file_or_a_lost_cold_start_is_noticed(
    finished: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    run = RunDirectory(shutil.copytree(finished("tags"), tmp_path / "run"))
    sft, rl = (read_provenance(run.policy(phase)) for phase in ("sft", "rl"))
    components = tiny_run.open_components(run.path)
    assert (sft["base"], rl["cold_start"]) == (components.digest_of("base"), components.digest_of("sft"))
    assert sft["base"] == rl["base"] != rl["cold_start"] and sft["data"] != rl["data"] and sft["corpus"] == rl["corpus"]
    assert "cold_start" not in sft

    with run.data("rl").open("a") as file:
        file.write('{"id": "new", "question": "Who?", "golden_answers": ["x"]}\n')
    with pytest.raises(UserError, match=r"data\.rl must be what phase rl began with: .*/policy/rl was trained from"):
        tiny_run.train(tmp_path, base)
    shutil.copy(RunDirectory(finished("tags")).data("rl"), run.data("rl"))
    shutil.rmtree(run.policy("rl"))  # as if killed before the end: a checkpoint is left
    shutil.rmtree(run.policy("sft"))
    with pytest.raises(UserError, match=r"checkpoints/rl began from the cold start .* now has the base model"):
        tiny_run.train(tmp_path, base, phases="[index, rl]")
