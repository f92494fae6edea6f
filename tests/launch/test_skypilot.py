"""`launch/skypilot.yaml`: a real bash runs its sections as SkyPilot's hosts do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from desk import LAUNCH, RECIPES, RECORDING_PYTHON, Desk, clean_environment, write_program

TASK = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
RUN_DIR = "gs://bucket/r3"


def run_on_node(desk: Desk, section: str, status: int = 0, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Evaluates a section on a node; returns its status, and what the environment's Python saw, a call each."""
    record = desk.root / "record.jsonl"
    record.unlink(missing_ok=True)
    program = RECORDING_PYTHON.format(python=sys.executable, file=str(record), status=status)
    write_program(desk.source / ".venv" / "bin" / "python", program)
    envs = {name: value for name, value in TASK["envs"].items() if value is not None} | {"RUN_DIR": RUN_DIR}
    done = subprocess.run(
        ["bash", "-c", TASK[section]],
        cwd=desk.source,
        env={**clean_environment(), **envs, "SKYPILOT_NUM_NODES": "1", **environment},
        capture_output=True,
        timeout=30,
        check=False,
    )
    return done.returncode, [json.loads(line) for line in record.read_text().splitlines()]


def test_the_task_is_spot_recovers_and_must_be_told_the_run_directory() -> None:
    assert TASK["resources"]["use_spot"] and TASK["resources"]["job_recovery"]["strategy"]
    assert TASK["envs"]["RUN_DIR"] is None
    assert Path(TASK["envs"]["CONFIG"]).name in RECIPES


def test_one_node_stages_then_trains(desk: Desk) -> None:
    stage = "gs://b/models=models gs://b/data=data"
    status, (staged, trained) = run_on_node(desk, "run", STAGE=stage, OVERRIDES="rl.lr=1e-6 name=x")
    assert status == 0
    assert staged["argv"] == ["launch/stage.py", *stage.split()]
    assert trained["argv"] == [
        *("-m", "r3rag_jax.train", "--config", TASK["envs"]["CONFIG"], f"run_dir={RUN_DIR}", "rl.lr=1e-6", "name=x")
    ]


def test_several_nodes_are_told_the_coordinator_and_their_rank(desk: Desk) -> None:
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    _, (trained,) = run_on_node(desk, "run", **nodes)
    assert trained["argv"][5:] == [
        *("mesh.distributed=true", "mesh.coordinator=10.0.0.1:8476", "mesh.num_processes=2", "mesh.process_id=1")
    ]


def test_tpu_hosts_find_each_other_by_themselves(desk: Desk) -> None:
    _, (trained,) = run_on_node(desk, "run", EXTRA="tpu", SKYPILOT_NUM_NODES="8")
    assert trained["argv"][5:] == ["mesh.distributed=true"]


def test_from_nothing_through_a_preemption_to_the_end(desk: Desk) -> None:
    """SkyPilot starts a preempted job again: both sections run anew, with the same arguments."""
    assert run_on_node(desk, "run", status=75)[0] == 75
    ended, first = run_on_node(desk, "run")
    assert ended == 0
    assert run_on_node(desk, "run")[1] == first


def test_a_failed_copy_starts_no_training(desk: Desk) -> None:
    status, seen = run_on_node(desk, "run", status=4, STAGE="gs://b/x=models")
    assert status == 4 and [call["argv"] for call in seen] == [["launch/stage.py", "gs://b/x=models"]]


@pytest.mark.parametrize(("extra", "extras"), [("cuda", ".[cuda,gcs]"), ("tpu", ".[tpu,gcs]")])
def test_setup_installs_into_an_environment_that_it_keeps(desk: Desk, extra: str, extras: str) -> None:
    write_program(desk.root / "bin" / "python3", "#!/bin/bash\nexit 0\n")
    path = f"{desk.root / 'bin'}:/usr/bin:/bin"
    status, (installed,) = run_on_node(desk, "setup", EXTRA=extra, PATH=path)
    assert status == 0
    assert installed["argv"] == ["-m", "pip", "install", "--quiet", "-c", "launch/constraints.txt", "-e", extras]
