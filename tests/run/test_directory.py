"""The run directory: its paths, and its protection from other settings."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, NoReturn

import jax
import pytest
import tiny_run

from r3rag_jax.config import (
    Config,
    ConfigError,
    CriticConfig,
    EvalConfig,
    GuardsConfig,
    KLConfig,
    LogConfig,
    MeshConfig,
    RLConfig,
    RolloutConfig,
    ServerConfig,
    load_config,
)
from r3rag_jax.errors import UserError, user_message
from r3rag_jax.run.directory import RunDirectory, open_run

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def test_every_path_of_a_run_has_its_place(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    paths = {
        "config.yaml": run.config_file,
        ".lock": run.lock,
        "metrics.jsonl": run.metrics_file,
        "phases.jsonl": run.phases_file,
        "report.html": run.report,
        "judgements.jsonl": run.judgements,
        "digests.json": run.digests,
        "index": run.index,
        "data/corpus.jsonl": run.data("corpus"),
        "checkpoints/rl": run.checkpoints("rl"),
        "checkpoints/bad_step_sft_3.npz": run.bad_step("sft_3"),
        "policy/sft": run.policy("sft"),
        "eval/r3rag.json": run.evaluation("r3rag"),
        "trajectories/rl.jsonl": run.trajectories("rl"),
    }
    for name, path in paths.items():
        assert path == tmp_path / name
    assert list(tmp_path.iterdir()) == []  # naming a path makes nothing


def test_a_finished_run_has_nothing_elsewhere(finished: Any) -> None:
    run = RunDirectory(finished("tags"))
    known = [run.config_file, run.lock, run.metrics_file, run.phases_file, run.report, run.digests, run.index]
    known += [run.data_dir, run.policy("x").parent, run.checkpoints("x").parent, run.evaluation_dir, run.trajectory_dir]
    assert {path.name for path in run.path.iterdir()} == {path.name for path in known}


def test_a_new_directory_records_its_configuration(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path / "deep" / "run"), rl=RLConfig(lr=3e-6))
    assert open_run(config) == RunDirectory(tmp_path / "deep" / "run")
    assert load_config(tmp_path / "deep" / "run" / "config.yaml") == config
    assert list(tiny_run.files(tmp_path)) == ["deep/run/config.yaml"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"phases": ("eval",)},
        {"eval": EvalConfig(max_questions=3)},
        {"mesh": MeshConfig(fsdp=2)},
        {"log": LogConfig(progress=False)},
        {"rollout": RolloutConfig(slots=3)},
        {"guards": GuardsConfig(kl=1.0, action="stop")},
        {"phases": ("index",), "rollout": RolloutConfig(server=ServerConfig(url="http://host/v1", model="policy"))},
    ],
    ids=str,
)
def test_what_computes_the_same_may_change(change: dict[str, Any], tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path / "run"))
    open_run(config)
    (tmp_path / "run" / "metrics.jsonl").write_text("kept")
    open_run(config.replace(**change))
    assert load_config(tmp_path / "run" / "config.yaml") == config.replace(**change)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "kept"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"rl": RLConfig(kl=KLConfig(coef=0.5))}, "rl.kl.coef was 0.01, now 0.5"),
        ({"rl": RLConfig(critic=CriticConfig(kind="head"))}, "rl.critic.kind was 'separate', now 'head'"),
        ({"rollout": RolloutConfig(max_steps=3)}, "rollout.max_steps was 5, now 3"),
        ({"name": "other"}, "name was 'run', now 'other'"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path / "run"))
    open_run(config)
    before = tiny_run.files(tmp_path)
    with pytest.raises(UserError) as caught:
        open_run(config.replace(**change))
    assert words in str(caught.value) and str(tmp_path / "run") in str(caught.value)
    assert tiny_run.files(tmp_path) == before


def test_a_run_with_keys_that_were_renamed_is_refused_with_the_first_of_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: run\nworld:\n  waste: 0.25\nrl:\n  kl: 0.0\n")
    before = tiny_run.files(tmp_path)
    with pytest.raises(UserError) as caught:
        open_run(Config(run_dir=str(tmp_path)))
    assert "holds a run with a configuration that cannot be read: unknown key 'world.waste'" in str(caught.value)
    assert "config.yaml:3); its new name is world.needless_retrievals; choose another name=" in str(caught.value)
    assert tiny_run.files(tmp_path) == before


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_run(Config(run_dir=str(tmp_path)))
    assert tiny_run.files(tmp_path) == {"thesis.tex": b"mine"}


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(UserError, match=rf"run_dir must be a directory, or a new one; {file} is a file"):
        open_run(Config(run_dir=str(file)))
    with pytest.raises(NotADirectoryError) as caught:
        open_run(Config(run_dir=str(file / "below")))
    assert str(user_message(caught.value)).endswith(
        "must be a place that can be read and written; got: Not a directory"
    )
    assert file.read_text() == "mine"
    with pytest.raises(ConfigError, match="run_dir must not hold the character NUL"):
        load_config(None, ["run_dir=a\0b"])


def test_a_directory_that_is_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError) as caught:
        open_run(Config(run_dir=str(tmp_path / "run")))
    assert "config.yaml" in str(user_message(caught.value)) and "Read-only file system" in str(caught.value)


def test_a_killed_start_does_not_block_the_next(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.4242.partial").write_text("seed: ")
    open_run(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config
