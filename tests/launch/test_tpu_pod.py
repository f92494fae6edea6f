"""`launch/tpu_pod.sh`: stand-ins record the calls, a real bash evaluates what they send."""

import shlex
import subprocess

import pytest
from desk import (
    ACCELERATOR,
    NASTY,
    RECIPE,
    SLICE,
    Desk,
    evaluate,
    git,
    remote_command,
    run_on_host,
    write_program,
)  # fmt: skip


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
    assert "pip install --quiet -c launch/constraints.txt -e '.[tpu,gcs]'" in install
    assert subprocess.run(["bash", "-n", "-c", install], check=False).returncode == 0


def test_setup_from_a_git_server_fetches_and_installs_on_the_host(desk: Desk) -> None:
    git(desk.source, "add", ".")
    git(desk.source, "commit", "-qm", "m")
    assert desk.tpu("setup", *SLICE, "--repo-url", str(desk.source)).returncode == 0
    assert desk.verbs() == ["tpu-vm ssh"]
    text = remote_command(desk.calls()[0]).replace("python3 -m pip", "echo pip")
    status, seen = run_on_host(desk, text)
    assert status == 0
    assert seen["argv"] == ["-m", "pip", "install", "--quiet", "-c", "launch/constraints.txt", "-e", ".[tpu,gcs]"]
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


def test_googles_name_of_a_v5e_slice_is_found(desk: Desk) -> None:
    assert desk.tpu("create", *SLICE, "--accelerator", "v5e-64").returncode == 0
    assert {"--accelerator-type=v5litepod-64", "--version=v2-alpha-tpuv5-lite"} <= set(desk.calls()[0])


def test_several_slices_are_one_request_and_every_host_of_each_trains(desk: Desk) -> None:
    active = ((["queued-resources", "describe"], 0, "ACTIVE\n", ""),)
    done = desk.tpu("up", *SLICE, *ACCELERATOR, *RECIPE, "--slices=2", "--queued", answers=active)
    assert done.returncode == 0, done.stderr
    create, _, *rest = desk.calls()
    assert {"--node-count=2", "--node-prefix=r3"} <= set(create)
    assert [argv[5].split(":")[0] if argv[4] == "ssh" else argv[6].split(":")[0] for argv in rest[:2]] == [
        "r3-0",
        "r3-1",
    ]
    setup, training = rest[2:4], rest[4:]
    assert sorted(argv[5] for argv in setup) == sorted(argv[5] for argv in training) == ["r3-0", "r3-1"]
    assert len({remote_command(argv) for argv in training}) == 1


def test_one_failed_slice_fails_the_command(desk: Desk) -> None:
    answers = ((["r3-1"], 7, "", ""),)
    assert desk.tpu("run", *SLICE, *RECIPE, "--slices=2", "--queued", answers=answers).returncode == 7


def test_from_nothing_through_a_preemption_to_the_end(desk: Desk) -> None:
    """Training ends with a status of its own when the slice is taken; `resume` makes it anew and runs the same."""
    queued = ("--queued", "--spot", "--stage", "gs://b/my models=models/a b")
    arguments = (*SLICE, *ACCELERATOR, *RECIPE, *queued, *NASTY)
    active = (["queued-resources", "describe"], 0, "ACTIVE\n", "")
    preempted = (["r3rag_jax.train"], 75, "", "saved\n")
    assert desk.tpu("up", *arguments, answers=(active, preempted)).returncode == 75
    first = remote_command(desk.calls()[-1])
    gone = (["tpu-vm", "describe"], 1, "", "NOT_FOUND")
    assert desk.tpu("resume", *arguments, answers=(active, gone)).returncode == 0
    assert desk.verbs()[-6:] == [
        *("queued-resources delete", "queued-resources create", "queued-resources describe"),
        *("tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"),
    ]
    assert remote_command(desk.calls()[-1]) == first
    status, (staged, trained) = evaluate(desk, first)
    assert status == 0
    assert staged["argv"] == ["launch/stage.py", "gs://b/my models=models/a b"]
    assert trained["argv"][4:] == ["mesh.distributed=true", *NASTY, "run_dir=gs://bucket/r3"]


def test_a_failed_copy_starts_no_training(desk: Desk) -> None:
    desk.tpu("run", *SLICE, *RECIPE, "--stage", "gs://b/x=models")
    status, seen = evaluate(desk, remote_command(desk.calls()[0]), status=4)
    assert status == 4
    assert [call["argv"] for call in seen] == [["launch/stage.py", "gs://b/x=models"]]
