"""Check that a refactoring changes no result: train small runs with two commits and compare their files.

    python benchmarks/compare_commits.py OLD NEW [--cases tags ppo_lora] [--keep DIR] [--old-runs DIR/old]

OLD and NEW are commits of this repository; `.` is its working tree with all uncommitted changes. Each commit is checked
out into a temporary worktree and trains every case with `python -m r3rag_jax.train`, in separate processes on CPU
devices; the two commits share this interpreter, but no compilation cache. The script then compares `metrics.jsonl`
(without the keys that depend on time), `trajectories/*.jsonl`, `eval/*.json` (without `fingerprint`) and every
`policy/**/*.safetensors`. It prints a table with the first difference of each, and exits with status 1 if there is a
difference or a training fails. The cases use the original name of each configuration key; RENAMED lists the later
names, of which the script uses the one that `--help` of the commit lists. `--keep DIR` keeps the runs in DIR/old and
DIR/new, and the compilation caches. `--old-runs DIR/old` reuses kept runs of OLD, provided that commit, settings,
libraries and processor are the same. With an empty compilation cache, a case takes one to two minutes per commit on 2
cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
WORKING_TREE = "."
TRAIN = "r3rag_jax.train"
FILES = ("metrics.jsonl", "trajectories/*.jsonl", "eval/*.json", "policy/**/*.safetensors")
MAX_SHOWN = 40  # characters of a value in the table
LIMIT_S = 1800  # maximum seconds of a training
CPUINFO = Path("/proc/cpuinfo")

# Settings of all cases. The runs are small, but the cold start is long enough for a policy that retrieves and whose
# answers are sometimes right and sometimes wrong.
SMALL: dict[str, Any] = {
    "world.num_people": 80, "world.num_sft": 100, "world.num_rl": 40, "world.num_dev": 4, "world.num_test": 8,
    "world.waste": 0.1, "world.haste": 0.1, "retrieval.dim": 512,
    "rollout.max_new_tokens": 64, "rollout.max_length": 400, "rollout.slots": 16, "rollout.samples": 4,
    "rollout.temperatures": [1.0, 0.7], "rollout.min_p": 0.05,
    "sft.epochs": 6, "sft.batch_rows": 4, "sft.row_length": 480, "sft.lr": 2e-3, "sft.checkpoint_every": 40,
    "rl.algorithm": "rloo", "rl.iterations": 3, "rl.questions": 4, "rl.batch_rows": 4, "rl.row_length": 512,
    "rl.lr": 3e-4, "rl.eval_every": 2, "rl.checkpoint_every": 2,
    "log.progress": False, "log.trajectories": 100,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A training run that is compared between the commits."""

    settings: dict[str, Any]  # override those of SMALL
    num_processes: int = 1
    num_devices: int = 1  # CPU devices per process


# Together the cases cover every algorithm and most branches of the losses.
CASES = {
    "tags": Case({
        "rl.step_discount": 0.5, "rl.kl_in": "loss", "rl.kl_estimator": "k3", "rl.entropy": 1e-3, "rl.epochs": 2,
    }),
    "steps": Case({
        "rollout.protocol": "steps", "rollout.max_length": 640,
        "sft.epochs": 4, "sft.row_length": 640, "rl.row_length": 768,
        "rewards.process": "embedding", "rl.algorithm": "grpo", "rl.std": True, "rl.draws": 2,
        "rl.loss_mean": "sequence", "rl.truncate_weights": 2.0, "rl.kl_target": 0.05,
    }),
    "ppo_lora": Case({
        "lora.rank": 4, "sft.lr": 1e-2, "model.remat": "full", "model.micro_tokens": 1024,
        "rl.algorithm": "ppo", "rl.critic": "separate", "rl.critic_lr": 1e-3, "rl.lam": 0.95, "rl.value_coef": 0.5,
        "rl.value_clip": 0.3, "rl.whiten_rewards": True,
    }),
    # Rollouts overlap with an update only if no checkpoint and no evaluation comes between them.
    "async_rollouts": Case({
        "rl.ahead": True, "rollout.search_turns": 2, "rl.algorithm": "reinforce++", "rl.iterations": 4,
        "rl.eval_every": 4, "rl.checkpoint_every": 4,
    }),
    # A single mesh axis holds all devices. With two axes, collectives of XLA's CPU runtime can deadlock between
    # processes, because devices may launch those inside and outside the loop over layers in different orders.
    "two_processes": Case({
        "mesh.fsdp": 4, "world.num_test": 2, "eval.systems": ["cold_start", "r3rag"],
        "sft.epochs": 4, "rollout.max_steps": 3, "rl.iterations": 2,
    }, num_processes=2, num_devices=2),
}  # fmt: skip

