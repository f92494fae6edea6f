"""A small share of `python -m tests.fuzz`, the same cases each time; a million of them take the command."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.target import Target, WrongResultError, run_cases
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
ids = [target.name for target in TARGETS]


def failures_of(target: Target, directory: Path, seed: int, num_cases: int) -> dict[str, str]:
    outcome = run_cases(target, target.open(directory), seed, range(num_cases))
    assert outcome.counts["read"] and outcome.counts["refused"], "the cases are all alike"
    return outcome.failures


@pytest.mark.parametrize("target", TARGETS, ids=ids)
def test_whatever_is_read_is_right_and_whatever_is_refused_is_named(target: Target, tmp_path: Path) -> None:
    assert failures_of(target, tmp_path, 0, 60) == {}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=ids)
def test_more_of_them(target: Target, tmp_path: Path) -> None:
    assert failures_of(target, tmp_path, 1, 50 * target.weight) == {}


def test_a_crash_and_a_wrong_result_are_failures(tmp_path: Path) -> None:
    def run(rng: random.Random) -> str:
        draw = rng.random()
        if draw < 0.1:
            raise KeyError("a bug")
        if draw < 0.2:
            raise WrongResultError("another text")
        return "read"

    outcome = run_cases(Target("x", 1, lambda path: run), run, 7, range(200))
    assert 20 < outcome.counts["failed"] < 60 and outcome.counts["read"] == 200 - outcome.counts["failed"]
    assert {key.partition(" at ")[0] for key in outcome.failures} == {"KeyError", "WrongResultError"}
    words = next(text for key, text in outcome.failures.items() if key.startswith("KeyError")).splitlines()[0].split()
    again = run_cases(Target("x", 1, lambda path: run), run, 7, [int(words[words.index("--first") + 1])])
    assert again.counts["failed"] == 1  # the case repeats


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "200", "--seed", "5"]
    command += ["--only", "protocols", "model configs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "199 cases, 0 failed"
