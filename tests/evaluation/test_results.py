"""Results: their names, and what a new one may replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.results import load_results, read_result, replaced_result, result_name
from r3rag_jax.run.directory import RunDirectory

FINGERPRINT = {"system": "r3rag", "policy": "rl 1", "questions": "q", "retrieval.top_k": 2}


@pytest.mark.parametrize(
    ("file", "system", "name"),
    [
        ("/data/hotpotqa/dev.jsonl", None, "hotpotqa-dev"),
        ("/data/2wiki/dev.jsonl", None, "2wiki-dev"),
        ("/data/2wiki/dev.jsonl.gz", "ircot", "2wiki-dev-ircot"),
        ("/data/nq/test.v2.parquet", None, "nq-test.v2"),
        ("/data/my data (new)/dev set.JSON", None, "my-data-new-dev-set"),
        ("/data/.cache/dev.jsonl", None, "cache-dev"),
        ("/data/Größe/rl.jsonl", None, "Größe-rl"),
        ("/dev.jsonl", None, "dev"),
        ("/data/plain", None, "data-plain"),
        (None, None, "test"),
        (None, "ircot", "test-ircot"),
    ],
)
def test_a_result_is_named_by_folder_and_file(file: str | None, system: str | None, name: str) -> None:
    assert result_name("", Path(file) if file else None, system) == name
    assert result_name("mine", Path(file) if file else None, system) == "mine"


def test_the_folder_of_a_relative_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "musique" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "musique")
    assert result_name("", Path("dev.jsonl"), None) == "musique-dev"
    monkeypatch.chdir("deep")
    assert result_name("", Path("../dev.jsonl"), None) == "musique-dev"


@pytest.mark.parametrize("given", ["rl", "RL", "r3rag", "cold_start", "closed_book", "naive_rag", "ircot"])
def test_the_runs_own_names_are_refused(given: str) -> None:
    with pytest.raises(UserError, match=rf"--name must be none that the run itself uses \(.*\); got {given}$"):
        result_name(given, None, None)
    with pytest.raises(UserError, match="none that the run itself uses"):
        result_name("", Path(f"/{given}.jsonl"), None)
    assert result_name("", Path(f"/data/{given}.jsonl"), None) == f"data-{given}"


@pytest.mark.parametrize("given", ["a/b", "../x", ".hidden", "a b", "-x", "x\n"])
def test_a_name_is_a_file_name(given: str) -> None:
    with pytest.raises(UserError, match=r"--name must be letters, digits and _\.\+-, not led by a sign; got "):
        result_name(given, None, None)


def test_only_a_result_of_the_same_questions_is_replaced_and_not_without_a_word(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)

    def replaced(**changes: Any) -> str:
        return replaced_result(run, "hotpotqa-dev", FINGERPRINT | changes)

    assert replaced() == ""
    run.evaluation_dir.mkdir()
    path = run.evaluation("hotpotqa-dev")
    path.write_text('{"finger')  # no result
    assert replaced() == "" and read_result(run, "hotpotqa-dev") is None
    path.write_text(json.dumps({"system": "hotpotqa-dev", "fingerprint": FINGERPRINT}))
    assert replaced() == ""
    assert replaced(policy="sft 1") == f"{path} is replaced, which differs in policy"
    changes = {"retrieval.top_k": 5, "policy": "sft 1"}
    assert replaced(**changes) == f"{path} is replaced, which differs in retrieval.top_k, policy"
    with pytest.raises(UserError, match=r"hotpotqa-dev\.json must be a result of the same questions .* --name="):
        replaced(questions="others")


def test_results_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.evaluation_dir.mkdir()
    for name in ("a", "b"):
        run.evaluation(name).write_text(json.dumps({"system": name}))
    run.evaluation("c").write_text("[]")
    assert [result["system"] for result in load_results(run, ["b", "none", "c", "a"])] == ["b", "a"]