# Original key -> its later names, oldest first. Only keys that a case sets are listed.
RENAMED: dict[str, tuple[str, ...]] = {
    "world.waste": ("world.needless_retrievals",),
    "world.haste": ("world.lucky_guesses",),
    "retrieval.dim": ("retrieval.encoder.dim",),
    "rollout.search_turns": ("rollout.search_overlap",),
    "rl.ahead": ("rl.async_rollouts",),
    "rl.draws": ("rl.max_resamples",),
    "rl.std": ("rl.normalize_std",),
    "rl.loss_mean": ("rl.loss_aggregation",),
    "rl.truncate_weights": ("rl.max_importance_weight",),
    "rl.entropy": ("rl.entropy_coef",),
    "rl.kl_in": ("rl.kl.placement",),
    "rl.kl_estimator": ("rl.kl.estimator",),
    "rl.kl_target": ("rl.kl.target",),
    "rl.critic": ("rl.critic.kind",),
    "rl.critic_lr": ("rl.critic.lr",),
    "rl.lam": ("rl.critic.gae_lambda",),
    "rl.value_coef": ("rl.critic.value_coef",),
    "rl.value_clip": ("rl.critic.value_clip",),
}
# Later name -> what to add to the value given under the original name.
SHIFTED = {"rl.max_resamples": -1}  # `rl.draws` also counted the first round of sampling


# -------------------------------------------------------------------------------------- settings


def help_keys(text: str) -> set[str]:
    """The dotted keys that `--help` lists, each at the start of an indented line; names of sections are left out."""
    words = set(re.findall(r"^ +([a-z]\w*(?:\.[a-z]\w*)+)(?= |$)", text, re.MULTILINE))
    return {word for word in words if not any(other.startswith(f"{word}.") for other in words)}


def translate(settings: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """Rename the settings to the names in `keys`.

    Raises:
        ValueError: `keys` has none of the names of a setting.
    """
    translated = {}
    for first, value in settings.items():
        names = (first, *RENAMED.get(first, ()))
        known = [name for name in names if name in keys]
        if not known:
            raise ValueError(
                f"--help must list each key of the cases under one of its names; got none of {', '.join(names)}"
            )
        translated[known[0]] = value + SHIFTED[known[0]] if known[0] in SHIFTED else value
    return translated


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert dotted keys to nested sections: {"rl.lr": 1} -> {"rl": {"lr": 1}}."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, key = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[key] = value
    return tree


# -------------------------------------------------------------------------------------- comparing


def is_time_dependent(key: str) -> bool:
    """Whether a metric measures time, or counts compilations, which depend on the cache."""
    return key.endswith("_s") or key in ("num_compiled", "mfu", "memory_bandwidth")


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first difference of two JSON values in key order, as `path: old -> new`; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{path}.{key}" if path else key, old.get(key, _MISSING), new.get(key, _MISSING)) for key in
                 [*old, *(key for key in new if key not in old)]]  # fmt: skip
    elif isinstance(old, list) and isinstance(new, list):
        longest = max(len(old), len(new))
        padded = [[*values, *[_MISSING] * (longest - len(values))] for values in (old, new)]
        pairs = [(f"{path}[{index}]", *values) for index, values in enumerate(zip(*padded, strict=True))]
    else:  # reprs differ for 0.0 and -0.0 and for 1 and 1.0, and are equal for two nan
        return None if repr(old) == repr(new) else f"{path or 'value'}: {_shown(old)} -> {_shown(new)}"
    found = (first_difference(one, two, name) for name, one, two in pairs)
    return next((difference for difference in found if difference is not None), None)


