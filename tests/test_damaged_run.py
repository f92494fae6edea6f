"""What a run has written and somebody has changed: it is not trained on, and the error names the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import tiny_run

from r3rag_jax import report
from r3rag_jax.errors import UserError

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


@pytest.fixture
def copy(finished: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(finished("tags"), tmp_path / "run")


@pytest.mark.parametrize(("split", "lost"), [("rl", 6), ("test", 1)])
def test_lost_questions(split: str, lost: int, copy: Path) -> None:
    """Six lines of the questions are gone: what is left is a file of questions like any other."""
    file = copy / "data" / f"{split}.jsonl"
    components = tiny_run.open_components(copy)
    assert len(components.dataset.questions(split)) > 0
    file.write_text("".join(file.read_text().splitlines(keepends=True)[lost:]))
    with pytest.raises(UserError, match=rf"data/{split}.jsonl must be the file that the run wrote, .*or remove it"):
        tiny_run.open_components(copy).dataset.questions(split)


def test_lost_trajectories_of_the_cold_start(copy: Path) -> None:
    file = copy / "data" / "sft.jsonl"
    file.write_text(file.read_text().replace("a", "e", 1))
    with pytest.raises(UserError, match=r"data/sft.jsonl must be the file that the run wrote"):
        tiny_run.open_components(copy).dataset.trajectories()


def test_four_flipped_bytes_of_a_policy(copy: Path) -> None:
    """The size is right, and so is the header: every value is a float."""
    weights = copy / "policy" / "sft" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-400:-396] = bytes(byte ^ 1 for byte in content[-400:-396])
    weights.write_bytes(content)
    policy = tiny_run.open_components(copy).policy
    with pytest.raises(UserError, match=r"policy/sft/model.safetensors must be the file that the run wrote, .*remove"):
        policy.load(copy / "policy" / "sft")
    policy.load(copy / "policy" / "rl")


def test_a_report_of_damaged_lines(copy: Path) -> None:
    for name in ("metrics.jsonl", "trajectories/rl.jsonl", "trajectories/r3rag.jsonl"):
        with (copy / name).open("ab") as file:
            file.write(b'garbage\xff\n{"phase": "rl"')
    assert report.main([str(copy)]) == 0
