"""phases_table.py: typed-out numbers of the phases of a run, and of two."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import synthetic_run
from rich.console import Console

from r3rag_jax.reporting.phases_table import phases_of, phases_table
from r3rag_jax.reporting.report_page import report_html
from r3rag_jax.reporting.run_files import Logs, load_run, read_logs
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.phases import PhaseCost

GIB = 2**30


@pytest.fixture
def logs() -> Logs:
    costs = [
        PhaseCost("index", 15.2, 0, "1 x A", None, GIB),
        PhaseCost("rl", 3600.0, 7200, "1 x A", 3 * GIB, 2 * GIB),
    ]
    rates = [{"step": i, "tokens_per_s": rate} for i, rate in enumerate((10.0, 1200.0, 1300.0))]
    return Logs({"rl": [*rates, {"step": 3}]}, {cost.phase: cost for cost in costs})


def test_the_phases_of_a_run(logs: Logs) -> None:
    assert phases_of([logs]).rows == (
        ("Index", "15 s", "—", "—", "—", "1.0"),
        ("RL", "60 min", "1,200", "2", "3.0", "2.0"),
    )


def test_the_mean_of_two_runs_and_the_least_memory(logs: Logs) -> None:
    later = {
        "index": dataclasses.replace(logs.phases["index"], seconds=5.0, host_bytes=2 * GIB),
        "rl": dataclasses.replace(logs.phases["rl"], seconds=1800.0, devices="1 x B", device_bytes=4 * GIB),
        "eval": logs.phases["rl"],  # the first run has none
    }
    other = Logs({"rl": [{"step": 0, "tokens_per_s": 1400.0}]}, later)
    assert phases_of([logs, other]).rows == (
        ("Index", "10 s", "—", "—", "—", "1.0"),
        ("RL", "45 min", "1,300", "3", "3.0", "2.0"),
    )
    assert phases_of([logs, other]).devices == "1 x A, 1 x B"


def test_a_phase_that_took_no_time(logs: Logs) -> None:
    logs.phases["index"] = dataclasses.replace(logs.phases["index"], seconds=0.0)
    assert phases_of([logs]).rows[0] == ("Index", "0 s", "—", "—", "—", "1.0")


def test_a_column_that_nothing_was_measured_of_is_left_out() -> None:
    costs = [PhaseCost("index", 15.2, 0, "2 x cpu", None, GIB), PhaseCost("eval", 10.0, 50, "2 x cpu", None, GIB)]
    phases = phases_of([Logs({}, {cost.phase: cost for cost in costs})])
    assert phases.columns == ("time", "sampled tokens/s", "host GiB")
    assert phases.rows == (("Index", "15 s", "—", "1.0"), ("Evaluation", "10 s", "5", "1.0"))


def test_without_a_phase_there_is_no_table(logs: Logs, tmp_path: Path) -> None:
    assert phases_table([]) is None
    assert phases_table([read_logs(RunDirectory(tmp_path), [])]) is None
    assert phases_table([logs, Logs({}, {})]) is None


def test_a_terminal_and_the_page_show_the_table(tmp_path: Path) -> None:
    run = load_run(synthetic_run.build(tmp_path / "run"))
    console = Console(file=io.StringIO(), width=120)
    console.print(phases_table([Logs(run.metrics, run.phases)]))
    shown = console.file.getvalue()
    assert "Phases on 1 x NVIDIA H100" in shown
    assert shown.splitlines()[4].split() == ["RL", "62", "min", "4,970", "200", "21.0", "5.5"]
    page = report_html(run)
    assert "What each phase took on 1 x NVIDIA H100." in page
    assert '<th scope="row">Evaluation</th><td>61 s</td><td>—</td><td>1,520</td><td>21.0</td><td>5.5</td>' in page
