"""The command in this process on a small world: what it writes, says and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import tiny_run
from openai_server import chat, serve
from scripted_teacher import ScriptedTeacher

from r3rag_jax.coldstart.__main__ import main
from r3rag_jax.coldstart.commands import check_held_out
from r3rag_jax.config import load_config
from r3rag_jax.data.dataset import Dataset
from r3rag_jax.data.jsonl import read_rows, write_jsonl
from r3rag_jax.data.questions import read_questions
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.manifest import read_manifest
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.world.encyclopedia import World

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
ROOM = {"rollout__max_new_tokens": 200, "rollout__max_length": 3000, "rollout__max_steps": 5, "sft__row_length": 3000}

Run = Callable[..., int]


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Run:
    """Runs the command with the tiny world's recipe; `[action], key=value…`."""
    recipe = tiny_run.write_recipe(
        tmp_path, base, retrieval__passage_tokens=60, retrieval__top_k=2, world__num_rl=12, **ROOM
    )

    def run_command(*words: str) -> int:
        action = [word for word in words if "=" not in word and not word.startswith(("-", "/"))]
        rest = [word for word in words if word not in action]
        return main([*action, "--config", str(recipe), f"coldstart.dir={tmp_path / 'built'}", *rest])

    return run_command


def test_gold_decompositions_of_a_world(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("coldstart.source=gold") == 0
    built = tmp_path / "built"
    said = capsys.readouterr().out
    trajectories = read_trajectories(built / "trajectories.jsonl", {}, 2)
    assert len(trajectories) > 6 and f"{len(trajectories)} trajectories: {built / 'trajectories.jsonl'}" in " ".join(
        said.split()
    )
    questions = {question.id: question for question in read_questions(built / "data" / "rl.jsonl")}
    assert all(t.answer == questions[t.question.id].golden_answers[0] for t in trajectories)
    summary = json.loads((built / "summary.json").read_text())
    assert (summary["attempts"], summary["accepted"]) == (12, len(trajectories))
    assert run("check", "coldstart.source=gold") == 0
    assert f"{len(trajectories)} of {len(trajectories)} trajectories replay" in capsys.readouterr().out

    rows = [row for _, row in read_rows(built / "trajectories.jsonl")]
    rows[1]["steps"][0]["passages"] = rows[1]["steps"][0]["passages"][::-1]
    write_jsonl(tmp_path / "changed.jsonl", rows)
    assert run("check", f"--trajectories={tmp_path / 'changed.jsonl'}") == 1
    assert "changed.jsonl:2: step 1 shows [" in capsys.readouterr().out

    assert run("coldstart.source=gold", "retrieval.top_k=1") == 2
    assert "was begun with other settings (retrieval.top_k was 2, now 1)" in capsys.readouterr().err


def test_the_index_is_built_where_training_looks_for_it(run: Run, tmp_path: Path) -> None:
    index = tmp_path / "shared"
    assert run("coldstart.source=gold", f"retrieval.index_dir={index}") == 0
    assert read_manifest(index).kind == "faiss" and not (tmp_path / "built" / "index").exists()


def test_a_served_teacher(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = World.generate(0, num_people=60).questions("rl", 12)
    with serve(ScriptedTeacher(questions, 0.6).reply) as server:
        keys = [f"coldstart.teacher.url={server.url}", "coldstart.teacher.model=m", "coldstart.max_questions=8"]
        keys += [
            "coldstart.temperatures=0.2,0.8",
            "coldstart.teacher.price_input=10",
            "coldstart.teacher.max_in_flight=2",
        ]
        assert run(*keys) == 0
        num = len(server.bodies)
        assert run(*keys) == 0 and len(server.bodies) == num
        assert server.most_busy <= 2
    said = " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "built" / "summary.json").read_text())
    assert summary["replies"] == num and summary["accepted"] >= 3 and summary["attempts"] > 8
    tokens, cost = (summary["input_tokens"], summary["output_tokens"]), summary["input_tokens"] * 10 / 1e6
    assert summary["cost"] == pytest.approx(cost)
    assert f"{num} replies, {tokens[0]} tokens in, {tokens[1]} out: cost {cost:.4g}" in said
    assert "accepted at temperature 0.2: " in said


def test_a_teacher_that_is_away(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(lambda body: (401, chat("no"))) as server:
        assert (
            run(f"coldstart.teacher.url={server.url}", "coldstart.teacher.model=m") == 69
        )  # as of any server that stays away
    assert "failed in 5 of" in (error := capsys.readouterr().err) and "answered 401" in error


@pytest.mark.slow
def test_a_model_on_the_own_devices(run: Run, base: Path, tmp_path: Path) -> None:
    """A random model writes no step; that it is asked, and judged, is all."""
    local = ["coldstart.source=local", f"coldstart.local.path={base}", "coldstart.local.max_length=4000"]
    assert run(*local, "coldstart.local.slots=8", "coldstart.max_tokens=4", "coldstart.temperatures=0.7") == 0
    summary = json.loads((tmp_path / "built" / "summary.json").read_text())
    assert summary["rejected"] == {"a step is malformed": 12} and summary["cost"] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "coldstart.teacher.url must be given when coldstart.source is server"),
        (["coldstart.source=local"], "coldstart.local.path must be given when coldstart.source is local"),
        (
            ["coldstart.source=gold", "coldstart.correct=judge"],
            "judge.endpoint.url must be given when coldstart.correct",
        ),
        (["coldstart.max_cost=3"], "coldstart.max_cost needs coldstart.teacher.price_input or price_output"),
        (["coldstart.max_tokens=4096"], "coldstart.max_tokens must be less than coldstart.local.max_length=4096"),
        (["coldstart.temperatures=-1"], "coldstart.temperatures must be one or more numbers of at least 0"),
    ],
)
def test_what_is_refused(run: Run, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = run(*words)
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and expected in capsys.readouterr().err


def test_held_out_questions_are_not_asked(base: Path, tmp_path: Path) -> None:
    rows = [{"id": i, "question": f"Who wrote {i}?", "golden_answers": ["x"]} for i in "ab"]
    for name in ("rl", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows if name == "rl" else rows[1:])
    files = ["data.source=files", "data.corpus=c", f"data.dir={tmp_path}", "data.rl=rl.jsonl", "data.test=test.jsonl"]
    recipe = tiny_run.write_recipe(tmp_path, base, phases="[index]")
    config, said = load_config(recipe, files), list[str]()
    questions = read_questions(tmp_path / "rl.jsonl")
    dataset = Dataset(config, RunDirectory(tmp_path), dict)
    check_held_out(questions, dataset, config, said.append)
    assert len(said) == 1 and "1 of 1 questions of data.test" in said[0]
    with pytest.raises(UserError, match=r"held-out questions must not be learnt from; .*test.jsonl"):
        check_held_out(questions, dataset, load_config(recipe, [*files, "data.leakage=refuse"]), said.append)
    check_held_out(questions.take([0]), dataset, config, said.append)
    check_held_out(questions, dataset, load_config(recipe, [*files, "data.leakage=off"]), said.append)
    assert len(said) == 1


def test_where_questions_come_from(base: Path, tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base, phases="[index]")
    config = load_config(recipe, ["data.dir=folder", "coldstart.questions=musique:dev.jsonl"])
    assert config.coldstart.question_source(config.data) == "musique:folder/dev.jsonl"
    config = load_config(recipe, ["data.dir=folder", "coldstart.questions=mine.jsonl"])
    assert config.coldstart.question_source(config.data) == "folder/mine.jsonl"
    config = load_config(recipe)
    assert config.coldstart.question_source(config.data) == ""
