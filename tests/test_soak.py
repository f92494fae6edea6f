"""A minute of `benchmarks/soak.py`; its hour is in docs/reliability.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_a_minute_under_faults_loses_and_grows_nothing() -> None:
    words = ["--minutes", "1", "--load", "0.5", "--report-s", "10", "--seed", "3"]
    done = subprocess.run([sys.executable, str(SOAK), *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()
    assert last[-1] == "nothing is lost, wrong or grown" and "status 500" in last[-2]