class _Missing:
    def __repr__(self) -> str:
        return "(missing)"


_MISSING = _Missing()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def compare_lines(old: str, new: str, *, ignores_time: bool = False) -> str | None:
    """The first difference of two JSONL texts as `line N, key: old -> new`.

    With `ignores_time`, the comparison is of parsed lines without time-dependent keys; otherwise it is of bytes.
    """
    if old == new:
        return None
    texts = [[line for line in text.split("\n") if line] for text in (old, new)]
    for number, (one, two) in enumerate(zip(*texts, strict=False), 1):
        rows = [json.loads(line) for line in (one, two)]
        if ignores_time:
            rows = [{key: value for key, value in row.items() if not is_time_dependent(key)} for row in rows]
        difference = first_difference(*rows)
        if difference is None and one != two and not ignores_time:
            difference = "equal values in different bytes"
        if difference is not None:
            return f"line {number}, {difference}"
    if len(texts[0]) != len(texts[1]):
        return f"{len(texts[0])} -> {len(texts[1])} lines"
    return None if ignores_time else "equal lines with different line ends"


def compare_evaluations(old: str, new: str) -> str | None:
    """The first difference of two evaluations (JSON texts), except in `fingerprint`."""
    rows = [json.loads(text) for text in (old, new)]
    for row in rows:
        row.pop("fingerprint", None)
    return first_difference(*rows)


def compare_tensors(old: bytes, new: bytes) -> str | None:
    """The first tensor in which two safetensors files differ, or else the first difference of their headers."""
    if old == new:
        return None
    (old_header, old_body), (new_header, new_body) = _split_tensors(old), _split_tensors(new)
    for name, one in old_header.items():
        two = new_header.get(name)
        if name == "__metadata__" or two is None or one["dtype"] != two["dtype"] or one["shape"] != two["shape"]:
            continue  # not a tensor, or not comparable; the comparison of headers below reports it
        array, other = old_body[slice(*one["data_offsets"])], new_body[slice(*two["data_offsets"])]
        if array != other:
            num_values = math.prod(one["shape"])
            return f"{name}: {_count_differing(array, other, num_values)} of {num_values} values differ"
    return first_difference(old_header, new_header, "header") or "equal tensors in different bytes"


def _split_tensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into header and data; its first eight bytes are the length of the header."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _count_differing(old: bytes, new: bytes, num_values: int) -> int:
    size = len(old) // num_values
    return sum(old[start : start + size] != new[start : start + size] for start in range(0, len(old), size))


def compare_files(pattern: str, old: Path, new: Path) -> str | None:
    """The first difference of two files that both match `pattern`, one of FILES."""
    if pattern.endswith(".safetensors"):
        return compare_tensors(old.read_bytes(), new.read_bytes())
    # Bytes are decoded here, because text mode would convert \r\n to \n.
    texts = [path.read_bytes().decode() for path in (old, new)]
    if pattern.endswith(".json"):
        return compare_evaluations(*texts)
    return compare_lines(*texts, ignores_time=pattern == "metrics.jsonl")


def compare_runs(old: Path, new: Path) -> dict[str, str | None]:
    """Compare two run directories: each pattern of FILES -> None, or the name of a file and its first difference.

    It is also a difference if only one run has a file, or if neither run has a file that matches a pattern.
    """
    return {pattern: _compare_pattern(pattern, old, new) for pattern in FILES}


