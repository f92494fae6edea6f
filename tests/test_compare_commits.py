"""The pure functions of `benchmarks/compare_commits.py`; its trainings take minutes, and are not run here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save


def load() -> ModuleType:
    """The script as a module: `benchmarks` is no package."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "compare_commits.py"
    spec = importlib.util.spec_from_file_location("compare_commits", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cc = load()

HELP = """usage: …

  --config FILE  a YAML recipe

rl: Policy gradients against the live retriever.
  key          type         unit  default
  rl.lr        float        -     5e-07  peak learning rate
  rl.kl        section
  rl.kl.coef   float        -     0.01   weight of the KL; without it see rl.entropy_coef

mesh:
  mesh.fsdp    int          -     1      parameter sharding
"""


# -------------------------------------------------------------------------------------- settings


def test_keys_are_read_from_help_without_sections() -> None:
    assert cc.help_keys(HELP) == {"rl.lr", "rl.kl.coef", "mesh.fsdp"}


def test_settings_take_the_names_that_a_commit_has() -> None:
    settings = {"rl.lr": 1e-3, "rl.ahead": True}
    assert cc.translate(settings, {"rl.lr", "rl.ahead"}) == settings
    assert cc.translate(settings, {"rl.lr", "rl.async_rollouts"}) == {"rl.lr": 1e-3, "rl.async_rollouts": True}


def test_a_count_that_starts_at_zero_under_its_later_name_is_shifted() -> None:
    assert cc.translate({"rl.draws": 2}, {"rl.draws"}) == {"rl.draws": 2}
    assert cc.translate({"rl.draws": 2}, {"rl.max_resamples"}) == {"rl.max_resamples": 1}


def test_a_key_without_any_of_its_names_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got none of rl\.ahead, rl\.async_rollouts"):
        cc.translate({"rl.ahead": True}, {"rl.lr"})


def test_every_renamed_key_is_set_by_a_case() -> None:
    used = set(cc.SMALL).union(*(case.settings for case in cc.CASES.values()))
    assert set(cc.RENAMED) <= used


def test_recipes_are_nested() -> None:
    settings = {"seed": 3, "rl.lr": 1, "rl.kl.coef": 2, "rl.kl.target": 4}
    assert cc.nested(settings) == {"seed": 3, "rl": {"lr": 1, "kl": {"coef": 2, "target": 4}}}


# -------------------------------------------------------------------------------------- comparing


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.0}]}, None),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None),
        (float("nan"), float("nan"), None),
        ({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.0000000000000004}]}, "a[1].b: 2.0 -> 2.0000000000000004"),
        ([0.0], [-0.0], "[0]: 0.0 -> -0.0"),
        ({"a": 1}, {"a": 1.0}, "a: 1 -> 1.0"),
        ({"a": 1}, {}, "a: 1 -> (missing)"),
        ({"a": 1}, {"a": 1, "b": None}, "b: (missing) -> None"),
        ([1], [1, 2], "[1]: (missing) -> 2"),
        ({"a": {}}, {"a": []}, "a: {} -> []"),
        ("x" * 99, "y", f"value: '{'x' * 38}… -> 'y'"),
    ],
)
def test_first_difference(old: Any, new: Any, difference: str | None) -> None:
    assert cc.first_difference(old, new) == difference


