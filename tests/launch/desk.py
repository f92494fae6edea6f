"""A checkout, a PATH of stand-ins for the clouds' programs, and hosts that evaluate what they are sent."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("tpu_pod.sh", "slurm.sh", "gke.sh")
RECIPES = sorted(path.name for path in (LAUNCH.parent / "configs").glob("*.yaml"))
NASTY = ('prompt.prefix=it\'s "two" words', "x=$HOME `id` \\ *", "y=a;b&&c|d>e", "z=line\nbreak")
SLICE = ("--name", "r3", "--zone", "us-east5-b")
ACCELERATOR = ("--accelerator", "v6e-64")
RECIPE = ("--config", "configs/r3.yaml", "--run-dir", "gs://bucket/r3")
JOB = ("--name", "r3", "--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00")
JOB_RECIPE = ("--config", "configs/r3.yaml")
GKE = (
    *("--name", "r3", "--image", "registry/r3:1", "--accelerator", "v5e-64"),
    *("--config", "configs/quickstart.yaml", "--run-dir", "gs://bucket/r3"),
)

# Appends its argv (and, for sbatch and kubectl apply, its input) to $CALLS. Answers come from $ANSWERS, a JSON
# list of [words that must all be in the call, exit status, standard output, standard error].
STUB = """#!{python} -SE
import json, os, sys
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
stdin = sys.stdin.read() if argv[0] == "sbatch" or "apply" in argv else ""
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
with open({file!r}, "a") as file:
    print(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ)}}), file=file)
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

    def gke(self, *arguments: str, answers: tuple = ()) -> subprocess.CompletedProcess[str]:
        return self.run("gke.sh", *arguments, answers=answers)

    def records(self) -> list[tuple[list[str], str]]:
        file = self.root / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def calls(self) -> list[list[str]]:
        return [argv for argv, _ in self.records()]

    def verbs(self) -> list[str]:
        """Each gcloud call as `group verb`, such as "tpu-vm ssh"."""
        return [" ".join(argv[3:5]) for argv in self.calls()]


def remote_command(argv: list[str]) -> str:
    """The shell text that a `gcloud … ssh` call sends to the hosts."""
    (text,) = [a.removeprefix("--command=") for a in argv if a.startswith("--command=")]
    return text


def run_on_host(desk: Desk, text: str, status: int = 0) -> tuple[int, dict]:
    """Evaluates `text` as a host would, in its home; returns its status and what Python saw when it was last called."""
    done, seen = evaluate(desk, text, status)
    return done, seen[-1]


def evaluate(desk: Desk, text: str, status: int = 0, **environment: str) -> tuple[int, list[dict]]:
    """As `run_on_host`, with all that Python saw, a call each; `status` is the status of each."""
    home = desk.root / "home"
    record = home / "record.jsonl"
    record.unlink(missing_ok=True)
    program = RECORDING_PYTHON.format(python=sys.executable, file=str(record), status=status)
    for path in (home / "r3rag_jax" / ".venv" / "bin" / "python", home / "bin" / "python"):
        write_program(path, program)
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=home,
        env={**clean_environment(), "HOME": str(home), "PATH": path, **environment},
        capture_output=True,
        timeout=30,
        check=False,
    )
    return done.returncode, [json.loads(line) for line in record.read_text().splitlines()]