def _compare_pattern(pattern: str, old: Path, new: Path) -> str | None:
    olds, news = ({str(path.relative_to(run)) for path in run.glob(pattern)} for run in (old, new))
    if not olds | news:
        return "neither run has such a file"
    for name in sorted(olds | news):
        if not (name in olds and name in news):
            return f"{name}: only the {'old' if name in olds else 'new'} run has it"
        difference = compare_files(pattern, old / name, new / name)
        if difference is not None:
            return f"{name}: {difference}"
    return None


# --------------------------------------------------------------------------------------- training


class TrainingError(Exception):
    """A training process, or its `--help`, failed or took too long."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two commits to compare."""

    name: str  # old or new
    commit: str  # full hash, or WORKING_TREE
    tree: Path  # the checkout
    runs: Path  # holds one directory per case
    cache: Path  # caches of XLA programs and of compiled kernels

    def environment(self, num_devices: int = 1) -> dict[str, str]:
        """Environment variables of a training: the shell's without those of JAX and XLA, plus this side's paths."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
        devices = f"--xla_force_host_platform_device_count={num_devices}"
        timeout = (
            "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # the default, 40, is too short on a busy machine
        )
        return env | {
            "PYTHONPATH": str(self.tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{devices} {timeout}" if num_devices > 1 else "",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(self.cache),  # compiled kernels
        }


def keys_of(side: Side) -> set[str]:
    """The configuration keys of a commit.

    Raises:
        TrainingError: `--help` of the commit fails.
    """
    shown = subprocess.run([sys.executable, "-m", TRAIN, "--help"], env=side.environment(), cwd=side.cache,
                               capture_output=True, text=True)  # fmt: skip
    if shown.returncode != 0:
        raise TrainingError(f"{side.name}: --help ended with status {shown.returncode}:\n{shown.stderr}")
    return help_keys(shown.stdout)


def train(side: Side, name: str) -> None:
    """Train a case from scratch in `side.runs / name`, which then holds the recipe, `run`, outputs and `record.json`.

    Raises:
        TrainingError: the training or `--help` failed, or the training took longer than LIMIT_S.
        ValueError: the commit lacks a key of the case.
    """
    case, directory = CASES[name], side.runs / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    settings = translate(SMALL | case.settings, keys_of(side))
    (directory / "recipe.yaml").write_text(yaml.safe_dump(nested(settings), sort_keys=False))
    command = [sys.executable, "-m", TRAIN, "--config", "recipe.yaml", "run_dir=run"]
    ranks: list[list[str]] = [[]]
    if case.num_processes > 1:
        pair = ["mesh.distributed=true", f"mesh.num_processes={case.num_processes}"]
        pair += [f"mesh.coordinator=127.0.0.1:{free_port()}"]
        ranks = [[*pair, f"mesh.process_id={rank}"] for rank in range(case.num_processes)]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, overrides in enumerate(ranks):
            output = stack.enter_context((directory / f"output_{rank}.txt").open("w"))
            process = subprocess.Popen([*command, *overrides], env=side.environment(case.num_devices), cwd=directory,
                                       stdout=output, stderr=subprocess.STDOUT)  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)  # callbacks run in reverse order: kill, then wait
            processes.append(process)
        wait(processes, directory)
    (directory / "record.json").write_text(json.dumps(record(side.commit, name), indent=2) + "\n")


def wait(processes: Sequence[subprocess.Popen[bytes]], directory: Path) -> None:
    """Return when all processes have ended with status 0.

    Raises:
        TrainingError: a process ended with another status (the others may then wait for it forever), or they took
            longer than LIMIT_S.
    """
    deadline = time.monotonic() + LIMIT_S
    while True:
        statuses = [process.poll() for process in processes]
        if all(status == 0 for status in statuses):
            return
        failed = next((rank for rank, status in enumerate(statuses) if status), None)
        if failed is not None or time.monotonic() > deadline:
            reason = f"took more than {LIMIT_S} s" if failed is None else f"ended with status {statuses[failed]}"
            output = directory / f"output_{failed or 0}.txt"
            raise TrainingError(f"training {reason}; end of {output}:\n{output.read_text()[-3000:]}")
        time.sleep(0.2)


def free_port() -> int:
    """A TCP port of localhost that is free at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def record(commit: str, name: str) -> dict[str, Any]:
    """Everything on which the results of a run depend."""
    case = CASES[name]
    libraries = ("jax", "jaxlib", "flax", "optax", "numpy", "faiss-cpu", "tokenizers")
    models = re.findall(r"^model name\s*: (.*)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else []
    return {
        "commit": commit,
        "settings": SMALL | case.settings,
        "num_processes": case.num_processes,
        "num_devices": case.num_devices,
        "python": platform.python_version(),
        "libraries": {library: importlib.metadata.version(library) for library in libraries},
        "processor": models[0] if models else platform.machine(),
        "num_cores": os.cpu_count(),
    }


def check_record(runs: Path, commit: str, name: str) -> None:
    """Check that `runs` holds a finished run of the case that can stand in for a new one.

    Raises:
        ValueError: there is none, or its record differs from `record(commit, name)`.
    """
    path = runs / name / "record.json"
    if not path.is_file():
        raise ValueError(f"--old-runs must hold a finished run of each case; got no {path}")
    difference = first_difference(json.loads(path.read_text()), record(commit, name))
    if difference is not None:
        raise ValueError(f"{path} must be of the same commit, settings and machine; got {difference}")


# ------------------------------------------------------------------------------------ entry point


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], check=True, stdout=subprocess.PIPE,
                          text=True).stdout.strip()  # fmt: skip


