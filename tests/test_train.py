"""A whole run in miniature, in both protocols: its files, its resuming, what the entry points do with it."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from rich.console import Console
from safetensors.numpy import load_file

from r3rag_jax import ask, evaluate, experiment, train
from r3rag_jax.components import Components
from r3rag_jax.config import Config, load_config
from r3rag_jax.data.jsonl import read_rows
from r3rag_jax.data.questions import read_passages, read_questions
from r3rag_jax.data.trajectories import trajectory_from_dict
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.fingerprint import differences
from r3rag_jax.run.flags import parse_training
from r3rag_jax.training import sft
from r3rag_jax.training.trainer import RLTrainer

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


PROTOCOLS = ("tags", "steps")


SYSTEMS = ("closed_book", "naive_rag", "cold_start", "r3rag")


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_run_leaves_all_its_files(protocol: str, finished: Callable[[str], Path]) -> None:
    run_dir = finished(protocol)
    assert load_config(run_dir / "config.yaml").rollout.protocol == protocol
    assert (run_dir / "report.html").stat().st_size > 1000
    corpus = {passage.id for passage in read_passages(run_dir / "data" / "corpus.jsonl")}
    for split, count in (("rl", 12), ("dev", 2), ("test", 4)):
        questions = read_questions(run_dir / "data" / f"{split}.jsonl")
        assert len(questions) == count
        assert all(set(question.supporting_ids) <= corpus for question in questions)
    for phase in ("sft", "rl"):
        assert {p.name for p in (run_dir / "policy" / phase).iterdir()} >= {
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
        assert all(np.isfinite(array).all() for array in tiny_run.weights(run_dir, phase).values())
        assert any((run_dir / "checkpoints" / phase).iterdir())
    assert not list((run_dir / "policy").glob(".*"))  # no half-written export
    took = [row for _, row in read_rows(run_dir / "phases.jsonl")]
    assert [(row["phase"], row["sampled"] > 0, row["seconds"] > 0) for row in took] == [
        ("index", False, True), ("sft", False, True), ("rl", True, True), ("eval", True, True),
    ]  # fmt: skip


def test_metrics_have_one_finite_line_a_step(protocol: str, finished: Callable[[str], Path]) -> None:
    rows = [json.loads(line) for line in (finished(protocol) / "metrics.jsonl").read_text().splitlines()]
    for phase, names in (
        ("sft", {"loss", "accuracy", "grad_norm", "tokens_per_s"}),
        ("rl", {"reward", "em", "f1", "kl", "entropy", "policy_loss", "value_loss", "clip_fraction", "sampler_gap",
                "explained_variance", "mean_retrievals", "format_error_rate", "no_answer_rate",
                "context_full_rate", "tokens_per_s"}),
    ):  # fmt: skip
        mine = [row for row in rows if row["phase"] == phase]
        assert [row["step"] for row in mine] == list(range(len(mine)))
        for row in mine:
            assert names <= row.keys()
            assert all(math.isfinite(value) for name, value in row.items() if name != "phase")
    assert [row["phase"] for row in rows] == sorted((row["phase"] for row in rows), reverse=True)  # sft, then rl
    sft = [row["loss"] for row in rows if row["phase"] == "sft"]
    assert sft[-1] < 0.3 * sft[0]
    rl = [row for row in rows if row["phase"] == "rl"]
    assert len(rl) == 3
    assert all(row["sampler_gap"] < 1e-3 for row in rl)
    assert max(row["mean_retrievals"] for row in rl) > 0.2  # so that whole steps and passages are in the batches
    assert rl[0]["kl"] == pytest.approx(0, abs=1e-4)  # the first rollouts are the reference's own
    assert ["dev_em" in row for row in rl] == [False, False, True]


def test_evaluations_and_trajectories(protocol: str, finished: Callable[[str], Path]) -> None:
    run_dir = finished(protocol)
    marks = []
    for system in SYSTEMS:
        summary = json.loads((run_dir / "eval" / f"{system}.json").read_text())
        assert (summary["system"], summary["num_questions"], summary["groups"]["all"]["num"]) == (system, 4, 4)
        marks.append(summary["fingerprint"])
        rows = [row for _, row in read_rows(run_dir / "trajectories" / f"{system}.jsonl")]
        trajectories = [trajectory_from_dict(row) for row in rows]
        asked = read_questions(run_dir / "data" / "test.jsonl")
        assert [t.question for t in trajectories] == asked
        assert max(t.num_retrievals for t in trajectories) <= {"closed_book": 0, "naive_rag": 1}.get(system, 3)
    assert all(differences(mark, marks[0]) == [] for mark in marks)
    assert [mark["policy"].split()[0] for mark in marks] == ["base", "base", "sft", "rl"]
    rows = [row for _, row in read_rows(run_dir / "trajectories" / "rl.jsonl")]
    assert [row["iteration"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    assert all(math.isfinite(row["reward"]) for row in rows)


def test_the_same_command_again_changes_nothing(protocol: str, finished: Callable[[str], Path], base: Path) -> None:
    run_dir = finished(protocol)
    before = tiny_run.files(run_dir)
    said = tiny_run.train(run_dir.parent, base, protocol)
    for phase in ("index", "sft", "rl", "eval"):
        assert f"{phase}  done before" in said
    assert "All is done" in said and "report.html" in said
    assert tiny_run.files(run_dir).keys() == before.keys()
    assert {name for name, content in tiny_run.files(run_dir).items() if content != before[name]} <= {"report.html"}


def test_seeds_one_after_the_other(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed is a run of its own over one index, none leaves arrays to the next, and the same command goes on."""
    recipe, held = tiny_run.write_recipe(tmp_path, base, phases="[index, sft]", sft__epochs=1), []
    words = ["--config", str(recipe), "--seeds", "3,4"]
    console = Console(file=io.StringIO(), width=200)

    def counted(config: Config, console: Console) -> Components:
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return experiment.run(config, console)

    monkeypatch.setattr(train, "run", counted)
    train.run_all(parse_training(words, "p", "d"), console)
    first, second = (tmp_path / f"run-seed_{seed}" for seed in (3, 4))
    assert held[1] < held[0] + 10_000
    assert (first / "index").is_dir() and not (second / "index").exists()
    assert [load_config(run / "config.yaml").seed for run in (first, second)] == [3, 4]
    assert all((run / "policy" / "sft").is_dir() for run in (first, second))
    said = console.file.getvalue()
    assert said.count("Phases on 8 x cpu") == 3  # of each, and of both
    train.run_all(parse_training(words, "p", "d"), console)
    assert console.file.getvalue().removeprefix(said).count("done before") == 4


