"""`launch/slurm.sh`: stand-ins record the calls, a real bash runs the job's script."""

import signal
import subprocess
import time

import pytest
from desk import JOB, JOB_RECIPE, NASTY, Desk, write_program


def submitted(desk: Desk, *arguments: str) -> tuple[list[str], str]:
    """Submits and returns the arguments and the script that sbatch got."""
    done = desk.slurm("run", *JOB, *JOB_RECIPE, *arguments)
    assert done.returncode == 0, done.stderr
    ((argv, script),) = desk.records()
    (desk.root / "calls").unlink()
    return argv, script


def test_run_submits_one_task_a_gpu_that_slurm_may_requeue(desk: Desk) -> None:
    argv, script = submitted(desk, "--partition=h100", "--account=lab", "--sbatch-arg", "--qos=high")
    assert argv[:6] == [
        "sbatch",
        "--job-name=r3",
        "--dependency=singleton",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
    ]
    assert {"--requeue", "--mem=0", "--signal=B:USR1@180", "--partition=h100", "--account=lab"} <= set(argv)
    assert f"--chdir={desk.source}" in argv and argv[-1] == "--qos=high"
    assert "JAX_LOCAL_DEVICE_IDS" not in script
    assert (desk.source / "runs" / "slurm").is_dir()  # without it SLURM drops the log


def test_one_task_a_node_takes_all_gpus_of_the_node(desk: Desk) -> None:
    argv, script = submitted(desk, "--task-per", "node")
    assert "--ntasks-per-node=1" in argv
    assert "env JAX_LOCAL_DEVICE_IDS=0,1,2,3 " in script


def test_dry_run_prints_a_submission_that_can_be_pasted(desk: Desk) -> None:
    printed = desk.slurm("run", *JOB, *JOB_RECIPE, "--dry-run", *NASTY).stdout
    assert desk.calls() == []
    assert not (desk.source / "runs" / "slurm").exists()
    subprocess.run(["bash", "-c", printed], env=desk.environment(), check=True, timeout=30)
    ((argv, script),) = desk.records()
    (desk.root / "calls").unlink()
    assert submitted(desk, *NASTY) == (argv, script)


def test_the_job_sets_up_then_trains_with_the_exact_arguments(desk: Desk) -> None:
    _, script = submitted(desk, "--run-dir", "/scratch/r 3", "--container", "image", *NASTY)
    job = subprocess.run(["bash", "-c", script], env=desk.environment(), timeout=30, check=False)
    assert job.returncode == 0
    setup, training = desk.calls()
    assert setup[:3] == ["srun", "--nodes=1", "--ntasks=1"]
    assert "pip install --quiet -c launch/constraints.txt -e" in setup[-1]
    assert {"--container-image=image", f"--container-workdir={desk.source}"} <= set(training)
    assert training[1] == "--kill-on-bad-exit=1"
    start = training.index("-m")
    assert training[start - 1] == f"{desk.source}/.venv/bin/python"
    assert training[start:][:4] == ["-m", "r3rag_jax.train", "--config", "configs/r3.yaml"]
    assert training[start:][4:] == ["mesh.distributed=true", *NASTY, "run_dir=/scratch/r 3", "stop_s=96"]


@pytest.mark.parametrize(("failing", "calls"), [("flock", 1), ("r3rag_jax.train", 2)])
def test_a_failed_step_fails_the_job_with_its_status(desk: Desk, failing: str, calls: int) -> None:
    _, script = submitted(desk)
    environment = desk.environment((([failing], 6, "", ""),))
    assert subprocess.run(["bash", "-c", script], env=environment, check=False).returncode == 6
    assert [argv[0] for argv in desk.calls()] == ["srun"] * calls


@pytest.mark.parametrize(
    ("number", "at_term", "expected", "requeued"),
    [
        (signal.SIGUSR1, "exit 3", 3, True),
        (signal.SIGUSR1, "exit 0", 0, False),
        (signal.SIGUSR1, ":", 128 + signal.SIGUSR1, True),  # deaf to TERM: not waited for
        (signal.SIGTERM, "exit 3", 3, False),
    ],
)
def test_before_the_limit_the_job_lets_training_save_and_requeues_itself(
    desk: Desk, number: signal.Signals, at_term: str, expected: int, requeued: bool
) -> None:
    """USR1 comes before the time limit, TERM from scancel; only the first may bring a job back."""
    _, script = submitted(desk, "--grace-s=1" if at_term == ":" else "--grace-s=20")
    saved, started = desk.root / "saved", desk.root / "started"
    srun = (
        '#!/bin/bash\ncase "$*" in *r3rag_jax.train*) ;; *) exit 0 ;; esac\n'
        f"trap 'touch {saved}; {at_term}' TERM\ntouch {started}\n"
        "for _ in $(seq 60); do sleep 0.05; done\n"
    )
    write_program(desk.root / "bin" / "srun", srun)
    job = subprocess.Popen(["bash", "-c", script], env=desk.environment())
    deadline = time.monotonic() + 20
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(number)
    assert job.wait(timeout=20) == expected
    assert saved.exists()
    assert desk.calls() == ([["scontrol", "requeue", "77"]] if requeued else [])


