"""What a terminal shows of an iteration, the time that remains, and what metrics mean."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from rich.console import Console

from r3rag_jax.run.glossary import GLOSSARY, TIME_PARTS
from r3rag_jax.run.profile import profiled
from r3rag_jax.run.progress import ProgressBar
from r3rag_jax.run.status_lines import duration, live_lines, summary, time_line, time_shares
from r3rag_jax.run.stopwatch import Eta, Stopwatch

DOCS = Path(__file__).parents[2] / "docs" / "reports.md"
METRICS = {
    "reward": 1.25, "reward_outcome": 0.8, "reward_process": 0.5, "reward_format": -0.05, "reward_no_answer": 0.0,
    "em": 0.61, "dev_em": 0.6, "tokens_per_s": 5400.0, "mean_retrievals": 1.9, "search_p50_s": 0.003,
    "search_p95_s": 0.012, "search_failures": 2.0, "staleness": 0.0, "entropy": 0.2, "decoded_per_s": 2100.0,
    "iteration_s": 9.0, "checkpoint_s": 1.0, "prefill_s": 1.0, "decode_s": 4.0, "search_wait_s": 0.5, "score_s": 0.5,
    "update_s": 2.5,
}  # fmt: skip


def test_a_terminal_shows_every_group_and_nothing_that_is_missing() -> None:
    assert summary(METRICS) == {"reward": 1.25, "em": 61.0, "dev_em": 60.0, "tokens_per_s": 5400.0}
    assert live_lines(METRICS | {"eta_s": 5000.0})[-1].endswith("other 5 % · 83 min left")
    assert [duration(seconds) for seconds in (0.4, 89, 91, 11520)] == ["0 s", "89 s", "2 min", "3.2 h"]
    assert live_lines(METRICS) == [
        "reward  answer +0.80 passages +0.50 format -0.05",
        "search  1.90 per question · p50 3 ms · p95 12 ms · 2 failed",
        "policy  entropy 0.200",
        "device  decodes 2,100 tokens/s",
        "time    10.0 s: prefill 10 %, decode 40 %, waiting for search 5 %, scoring 5 %, update 25 %, checkpoint 10 %, "
        "other 5 %",
    ]
    known = live_lines(METRICS | {"mfu": 0.414, "memory_bandwidth": 0.63, "staleness": 1.0})
    assert known[2:4] == [
        "policy  entropy 0.200 · 1 iteration stale",
        "device  decodes 2,100 tokens/s · MFU 41.4 % · memory bandwidth 63 %",
    ]
    old = {"reward": 1.0, "em": 0.5, "tokens_per_s": 10.0}  # a run that was recorded without the rest
    assert live_lines(old) == [] and time_line(old) == ""


def test_the_time_split_adds_up() -> None:
    assert sum(time_shares(METRICS).values()) == pytest.approx(1)
    assert time_shares(METRICS)["other"] == pytest.approx(0.05)
    ahead = time_shares(METRICS | {"staleness": 1.0, "rollout_wait_s": 2.0})  # they were sampled beside the update
    assert "decode" not in ahead and ahead["waiting for rollouts"] == pytest.approx(0.2)
    assert sum(ahead.values()) == pytest.approx(1)
    too_much = time_shares(METRICS | {"update_s": 90.0})  # clocks that overlap
    assert sum(too_much.values()) == pytest.approx(1) and too_much["other"] == 0


def test_lines_below_the_bar_follow_every_line_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=100)
    with ProgressBar("RL", 2, console=console, live=False) as bar:
        bar.show_below(["time  [bold]1 s"])
        bar.advance(em=50.0)
    assert console.file.getvalue() == "RL 1/2  em 50\n  time  [bold]1 s\n"  # type: ignore[attr-defined]


def test_a_terminal_keeps_the_lines_below_the_bar() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with ProgressBar("RL", 2, console=console, live=True) as bar:
        bar.show_below(["time  1 s"])
        bar.advance(em=50.0)
    assert "time  1 s" in console.file.getvalue()  # type: ignore[attr-defined]


def test_seconds_add_up_by_name_also_where_a_block_raises() -> None:
    times = iter([0.0, 2.0, 5.0, 6.5, 10.0, 11.0])
    watch = Stopwatch(lambda: next(times))
    with watch.measure("a"):
        pass
    with pytest.raises(KeyError), watch.measure("b"):
        raise KeyError
    with watch.measure("a"):
        pass
    assert watch.seconds == {"a": 3.0, "b": 1.5}


def test_what_remains_is_told_by_the_pace_after_the_first_step() -> None:
    times = iter([0.0, 60.0, 64.0, 72.0])
    eta = Eta(lambda: next(times))
    assert eta.after(11, 20) == 60 * 9  # the first step, which compiles, is all that is known
    assert eta.after(12, 20) == 4 * 8
    assert eta.after(13, 20) == 6 * 7


def test_a_profile_is_written_of_the_wanted_iteration_alone(tmp_path: Path) -> None:
    with profiled(tmp_path / "none", False):
        pass
    assert not (tmp_path / "none").exists()
    with profiled(tmp_path / "profile", True):
        jax.block_until_ready(jax.numpy.ones(3) + 1)
    assert [path.suffix for path in (tmp_path / "profile").rglob("*.pb")] == [".pb"]


@pytest.mark.parametrize("protocol", ["tags"])
def test_every_logged_metric_is_explained(protocol: str, finished: Callable[[str], Path]) -> None:
    rows = [json.loads(line) for line in (finished(protocol) / "metrics.jsonl").read_text().splitlines()]
    logged = {(name, row["phase"]) for row in rows for name in row if name not in ("phase", "step")}
    assert [(name, phase) for name, phase in logged if phase not in GLOSSARY[name].phases.split(", ")] == []
    last = [row for row in rows if row["phase"] == "rl"][-1]
    assert sum(time_shares(last).values()) == pytest.approx(1)
    assert {*TIME_PARTS, "search_p50_s", "search_p95_s", "search_failures", "staleness", "eta_s"} <= last.keys()
    assert last["eta_s"] == 0 and last["decode_s"] > 0 and last["iteration_s"] > last["update_s"]
    assert not {"mfu", "memory_bandwidth"} & last.keys()  # a CPU is no known chip


def test_docs_explain_the_same_metrics() -> None:
    page = DOCS.read_text("utf-8").partition("\n## Metrics\n")[2]
    table = re.findall(r"^\| `(\w+)` \| ([^|]*) \| (.*) \|$", page, re.MULTILINE)
    assert [(name, unit.strip(), text.strip()) for name, unit, text in table] == [
        (name, meaning.unit, meaning.text) for name, meaning in GLOSSARY.items()
    ]
