"""Leaks between splits: a planted one is found, printed or refused, and splits that share nothing are not accused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from r3rag_jax.config import Config, DataConfig
from r3rag_jax.data.dataset import Dataset
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.leakage import check_leakage, facts_of, find_leaks, names_in
from r3rag_jax.data.questions import read_questions
from r3rag_jax.data.records import OnError, Records
from r3rag_jax.data.wikihop import FILES
from r3rag_jax.errors import UserError
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.types import Question

STEPS = [{"analysis": "Known.", "answer": "x"}]


def row(id: str, text: str, *answers: str, **metadata: Any) -> dict[str, Any]:
    return {"id": id, "question": text, "golden_answers": list(answers or ("x",)), "metadata": metadata}


def records(path: str, *questions: tuple[str, str]) -> Records[Question]:
    rows = [(line, Question(f"q{line}", text, (answer,))) for line, (text, answer) in enumerate(questions, 1)]
    return Records(path, rows)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Was Ludwig van Beethoven born in Bonn?", ["Ludwig van Beethoven", "Bonn"]),
        ("Which of the two is older: Alvar Aalto, or Frank Lloyd Wright?", ["Alvar Aalto", "Frank Lloyd Wright"]),
        ("Barack Obama's wife is who?", ["Barack Obama"]),
        ('Who wrote "The Book of the City of Ladies"?', ["The Book of the City of Ladies"]),
        ("who sings does he love me with reba", []),
        ("Of which country was the Afghan monarch the leader?", ["Afghan"]),
        ("Who is the father of Anne of the", ["Anne"]),
    ],
)
def test_names_are_runs_of_capitalised_words(text: str, names: list[str]) -> None:
    assert names_in(text) == names


def test_facts_come_from_evidence_or_else_from_names() -> None:
    named = Question("q", "Where was Ada Lovelace born?", ("London", "london.", "yes"))
    assert facts_of(named) == [("london", ("name", "ada lovelace"))]
    titled = Question("q", "Where was she born?", ("London",), {"supporting_titles": ["Ada Lovelace"]})
    assert facts_of(titled) == facts_of(named)
    of_corpus = Question("q", "Where was Ada born?", ("London",), {"supporting_ids": [7]})
    assert facts_of(of_corpus) == [("london", ("id", "7"))]


def test_the_same_question_and_the_same_fact_are_found_once_each() -> None:
    learnt = records("rl.jsonl", ("Where was Ada Lovelace born?", "London"), ("Is Ada Lovelace dead?", "yes"))
    held_out = records(
        "test.jsonl",
        ("where was ada lovelace  BORN", "London"),
        ("Name the birthplace of Ada Lovelace.", "London"),
        ("Where did Ada Lovelace marry?", "Ockham"),
        ("Was Ada Lovelace a countess?", "yes"),
        ("Where was Ada Byron born?", "London"),
    )
    assert [(leak.kind, leak.line, leak.other) for leak in find_leaks(held_out, learnt)] == [
        ("question", 1, "rl.jsonl:1"),
        ("answer and entity", 2, "rl.jsonl:1"),
    ]
    assert check_leakage({"rl": learnt, "test": held_out}) == [
        "test.jsonl: 1 of 5 questions of data.test are questions of data.rl: line 1 and rl.jsonl:1 (where was ada "
        "lovelace  BORN)",
        "test.jsonl: 1 of 5 questions of data.test share an answer and an entity with one of data.rl: line 2 and "
        "rl.jsonl:1 (london of ada lovelace)",
    ]
    assert check_leakage({"rl": learnt}) == check_leakage({"dev": learnt}) == []
    assert len(check_leakage({"dev": learnt, "test": held_out})) == 2


def test_wikihops_splits_share_nothing() -> None:
    splits = {name: read_questions(FILES / f"{file}.jsonl.xz") for name, file in (("rl", "train"), ("dev", "dev"))}
    # Without evidence, as its trajectories are: names count.
    splits["sft"] = splits["rl"].map(lambda question: dataclasses.replace(question, metadata={}))
    assert check_leakage(splits) == []
    planted = Records("dev", [(1, splits["rl"][3]), (2, splits["dev"][0])])
    assert [leak.line for leak in find_leaks(planted, splits["rl"])] == [1]


def dataset(tmp_path: Path, leakage: str, phases: tuple[str, ...]) -> tuple[Dataset, list[str]]:
    files = {
        "sft": [row("s0", "Who is A?") | {"steps": STEPS}, row("s1", "Who is B?") | {"steps": STEPS}],
        "rl": [row("r0", "Who is C?"), row("r1", "Where was Ada Lovelace born?", "London")],
        "dev": [row("d0", "who is b")],
        "test": [row("t0", "Who is D?"), row("t1", "In which city was Ada Lovelace born?", "London")],
    }
    for name, rows in files.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    names = {name: f"{name}.jsonl" for name in files}
    data = DataConfig(source="files", dir=str(tmp_path), corpus="corpus.jsonl", leakage=leakage, **names)
    said: list[str] = []
    config = Config(data=data, phases=phases)
    return Dataset(config, RunDirectory(tmp_path), dict, OnError(say=said.append)), said


ALL = ("index", "sft", "rl", "eval")


def test_planted_leaks_are_reported_once(tmp_path: Path) -> None:
    data, said = dataset(tmp_path, "report", ALL)
    assert data.leaks == said and data.leaks is data.leaks
    assert [text.split(": ", 1)[0] for text in said] == [f"{tmp_path}/dev.jsonl", f"{tmp_path}/test.jsonl"]
    assert "1 of 1 questions of data.dev are questions of data.sft: line 1 and" in said[0]
    assert "1 of 2 questions of data.test share an answer and an entity with one of data.rl: line 2 and" in said[1]


def test_planted_leaks_are_refused(tmp_path: Path) -> None:
    data, said = dataset(tmp_path, "refuse", ALL)
    with pytest.raises(
        UserError,
        match=r"^held-out questions must not be learnt from; .*dev\.jsonl: 1 of 1 .*; .*test\.jsonl: 1 of 2 .*",
    ):
        _ = data.leaks
    assert said == []


@pytest.mark.parametrize(
    ("leakage", "phases"), [("off", ALL), ("refuse", ("index",)), ("refuse", ("index", "eval")), ("refuse", ("sft",))]
)
def test_what_is_not_read_is_not_compared(tmp_path: Path, leakage: str, phases: tuple[str, ...]) -> None:
    data, said = dataset(tmp_path, leakage, phases)
    assert data.leaks == said == []
