"""A policy that learns from a built cold start keeps the format as well as one that learns from the oracle's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from openai_server import serve
from scripted_teacher import ScriptedTeacher
from test_layers import PACKAGE

from r3rag_jax.data.questions import read_questions

NUM_TRAJECTORIES, NUM_EVALUATED, ERROR_RATE = 300, 100, 0.3
LIMIT_S = 1500
RECIPE = str(PACKAGE.parent / "configs" / "quickstart.yaml")
# The built analyses quote the sub-questions, and take more room than those of the oracle.
SIZES = ["rollout.max_length=640", "sft.row_length=640", "sft.epochs=6", "log.progress=false"]
EVALUATED = ["phases=index,sft,eval", "eval.systems=cold_start", f"eval.max_questions={NUM_EVALUATED}"]


def run(module: str, *words: str, cwd: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= {"PYTHONPATH": str(PACKAGE.parent), "JAX_PLATFORMS": "cpu", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", f"r3rag_jax.{module}", "--config", RECIPE, *SIZES, *words]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def outcomes(directory: Path) -> Counter[str]:
    """How the evaluated trajectories ended."""
    lines = (directory / "trajectories" / "cold_start.jsonl").read_text("utf-8").splitlines()
    return Counter(json.loads(line)["status"] for line in lines)


@pytest.mark.slow
def test_the_format_rate_is_that_of_the_oracle(tmp_path: Path) -> None:
    oracle, built, mine = (tmp_path / name for name in ("oracle", "built", "mine"))
    run("train", f"run_dir={oracle}", f"world.num_sft={NUM_TRAJECTORIES}", *EVALUATED, cwd=tmp_path)
    # Questions of the same split, more than are needed.
    files = [f"data.{name}={oracle / 'data' / file}.jsonl" for name, file in (("corpus", "corpus"), ("test", "test"))]
    index = f"retrieval.index_dir={oracle / 'index'}"
    questions = read_questions(oracle / "data" / "rl.jsonl")[:700]
    with serve(ScriptedTeacher(questions, ERROR_RATE).reply) as server:
        run(
            "coldstart", "data.source=files", *files, index, f"coldstart.questions={oracle / 'data' / 'rl.jsonl'}",
            f"coldstart.dir={built}", f"coldstart.teacher.url={server.url}", "coldstart.teacher.model=m",
            "coldstart.max_questions=700", f"coldstart.num_trajectories={NUM_TRAJECTORIES}", cwd=tmp_path,
        )  # fmt: skip
    summary = json.loads((built / "summary.json").read_text())
    assert summary["accepted"] == NUM_TRAJECTORIES < 0.85 * summary["attempts"]
    run(
        "train", f"run_dir={mine}", "data.source=files", *files, index,
        f"data.sft={built / 'trajectories.jsonl'}", *EVALUATED, cwd=tmp_path,
    )  # fmt: skip
    expected, found = outcomes(oracle), outcomes(mine)
    print(f"{summary['attempts']} attempts; oracle {dict(expected)}, built {dict(found)}")
    assert found["FORMAT_ERROR"] <= expected["FORMAT_ERROR"] + 2
    assert found["ANSWERED"] >= 0.9 * expected["ANSWERED"]