def test_a_file_that_is_missing_is_said_before_anything_is_done(base: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "0", "contents": "A title\\nAnd a text."}\n')
    files = {"data__source": "files", "data__corpus": tmp_path / "corpus.jsonl", "data__sft": tmp_path / "sft.jsonl"}
    recipe = tiny_run.write_recipe(tmp_path, base, phases="[index, sft]", **files)
    with pytest.raises(UserError, match=r"data\.sft must name a file that is there; got .*sft\.jsonl"):
        train.run_all(parse_training(["--config", str(recipe)], "p", "d"), Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("protocol", ["tags", pytest.param("steps", marks=pytest.mark.slow)], indirect=True)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    protocol: str, finished: Callable[[str], Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiny_run.Killed between two checkpoints of each phase: parameters and metrics are the same bits in the end."""
    make_sft_step, save = sft.make_sft_step, RLTrainer.save

    def make_mortal_step(*args):
        step, calls = make_sft_step(*args), itertools.count()

        def mortal(*args):
            if next(calls) == 12:  # the checkpoint at 8 is behind, and a few more steps are logged
                raise tiny_run.Killed
            return step(*args)

        return mortal

    def mortal_save(trainer):
        if trainer.iteration == 2:  # the iteration is trained and logged, but its checkpoint is lost
            raise tiny_run.Killed
        save(trainer)

    with monkeypatch.context() as patch, pytest.raises(tiny_run.Killed):
        patch.setattr(sft, "make_sft_step", make_mortal_step)
        tiny_run.train(tmp_path, base, protocol)
    assert not (tmp_path / "run" / "policy").exists()
    with monkeypatch.context() as patch, pytest.raises(tiny_run.Killed):
        patch.setattr(RLTrainer, "save", mortal_save)
        tiny_run.train(tmp_path, base, protocol)
    assert [p.name for p in (tmp_path / "run" / "policy").iterdir()] == ["sft"]
    said = tiny_run.train(tmp_path, base, protocol)
    assert "sft  done before" in said and "rl  done before" not in said
    assert "memory of rl: " in said and "[/]" not in said  # colours are no text

    whole, resumed = finished(protocol), tmp_path / "run"
    assert tiny_run.metrics(resumed) == tiny_run.metrics(whole)
    one, other = tiny_run.files(whole), tiny_run.files(resumed)
    same = [name for name in one if name.split("/")[0] in ("data", "policy", "trajectories", "eval")]
    assert len(same) > 20
    assert [name for name in same if other.get(name) != one[name]] == []


@pytest.mark.slow
def test_adapters_are_trained_resumed_and_merged(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cold start of the other run; killed before the last checkpoint and resumed, the same bits in the end."""
    base = finished("tags") / "policy" / "sft"
    settings = {
        "lora.rank": 4,
        "sft.epochs": 2,
        "rl.iterations": 2,
        "rl.critic.kind": "separate",
        "phases": "[index, sft, rl]",
    }
    settings |= {"sft.lr": 1e-3, "rl.eval_every": 2}
    keys = {name.replace(".", "__"): value for name, value in settings.items()}
    tiny_run.train(tmp_path / "whole", base, **keys)
    save = RLTrainer.save

    def mortal_save(trainer):
        save(trainer)
        raise tiny_run.Killed

    with monkeypatch.context() as patch, pytest.raises(tiny_run.Killed):
        patch.setattr(RLTrainer, "save", mortal_save)
        tiny_run.train(tmp_path / "resumed", base, **keys)
    tiny_run.train(tmp_path / "resumed", base, **keys)
    whole, resumed = tmp_path / "whole" / "run", tmp_path / "resumed" / "run"
    assert tiny_run.metrics(whole) == tiny_run.metrics(resumed)

    rl = [row for row in tiny_run.metrics(whole) if row["phase"] == "rl"]
    assert rl[0]["kl"] == pytest.approx(0, abs=1e-4)  # the first rollouts are the frozen weights' own
    assert all(row["sampler_gap"] < 1e-3 for row in rl)
    before = load_file(base / "model.safetensors")
    for phase in ("sft", "rl"):
        after = tiny_run.weights(whole, phase)
        assert after.keys() == before.keys()
        np.testing.assert_equal(after, tiny_run.weights(resumed, phase))
        moved = {name for name, array in after.items() if not np.array_equal(array, before[name])}
        assert moved == {name for name in before if "_proj.weight" in name or "embed_tokens" in name}
        change = after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]
        assert set(np.flatnonzero(change.any(axis=1))) <= set(range(3, 11))  # the tags
        before = after


def test_evaluate_on_other_questions_and_passages(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(finished("tags"), tmp_path / "run")
    questions, corpus = tmp_path / "mine" / "dev.jsonl", tmp_path / "corpus.jsonl"
    questions.parent.mkdir()
    questions.write_text('{"id": "1", "question": "Who wrote The Red Door?", "golden_answers": ["Bala Sen"]}\n')
    corpus.write_text('{"id": "p", "contents": "\\"The Red Door\\"\\nThe Red Door is by Bala Sen."}\n')
    argv = ["--checkpoint", str(run_dir), "--questions", str(questions), "--corpus", str(corpus), "retrieval.top_k=2"]
    assert evaluate.main(argv) == 0
    summary = json.loads((run_dir / "eval" / "mine-dev.json").read_text())
    assert summary["num_questions"] == 1
    test_mark = json.loads((run_dir / "eval" / "r3rag.json").read_text())["fingerprint"]
    assert all(summary["fingerprint"][name] != test_mark[name] for name in ("questions", "index", "retrieval.top_k"))
    [row] = [row for _, row in read_rows(run_dir / "trajectories" / "mine-dev.jsonl")]
    assert {passage["id"] for step in row["steps"] for passage in step.get("passages", ())} <= {"p"}
    assert "EM" in capsys.readouterr().out
    before = tiny_run.files(run_dir)
    questions.write_text(questions.read_text().replace("Bala Sen", "Ilse Malthen"))
    assert evaluate.main(argv) == 2
    assert "mine-dev.json must be a result of the same questions" in capsys.readouterr().err
    assert tiny_run.files(run_dir) == before


@pytest.mark.parametrize("flags", [[], ["--phase", "sft"]])
def test_ask_shows_a_trajectory(
    flags: list[str], finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask.main(["--checkpoint", str(finished("tags")), *flags, "Who wrote The Red Door?"]) == 0
    assert "Who wrote The Red Door?" in capsys.readouterr().out
