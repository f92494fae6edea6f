"""A checkout, and stand-ins for the clouds' programs."""

import sys
from pathlib import Path

import pytest
from desk import STUB, Desk, git, write_program


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path)
    for name in ("gcloud", "sbatch", "srun", "scancel", "squeue", "scontrol", "kubectl", "docker"):
        write_program(tmp_path / "bin" / name, STUB.format(python=sys.executable))
    (tmp_path / "tmp").mkdir()
    (desk.source / "configs").mkdir(parents=True)
    (desk.source / "configs" / "r3.yaml").write_text("name: r3\n")
    (desk.source / ".gitignore").write_text("runs/\n")
    (desk.source / "runs").mkdir()
    (desk.source / "runs" / "big.bin").write_text("not to be copied")
    git(desk.source, "init", "-q")
    return desk
