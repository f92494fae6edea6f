"""`launch/gke.sh`: stand-ins record the calls, YAML's parser reads the JobSet, a real bash its command."""

import subprocess
from typing import Any

import pytest
import yaml
from desk import GKE, NASTY, Desk, evaluate


def applied(desk: Desk, *arguments: str) -> dict[str, Any]:
    """Runs and returns the JobSet that kubectl got."""
    done = desk.gke("run", *GKE, *arguments)
    assert done.returncode == 0, done.stderr
    argv, manifest = desk.records()[-1]
    assert argv[:3] == ["kubectl", "--namespace=default", "apply"]
    return yaml.safe_load(manifest)


def pod_of(jobset: dict[str, Any]) -> dict[str, Any]:
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("accelerator", "topology", "hosts", "resources"),
    [
        ("v5e-64", "8x8", 16, {"google.com/tpu": 4}),
        ("v6e-32", "4x8", 8, {"google.com/tpu": 4}),
        ("v5p-32", "2x2x4", 4, {"google.com/tpu": 4}),
        ("v5p-128", "4x4x4", 16, {"google.com/tpu": 4}),
        ("h100-8", None, 1, {"nvidia.com/gpu": 8}),
        ("h100-16", None, 2, {"nvidia.com/gpu": 8}),
    ],
)
def test_the_jobset_asks_for_the_hosts_of_the_slice(
    desk: Desk, accelerator: str, topology: str | None, hosts: int, resources: dict[str, int]
) -> None:
    jobset = applied(desk, "--accelerator", accelerator)
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (1, hosts, hosts, 0)
    pod = pod_of(jobset)
    assert pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology") == topology
    assert pod["containers"][0]["resources"]["limits"] == resources


def test_the_container_stages_and_trains_with_the_exact_arguments(desk: Desk) -> None:
    stage = ("--stage", "gs://b/my models=models/a b", "--env", "TOKEN=a 'b' $c")
    pod = pod_of(applied(desk, *stage, "--spot", "--grace-s=60", "--service-account=trainer", *NASTY))
    (container,) = pod["containers"]
    assert container["command"][:2] == ["bash", "-c"]
    status, (staged, trained) = evaluate(desk, container["command"][2])
    assert status == 0
    assert staged["argv"] == ["launch/stage.py", "gs://b/my models=models/a b"]
    assert trained["argv"][:4] == ["-m", "r3rag_jax.train", "--config", "configs/quickstart.yaml"]
    assert trained["argv"][4:] == ["mesh.distributed=true", *NASTY, "run_dir=gs://bucket/r3", "stop_s=48"]
    assert trained["env"]["TOKEN"] == "a 'b' $c"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert (pod["terminationGracePeriodSeconds"], pod["serviceAccountName"]) == (60, "trainer")


def test_on_gpus_each_host_is_told_the_coordinator_and_its_rank(desk: Desk) -> None:
    pod = pod_of(applied(desk, "--accelerator", "h100-16"))
    _, (trained,) = evaluate(desk, pod["containers"][0]["command"][2], JOB_COMPLETION_INDEX="1")
    assert trained["argv"][-3:] == [
        "mesh.coordinator=r3-slice-0-0.r3:8476", "mesh.num_processes=2", "mesh.process_id=1"
    ]  # fmt: skip


def test_pasting_the_dry_run_makes_the_very_calls_of_the_run(desk: Desk) -> None:
    pasted = desk.gke("run", *GKE, *NASTY, "--dry-run").stdout
    assert desk.calls() == []
    subprocess.run(["bash", "-c", pasted], env=desk.environment(), check=True, timeout=30)
    applied(desk, *NASTY)
    first, second = desk.records()
    assert first == second


def test_nodes_makes_a_pool_a_slice_and_delete_removes_them(desk: Desk) -> None:
    where = ("--cluster", "c", "--location", "us-east5", "--project=p")
    nodes = ("nodes", "--name", "r3", *where, "--accelerator", "v6e-32", "--slices=2", "--spot")
    assert desk.gke(*nodes, "--pool-arg", "--disk-size=500").returncode == 0
    create = [argv for argv in desk.calls() if "create" in argv]
    assert [argv[1:5] for argv in create] == [["container", "node-pools", "create", f"r3-{n}"] for n in range(2)]
    assert {"--machine-type=ct6e-standard-4t", "--num-nodes=8", "--tpu-topology=4x8", "--spot"} <= set(create[0])
    assert create[0][-1] == "--disk-size=500"
    assert desk.gke("delete", "--name", "r3", *where, "--slices=2").returncode == 0
    assert [argv[4] for argv in desk.calls() if argv[2:4] == ["node-pools", "delete"]] == ["r3-0", "r3-1"]


@pytest.mark.parametrize(("accelerator", "extras"), [("v5e-64", "tpu,gcs"), ("h100-8", "cuda,gcs")])
def test_image_is_built_for_the_accelerator_and_pushed(desk: Desk, accelerator: str, extras: str) -> None:
    assert desk.gke("image", "--image", "registry/r3:1", "--accelerator", accelerator).returncode == 0
    build, push = desk.calls()
    assert build[:2] == ["docker", "build"] and f"EXTRAS={extras}" in build
    assert push == ["docker", "push", "registry/r3:1"]


def test_from_nothing_through_a_failure_to_the_end(desk: Desk) -> None:
    first = applied(desk, "--stage", "gs://b/data=data")
    assert first["spec"]["failurePolicy"]["maxRestarts"] == 100  # the set starts again by itself
    assert desk.gke("resume", *GKE, "--stage", "gs://b/data=data").returncode == 0
    (delete, _), (_, second) = desk.records()[-2:]
    assert delete[2:5] == ["delete", "jobset", "r3"]
    assert yaml.safe_load(second) == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("status",), ["get", "jobsets,pods"]),
        (("logs", "--follow"), ["logs", "job/r3-slice-0", "--tail=200", "--follow"]),
        (("stop",), ["delete", "jobset", "r3"]),
    ],
)
def test_the_other_commands_call_kubectl(desk: Desk, arguments: tuple[str, ...], words: list[str]) -> None:
    assert desk.gke(*arguments, "--name", "r3", "--namespace=research").returncode == 0
    (argv,) = desk.calls()
    assert argv[:2] == ["kubectl", "--namespace=research"] and argv[2 : 2 + len(words)] == words
