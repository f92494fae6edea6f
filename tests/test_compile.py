"""`python -m r3rag_jax.compile`: calculated for GPUs in the default run, compiled for a TPU topology with `-m tpu`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from r3rag_jax import compile as entry
from r3rag_jax.compiling import command
from r3rag_jax.compiling.chips import parse_topology
from r3rag_jax.compiling.devices import devices_of, topology_mesh
from r3rag_jax.compiling.report import out_of_memory
from r3rag_jax.parallel.mesh import Sizes

ROOT = Path(__file__).parent.parent
SMALL = {"hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 1536, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 4096}  # fmt: skip
ROWS = ("sft.batch_rows=8", "sft.row_length=256", "rl.batch_rows=8", "rl.row_length=512", "rollout.max_length=512",
        "rollout.max_new_tokens=64", "rollout.slots=16")  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A config.json of Qwen2's kind, and nothing else."""
    real = json.loads((ROOT / "tests" / "fixtures" / "Qwen2.5-7B-Instruct.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(real | SMALL))
    return str(tmp_path / "config.json")


@pytest.fixture(autouse=True)
def platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command keeps to the CPU, which the tests do already."""
    monkeypatch.setattr(command, "use_cpu", lambda: None)


def words(model: str, *more: str) -> list[str]:
    recipe = str(ROOT / "configs" / "r3rag_qwen2.5_7b.yaml")
    return ["--config", recipe, "--model-config", model, *ROWS, *more]


def test_gpus_are_calculated_and_the_report_says_so(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(words(model, "--topology", "h100:8", "mesh.fsdp=8", "--programs", "sft,decode")) == 0
    said = capsys.readouterr()
    assert "sft (calculated)" in said.out and "decode (calculated)" in said.out and "estimated" in said.out
    assert "all numbers are calculated" in " ".join(said.err.split())


def test_what_does_not_fit_ends_with_the_nearest_setting_that_does(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    big = "rollout.slots=1000000"
    assert entry.main(words(model, "--topology", "h100:8", "mesh.fsdp=8", "--programs", "decode", big, "--json")) == 1
    report = json.loads(capsys.readouterr().out)
    assert not all(phase["fits"] for phase in report["phases"])
    [nearest] = report["nearest"]
    name, _, slots = nearest.partition("=")
    assert name == "rollout.slots" and int(slots) < 1000000
    assert entry.main(words(model, "--topology", "h100:8", "mesh.fsdp=8", "--programs", "decode", nearest)) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--topology", "v5e-63"], "--topology must be one of v5e-1"),
        (["--topology", "h100:8", "--programs", "sft,deocde"], "--programs must be among"),
        (["--topology", "h100:8", "mesh.fsdp=3"], "must be the number of devices, 8"),
        (["--topology", "h100:8", "mesh.fsdp=8", "sft.batch_rows=12"], "nearest: sft.batch_rows=16"),
        (["--topology", "h100:8", "--model-config", "nowhere.json"], "--model-config must be a config.json"),
    ],
)
def test_bad_words_end_with_one_line(
    more: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(words(model, *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_machine_without_libtpu_is_told_what_to_install(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    assert entry.main(words(model, "--topology", "v5e:2x2", "mesh.fsdp=4")) == 2
    assert "pip install 'r3rag_jax[tpu]'" in capsys.readouterr().err


def test_an_error_of_xla_about_memory_names_the_temporaries() -> None:
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 33.27G of "
        "15.75G hbm. Exceeded hbm capacity by 17.52G.\n\nProgram hbm requirement 17.31G:\n    HLO temp         17.25G"
    )
    assert out_of_memory(message) == int(17.25 * 2**30)
    assert out_of_memory(message.split("\n")[0]) == int(33.27 * 2**30)
    assert out_of_memory("INTERNAL: something else") is None


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_small_model_compiles_for_a_tpu_topology(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, whose default backend is one CPU device; a minute or two."""
    more = ["--topology", "v5e-4", "mesh.fsdp=4", "model.attention=splash", "--json"]
    compiled = ["--programs", "sft,load,decode", "--save-text", str(tmp_path / "text")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    asked = [sys.executable, "-m", "r3rag_jax.compile", *words(model, *more, *compiled)]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert {file.name for file in (tmp_path / "text").iterdir()} == {"sft.txt", "load.txt", "decode.txt"}
    programs = {program["name"]: program for program in report["programs"]}
    assert report["devices"] == 4 and programs.keys() == {"sft", "load", "decode"}
    assert all(program["is_compiled"] for program in programs.values())
    sft, phases = programs["sft"], {phase["name"]: phase for phase in report["phases"]}
    assert sft["collectives"]["all-gather"]["count_in_loops"] > 0
    # Everything rematerialised: a third more than the model needs, and attention on top.
    assert sft["model_flops"] < sft["flops"] < 2 * sft["model_flops"]
    parts = phases["sft"]["parts"]
    assert parts["parameters"] + parts["optimizer"] == pytest.approx(sft["arguments"], rel=0.01)
    assert parts["temporaries"] == sft["temporaries"] and phases["sft"]["are_compiled"]
    # The start-up plan is the same to the byte, but for the temporaries.
    assert entry.main(words(model, *more, "--programs", "sft", "--calculate")) == 0
    estimated = json.loads(capsys.readouterr().out)["phases"][0]["parts"]
    assert {name: size for name, size in estimated.items() if name != "temporaries"} == {
        name: size for name, size in parts.items() if name != "temporaries"
    }
    # With them the estimate, 1.7 times the compiler's memory, is within a factor of two: the activations of a model
    # this small are in the chip's own memory. Of 7B, see tests/test_recipes.py, the temporaries alone are within 30 %.
    assert 0.5 < sum(estimated.values()) / sum(parts.values()) < 2, (estimated, parts)


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(("topology", "sizes"), [("v6e-32", (1, 16, 2)), ("v5e-64", (1, 16, 4)), ("v5p-32", (1, 8, 2))])
def test_a_mesh_axis_may_be_a_part_of_a_dimension_of_the_network(topology: str, sizes: Sizes) -> None:
    mesh = topology_mesh(devices_of(parse_topology(topology), compiles=True), sizes)
    assert tuple(mesh.shape.values()) == sizes and len({device.id for device in mesh.devices.flat}) == mesh.size