def lines(*rows: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_metrics_are_compared_without_times() -> None:
    row = {"phase": "rl", "loss": 0.5, "time_s": 1.0, "tokens_per_s": 2.0, "rollout_s": 3.0, "num_compiled": 4.0}
    later = {"phase": "rl", "time_s": 9.0, "loss": 0.5, "num_compiled": 0.0}
    assert cc.compare_lines(lines(row), lines(later), ignores_time=True) is None
    assert cc.compare_lines(lines(row), lines(later)) == "line 1, time_s: 1.0 -> 9.0"
    other = lines(row, later), lines(row, later | {"loss": 0.25})
    assert cc.compare_lines(*other, ignores_time=True) == "line 2, loss: 0.5 -> 0.25"
    assert cc.compare_lines(lines(row), lines(row, row), ignores_time=True) == "1 -> 2 lines"


def test_trajectories_are_compared_byte_for_byte() -> None:
    assert cc.compare_lines('{"a": 1, "b": 2}\n', '{"b": 2, "a": 1}\n') == "line 1, equal values in different bytes"
    assert cc.compare_lines('{"a": 1}\n', '{"a": 1}') == "equal lines with different line ends"


def test_only_newlines_end_a_line() -> None:
    one, two = (json.dumps({"text": "a\u2028b", "n": n}, ensure_ascii=False) + "\n" for n in (1, 2))
    assert cc.compare_lines(one, two) == "line 1, n: 1 -> 2"


def test_evaluations_are_compared_without_their_fingerprint() -> None:
    one = {"fingerprint": {"index": "x"}, "groups": {"all": {"em": 50.0}}}
    two = {"fingerprint": {"index": "y"}, "groups": {"all": {"em": 50.0}}}
    assert cc.compare_evaluations(json.dumps(one), json.dumps(two)) is None
    two["groups"]["all"]["em"] = 37.5
    assert cc.compare_evaluations(json.dumps(one), json.dumps(two)) == "groups.all.em: 50.0 -> 37.5"


def test_tensors() -> None:
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float16)}
    assert cc.compare_tensors(save(weights), save(weights)) is None
    changed = weights | {"a": weights["a"] + np.float32([[0, 0, 0], [0, 0, 1]])}
    assert cc.compare_tensors(save(weights), save(changed)) == "a: 1 of 6 values differ"
    assert cc.compare_tensors(save(weights), save(weights | {"b": np.zeros(2, np.int16)})) == (
        "header.b.dtype: 'F16' -> 'I16'"
    )
    assert cc.compare_tensors(save(weights), save(weights | {"c": np.zeros(1, np.int8)})) == (
        "header.c: (missing) -> {'dtype': 'I8', 'shape': [1], 'data_off…"
    )
    assert cc.compare_tensors(save(weights, {"by": "one"}), save(weights, {"by": "two"})) == (
        "header.__metadata__.by: 'one' -> 'two'"
    )


def write_run(run: Path, **changed: str) -> Path:
    files = {
        "metrics.jsonl": '{"loss": 1.0, "time_s": 2.0}\n',
        "trajectories/rl.jsonl": '{"id": "q"}\n',
        "eval/r3rag.json": '{"num": 1}\n',
        "policy/rl/model.safetensors": save({"a": np.zeros(1, np.int8)}).decode(),
    }
    for name, text in (files | changed).items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    return run


def test_runs_are_compared_file_by_file(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    assert cc.compare_runs(one, write_run(tmp_path / "two")) == dict.fromkeys(cc.FILES)
    two = write_run(tmp_path / "changed", **{"eval/r3rag.json": '{"num": 2}\n', "trajectories/dev.jsonl": ""})
    assert cc.compare_runs(one, two) == dict.fromkeys(cc.FILES) | {
        "eval/*.json": "eval/r3rag.json: num: 1 -> 2",
        "trajectories/*.jsonl": "trajectories/dev.jsonl: only the new run has it",
    }


def test_runs_without_files_are_not_equal(tmp_path: Path) -> None:
    assert set(cc.compare_runs(tmp_path, tmp_path).values()) == {"neither run has such a file"}


# -------------------------------------------------------------------------------------- kept runs


def test_kept_runs_are_taken_only_where_nothing_has_changed(tmp_path: Path) -> None:
    (tmp_path / "tags").mkdir()
    kept = tmp_path / "tags" / "record.json"
    with pytest.raises(ValueError, match="must hold a finished run"):
        cc.check_record(tmp_path, "c0ffee", "tags")
    kept.write_text(json.dumps(cc.record("c0ffee", "tags")))
    cc.check_record(tmp_path, "c0ffee", "tags")
    with pytest.raises(ValueError, match="got commit: 'c0ffee' -> 'decade'"):
        cc.check_record(tmp_path, "decade", "tags")
    with pytest.raises(ValueError, match=r"got settings\."):
        kept.write_text(json.dumps(cc.record("c0ffee", "tags") | {"settings": cc.SMALL | {"rl.lr": 1.0}}))
        cc.check_record(tmp_path, "c0ffee", "tags")
