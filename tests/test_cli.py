"""The command line: what a user gets wrong is one line on stderr, status 2, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_run

from r3rag_jax import ask, evaluate, train
from r3rag_jax.config.schema import schema

Main = Callable[[Sequence[str]], int]


def run_module(name: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m r3rag_jax.<name>` as a user's shell runs it."""
    root = str(Path(train.__file__).parent.parent)
    command = [sys.executable, "-m", f"r3rag_jax.{name}", *argv]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)


def error_line(main: Main, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    try:
        status: object = main(argv)
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    return tiny_run.write_recipe(tmp_path, base)


# ------------------------------------------------------------------------------- real processes


def test_a_wrong_key_in_a_real_process(recipe: Path, tmp_path: Path) -> None:
    before = tiny_run.files(tmp_path)
    done = run_module("train", "--config", str(recipe), "rl.itertions=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: unknown key 'rl.itertions' (override 'rl.itertions=3'); did you mean 'rl.iterations'?\n"
    )
    assert tiny_run.files(tmp_path) == before


def test_a_fault_behind_the_command_line_in_a_real_process(recipe: Path, tmp_path: Path) -> None:
    done = run_module("train", "--config", str(recipe), "mesh.fsdp=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: mesh.data * mesh.fsdp * mesh.tensor must be the number of devices, 8")
    assert done.stderr.count("\n") == 1


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        train.main(["--help"])
    shown = capsys.readouterr()
    assert exit.value.code == 0
    assert shown.err == ""
    words = set(shown.out.split())
    assert [name for name in schema() if name not in words] == []
    assert "--config" in shown.out


# ----------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.itertions=3", "did you mean 'rl.iterations'?"),
        ("rl.iterations=many", "rl.iterations must be an integer; got 'many'"),
        ("rl.clip=-1", "rl.clip must be at least 0; got -1.0"),
        ("model.path=nowhere", "model.path must be a Hugging Face directory with config.json; got nowhere"),
        ("rollout.protocol=tag", "rollout.protocol must be one of tags, steps, search_r1; got 'tag'"),
        ("world.num_dev=100000", "world.num_dev must be at most what the split holds"),
        ("sft.row_length=64", "every sample must fit a row of sft.row_length=64 tokens"),
        ("--resume", "unknown flag '--resume'"),
    ],
)
def test_wrong_settings(override: str, words: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in error_line(train.main, ["--config", str(recipe), override], capsys)


def test_a_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quickstart.yaml").write_text("seed: 1\n")
    line = error_line(train.main, ["--config", str(tmp_path / "quickstrt.yaml")], capsys)
    assert "no such file; did you mean" in line and "quickstart.yaml?" in line
    assert "--config" in error_line(train.main, [], capsys)


def test_a_wrong_line_of_a_recipe_is_placed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text("seed: 1\nrl:\n  clip: yes\n")
    assert f"{recipe}:3: rl.clip must be a finite number; got yes" in error_line(
        train.main, ["--config", str(recipe)], capsys
    )


def test_other_settings_for_an_existing_run_change_nothing(
    finished: Callable[[str], Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = finished("tags")
    recipe = tiny_run.write_recipe(run_dir.parent, base)
    before = tiny_run.files(run_dir)
    line = error_line(train.main, ["--config", str(recipe), "rl.kl.coef=0.5"], capsys)
    assert "holds a run with other settings (rl.kl.coef was 0.01, now 0.5)" in line
    assert tiny_run.files(run_dir) == before


# ---------------------------------------------------------------------------------------- bad data


def write_files(directory: Path) -> list[str]:
    """Small files of one's own, as overrides."""
    passages = [{"id": str(i), "contents": f'"Door {i}"\nDoor {i} is by Person {i}.'} for i in range(4)]
    questions = [{"id": str(i), "question": f"Who wrote {i}?", "golden_answers": [f"Person {i}"]} for i in range(4)]
    steps = [
        {"analysis": "I need the author.", "query": "Who wrote it?", "passage_ids": ["0"]},
        {"analysis": "It is Person 0.", "answer": "Person 0"},
    ]
    rows = {"corpus": passages, "rl": questions, "test": questions, "sft": [{**questions[0], "steps": steps}]}
    for name, lines in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["data.source=files", *(f"data.{name}={directory / f'{name}.jsonl'}" for name in rows)]


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("corpus", '{"id": "9", "contents": ', "corpus.jsonl:5: expected one JSON object per line"),
        ("corpus", '{"id": "9"}', "corpus.jsonl:5: expected a field 'contents' (or 'text'); got the fields ['id']"),
        ("sft", '{"id": "9", "question": "Who?", "golden_answers": ["x"], "steps": []}', "sft.jsonl:2: steps must end"),
        ("sft", "[1, 2]", "sft.jsonl:2: expected a JSON object; got a list"),
    ],
)
def test_a_malformed_line_is_placed(
    name: str, line: str, words: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = write_files(tmp_path)
    with (tmp_path / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    mine = {path: content for path, content in tiny_run.files(tmp_path).items() if path.endswith(".jsonl")}
    assert words in error_line(train.main, ["--config", str(recipe), *overrides], capsys)
    assert mine.items() <= tiny_run.files(tmp_path).items()


def test_missing_files(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = write_files(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    line = error_line(train.main, ["--config", str(recipe), *overrides], capsys)
    assert "corpus.jsonl: expected a readable file of records; No such file" in line
    assert "data.corpus must be given" in error_line(train.main, ["--config", str(recipe), "data.source=files"], capsys)


def test_a_model_directory_with_parts_missing(
    recipe: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A download that stopped half-way must not end in a traceback."""
    for missing in ("tokenizer.json", "model.safetensors"):
        half = tmp_path / f"without-{missing}"
        half.mkdir()
        for path in base.iterdir():
            if path.name != missing:
                (half / path.name).write_bytes(path.read_bytes())
        run_dir = tmp_path / f"run-{missing}"
        argv = ["--config", str(recipe), f"model.path={half}", f"run_dir={run_dir}"]
        line = error_line(train.main, argv, capsys)
        assert missing in line and str(half) in line


# -------------------------------------------------------------------------- evaluate, ask on a run


@pytest.mark.parametrize("main", [evaluate.main, ask.main], ids=["evaluate", "ask"])
def test_a_checkpoint_that_is_none(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["Who?"] if main is ask.main else []
    line = error_line(main, ["--checkpoint", str(tmp_path / "runs"), *question], capsys)
    assert "--checkpoint must be a run directory with config.yaml" in line
    assert "--checkpoint" in error_line(main, question, capsys)


def test_an_untrained_run_has_no_policy(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", str(recipe), "phases=index"]) == 0
    line = error_line(evaluate.main, ["--checkpoint", str(tmp_path / "run")], capsys)
    assert "has no trained policy" in line


def test_a_question_that_does_not_fit_is_named_before_anything_is_sampled(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = finished("tags")
    before = tiny_run.files(run_dir)
    path = tmp_path / "long.jsonl"
    rows = [{"id": id, "question": text, "golden_answers": ["x"]} for id, text in (("a", "Who?"), ("b", "Who? " * 999))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask_file = ["--checkpoint", str(run_dir), "--questions", str(path)]
    for system in ("r3rag", "closed_book"):
        line = error_line(evaluate.main, [*ask_file, "--system", system], capsys)
        assert f"long.jsonl:2: prompt and completion of {system} must fit rollout.max_length=" in line
        assert "tokens with question 'b'; correct the file, or leave such records out: data.on_error=skip" in line
    line = error_line(ask.main, ["--checkpoint", str(run_dir), "Who? " * 999], capsys)
    assert "prompt and completion of r3rag must fit rollout.max_length=" in line
    assert tiny_run.files(run_dir) == before


def test_bad_questions(finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = finished("tags")
    before = tiny_run.files(run_dir)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "1", "question": "Who?", "golden_answers": []}\n')
    line = error_line(evaluate.main, ["--checkpoint", str(run_dir), "--questions", str(bad)], capsys)
    assert "bad.jsonl:1: golden_answers must be one or more texts" in line
    for name, words in (("rl", "none that the run itself uses"), ("a/b", "letters, digits")):
        line = error_line(evaluate.main, ["--checkpoint", str(run_dir), "--name", name], capsys)
        assert f"--name must be {words}" in line
    line = error_line(ask.main, ["--checkpoint", str(run_dir), "   "], capsys)
    assert "the question must not be empty" in line
    assert tiny_run.files(run_dir) == before