def test_setup_builds_the_environment_once(desk: Desk) -> None:
    installs = desk.root / "installs"
    # Stands for `python -m venv DIR`: the new environment's Python counts its calls.
    fake = (
        '#!/bin/bash\nmkdir -p "$3/bin"\n'
        f'printf \'#!/bin/bash\\necho "$*" >>{installs}\\n\' >"$3/bin/python"\n'
        'chmod +x "$3/bin/python"\n'
    )
    write_program(desk.root / "bin" / "fake python", fake)
    for _ in range(2):
        assert desk.slurm("setup", "--python", str(desk.root / "bin" / "fake python")).returncode == 0
    assert installs.read_text() == "-m pip install --quiet -c launch/constraints.txt -e .[cuda,gcs]\n"


def test_a_failed_setup_is_tried_again(desk: Desk) -> None:
    done = desk.slurm("setup", "--python", "/bin/false")
    assert done.returncode == 1
    assert not (desk.source / ".venv" / ".r3rag_jax_ready").exists()


def test_resume_is_the_same_submission_and_failure_of_sbatch_propagates(desk: Desk) -> None:
    first = submitted(desk, *NASTY)
    assert desk.slurm("resume", *JOB, *JOB_RECIPE, *NASTY).returncode == 0
    assert tuple(desk.records()[0]) == first
    nothing: list[str] = []  # every call
    refused = ((nothing, 4, "", "no such partition\n"),)
    done = desk.slurm("run", *JOB, *JOB_RECIPE, answers=refused)
    assert done.returncode == 4 and "no such partition" in done.stderr


def test_cancel_and_status_name_the_job_and_its_owner(desk: Desk) -> None:
    owner = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    for command in ("cancel", "status"):
        assert desk.slurm(command, "--name", "r3").returncode == 0
    assert desk.calls() == [
        ["scancel", "--name=r3", f"--user={owner}"],
        ["squeue", "--name=r3", f"--user={owner}"],
    ]


def test_logs_prints_the_log_of_the_job(desk: Desk) -> None:
    (desk.source / "runs" / "slurm").mkdir()
    (desk.source / "runs" / "slurm" / "r3.out").write_text("step 1\n")
    assert desk.slurm("logs", "--name", "r3").stdout == "step 1\n"


def test_models_are_copied_before_training_in_the_step_that_sets_up(desk: Desk) -> None:
    _, script = submitted(desk, "--stage", "hf://Qwen/Qwen2.5-7B-Instruct=models/my qwen", "--mem=512G")
    assert subprocess.run(["bash", "-c", script], env=desk.environment(), timeout=30, check=False).returncode == 0
    setup, training = desk.calls()
    assert "launch/stage.py 'hf://Qwen/Qwen2.5-7B-Instruct=models/my qwen'" in setup[-1]
    assert "launch/stage.py" not in " ".join(training)


def test_from_nothing_through_the_time_limit_to_the_end(desk: Desk) -> None:
    """The job ends at its limit, SLURM starts the same script again, and training goes on with the same command."""
    _, script = submitted(desk, "--run-dir", "/scratch/r3", "--stage", "gs://b/data=data", *NASTY)
    environment = desk.environment((((["r3rag_jax.train"]), 75, "", ""),))
    assert subprocess.run(["bash", "-c", script], env=environment, timeout=30, check=False).returncode == 75
    assert subprocess.run(["bash", "-c", script], env=desk.environment(), timeout=30, check=False).returncode == 0
    first, second = desk.calls()[:2], desk.calls()[2:]
    assert first == second and "r3rag_jax.train" in first[1]


def test_the_time_to_save_fits_the_grace_period_unless_it_is_given(desk: Desk) -> None:
    assert " stop_s=800" in submitted(desk, "--grace-s=1000")[1]
    given = submitted(desk, "--grace-s=1000", "stop_s=5")[1]
    assert " stop_s=5" in given and "stop_s=800" not in given