@contextlib.contextmanager
def open_side(name: str, commit: str, worktrees: Path, kept: Path) -> Iterator[Side]:
    """Check out a commit into a worktree, which is removed at the end; WORKING_TREE is used in place."""
    tree, cache = worktrees / name, kept / "compiled" / f"{name}-{commit[:12].replace(WORKING_TREE, 'working_tree')}"
    cache.mkdir(parents=True, exist_ok=True)
    if commit == WORKING_TREE:
        yield Side(name, commit, REPOSITORY, kept / name, cache)
        return
    git("worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        yield Side(name, commit, tree, kept / name, cache)
    finally:
        git("worktree", "remove", "--force", str(tree))


def compare_case(name: str, old: Side | Path, new: Side) -> dict[str, str | None]:
    """Train a case with both commits and compare the runs; a path `old` is a directory of finished runs."""
    for side in (old, new):
        if isinstance(side, Side):
            started = time.monotonic()
            try:
                train(side, name)
            except (TrainingError, ValueError) as error:
                print(f"{name}, {side.name}: {error}", file=sys.stderr)
                return {"training": f"failed with the {side.name} commit"}
            print(f"{name}, {side.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    runs = old.runs if isinstance(old, Side) else old
    return compare_runs(runs / name / "run", new.runs / name / "run")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("new", metavar="NEW", help="a commit, or . for the working tree")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep runs and compilation caches here")
    parser.add_argument("--old-runs", type=Path, metavar="DIR", help="reuse the runs of OLD that --keep left here")
    args = parser.parse_args(argv)
    old_commit, new_commit = (
        commit if commit == WORKING_TREE else git("rev-parse", "--verify", f"{commit}^{{commit}}")
        for commit in (args.old, args.new)
    )
    if args.old_runs is not None:
        try:
            for name in args.cases:
                check_record(args.old_runs, old_commit, name)
        except ValueError as error:
            parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the worktrees are removed
    is_equal = True
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare_commits-")))
        kept = work if args.keep is None else args.keep.resolve()
        new = stack.enter_context(open_side("new", new_commit, work / "trees", kept))
        old: Side | Path = args.old_runs or stack.enter_context(open_side("old", old_commit, work / "trees", kept))
        print(f"{'case':16}{'what':28}result")
        for name in args.cases:
            for what, difference in compare_case(name, old, new).items():
                is_equal &= difference is None
                print(f"{name:16}{what:28}{difference or 'equal'}", flush=True)
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
