"""phases.py: what each phase took, also where a process ends in the middle of one."""

from __future__ import annotations

import resource
from pathlib import Path

import jax
import pytest

from r3rag_jax.data.jsonl import read_rows
from r3rag_jax.run import phases
from r3rag_jax.run.phases import PhaseCost, phase_costs, recorded


def test_a_row_for_each_time_that_something_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counts = iter((10.0, 14.5, 20.0, 21.0, 30.0, 30.25)), iter((100, 160, 160, 160, 160, 170))
    monkeypatch.setattr(phases.time, "monotonic", lambda: next(clock))
    path, sampled = tmp_path / "phases.jsonl", lambda: next(counts)
    with recorded(path, "rl", sampled) as work:
        pass
    assert work.seconds == 4.5
    with recorded(path, "rl", sampled) as work:
        work.is_new = False
    next(counts)
    with pytest.raises(KeyboardInterrupt), recorded(path, "rl", sampled):
        raise KeyboardInterrupt
    rows = [row for _, row in read_rows(path)]
    assert [(row["phase"], row["seconds"], row["sampled"]) for row in rows] == [("rl", 4.5, 60), ("rl", 0.25, 10)]
    assert rows[0]["devices"] == f"{jax.device_count()} x cpu"
    assert rows[0]["device_bytes"] is None  # CPUs do not say
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert most / 2 < rows[0]["host_bytes"] <= most


def test_what_ended_the_phase_is_reported_where_no_row_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), recorded(tmp_path / "gone" / "phases.jsonl", "rl", lambda: 0):
        raise KeyboardInterrupt
    with pytest.raises(OSError, match=r"phases\.jsonl"), recorded(tmp_path / "gone" / "phases.jsonl", "rl", lambda: 0):
        pass


def test_what_several_processes_took_adds_up() -> None:
    rows = [
        {"phase": "sft", "seconds": 5.0, "sampled": 0, "devices": "1 x A", "device_bytes": 7, "host_bytes": 9},
        {"phase": "rl", "seconds": 4.0, "sampled": 60, "devices": "1 x A", "device_bytes": 8, "host_bytes": 9},
        {"phase": "rl", "seconds": 2.5, "sampled": 10, "devices": "2 x A", "device_bytes": None, "host_bytes": 3},
    ]
    unknown = [{}, {"phase": "rl"}, {**rows[0], "seconds": "x"}, {**rows[0], "phase": 1}, {**rows[0], "sampled": None}]
    costs = phase_costs([*unknown, *rows])
    assert list(costs) == ["sft", "rl"] and costs["sft"].seconds == 5
    assert costs["rl"] == PhaseCost("rl", 6.5, 70, "2 x A", 8, 9)
    assert phase_costs([{**row, "device_bytes": None} for row in rows])["rl"].device_bytes is None
