"""Any system on a finished run, by both entry points."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from r3rag_jax import evaluate, experiment
from r3rag_jax.config import load_config
from r3rag_jax.config.evaluation import BASE_SYSTEMS
from r3rag_jax.data.jsonl import read_rows
from r3rag_jax.run.directory import RunDirectory


@pytest.mark.slow
def test_ircot_on_a_finished_run(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a system of the eval phase, and by `evaluate --system`."""
    run = RunDirectory(shutil.copytree(finished("tags"), tmp_path / "run"))
    settings = [f"run_dir={run.path}", "phases=index,eval", "eval.systems=r3rag,ircot"]
    console = Console(record=True, width=200, file=io.StringIO())
    before = run.evaluation("r3rag").read_bytes()
    experiment.run(load_config(run.config_file, settings), console)
    assert "IRCoT" in console.export_text() and "IRCoT" in run.report.read_text()
    assert run.evaluation("r3rag").read_bytes() == before
    rows = [row for _, row in read_rows(run.trajectories("ircot"))]
    assert len(rows) == 4 and all(row["steps"][0]["query"] == row["question"] for row in rows)
    assert json.loads(run.evaluation("ircot").read_text())["groups"]["all"]["retrievals"] >= 1

    assert evaluate.main(["--checkpoint", str(run.path), "--system", "ircot"]) == 0
    assert [row for _, row in read_rows(run.trajectories("test-ircot"))] == rows
    fingerprint = json.loads(run.evaluation("test-ircot").read_text())["fingerprint"]
    assert (fingerprint["policy"].split()[0], fingerprint["system"]) == ("base", "ircot")
    assert "EM" in capsys.readouterr().out
    assert (
        evaluate.main(["--checkpoint", str(run.path), "--system", "ircot", "--name", "first", "eval.max_questions=1"])
        == 0
    )
    assert [row for _, row in read_rows(run.trajectories("first"))] == rows[:1]
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", str(run.path), "--system", "ircod"])


@pytest.mark.slow
def test_every_baseline_on_a_finished_run(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """By the eval phase, and by `evaluate`: the same trajectories."""
    run = RunDirectory(shutil.copytree(finished("tags"), tmp_path / "run"))
    budgets = [f"baselines.{name}.max_tokens=16" for name in ("cot", "rag_cot", "self_ask", "iter_retgen", "react")]
    budgets += ["baselines.ircot.sentence_tokens=16", "baselines.flare.look_ahead=16", "baselines.flare.max_tokens=32"]
    settings = [f"run_dir={run.path}", "phases=index,eval", f"eval.systems={','.join(BASE_SYSTEMS)}", *budgets]
    experiment.run(load_config(run.config_file, settings), Console(quiet=True))
    for name in BASE_SYSTEMS:
        rows = [row for _, row in read_rows(run.trajectories(name))]
        assert len(rows) == 4, name
        assert evaluate.main(["--checkpoint", str(run.path), "--system", name, *budgets]) == 0
        assert [row for _, row in read_rows(run.trajectories(f"test-{name}"))] == rows, name


@pytest.mark.slow
def test_ircot_with_a_trained_policy(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run = RunDirectory(shutil.copytree(finished("tags"), tmp_path / "run"))
    trained = ["--phase", "rl", "--name", "ircot-rl"]
    assert evaluate.main(["--checkpoint", str(run.path), "--system", "ircot", *trained]) == 0
    assert json.loads(run.evaluation("ircot-rl").read_text())["fingerprint"]["policy"].startswith("rl ")
