"""Which run or model, which configuration and which policy an entry point works with."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_run

from r3rag_jax import ask, evaluate
from r3rag_jax.config import Config, RolloutConfig, ServerConfig
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.checkpoint import add_checkpoint_flags, choose_policy, load_run_config, open_checkpoint
from r3rag_jax.run.directory import RunDirectory


def test_a_run_is_opened_where_it_lies_and_trains_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run_dir: /elsewhere\nretrieval.top_k: 3\n")
    config = load_run_config(tmp_path, ["rollout.slots=7"])
    assert (config.run_directory, config.phases) == (tmp_path, ("index",))
    assert (config.retrieval.top_k, config.rollout.slots) == (3, 7)
    with pytest.raises(UserError, match=r"--checkpoint must be a run directory with config.yaml"):
        load_run_config(tmp_path / "other")


def test_the_last_phase_that_has_finished_is_chosen_unless_one_is_named(tmp_path: Path) -> None:
    config, server = Config(), Config(phases=("index",), rollout=RolloutConfig(server=ServerConfig(url="http://x")))
    with pytest.raises(UserError, match=r"has no trained policy$"):
        choose_policy(RunDirectory(tmp_path), config)
    assert choose_policy(RunDirectory(tmp_path), config, "base") == "base"
    assert (choose_policy(RunDirectory(tmp_path), server), choose_policy(RunDirectory(tmp_path), server, "rl")) == (
        "",
        "rl",
    )
    (tmp_path / "policy" / "sft").mkdir(parents=True)
    assert choose_policy(RunDirectory(tmp_path), config) == "sft"
    with pytest.raises(UserError, match="has no trained policy of phase rl"):
        choose_policy(RunDirectory(tmp_path), config, "rl")
    (tmp_path / "policy" / "rl").mkdir()
    assert (choose_policy(RunDirectory(tmp_path), config), choose_policy(RunDirectory(tmp_path), config, "sft")) == (
        "rl",
        "sft",
    )


# ------------------------------------------------------------------------------------------ models


def opened(*words: str) -> Any:
    parser = argparse.ArgumentParser()
    add_checkpoint_flags(parser)
    return open_checkpoint(parser.parse_intermixed_args(["--checkpoint", *words]))


@pytest.fixture
def model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Hugging Face directory `models/agent` in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "models" / "agent")
    return "models/agent"


def test_a_model_is_used_by_a_recipe_or_by_keys(model: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: trained\nmodel: {path: other, init: random, chat_template: chatml}\nretrieval.top_k: 3\n")
    checkpoint = opened(model, "--config", str(recipe), "retrieval.top_k=4")
    config = checkpoint.config
    assert (config.model.path, config.model.init, config.model.chat_template) == (model, "pretrained", "chatml")
    assert (config.retrieval.top_k, config.phases) == (4, ("index",))
    assert checkpoint.run.path == config.run_directory == Path("runs/eval-agent")  # not the training's runs/trained
    assert checkpoint.choose_policy() == checkpoint.choose_policy("base") == "base" and checkpoint.builds_index
    for words, directory in ((["run_dir=out/x"], "out/x"), (["name=mine"], "runs/mine")):
        assert opened(model, "--config", str(recipe), *words).run.path == Path(directory)
    cached = tmp_path / "hub" / "models--RUC--Agent-7B" / "snapshots" / "0f3a"
    shutil.copytree(model, cached)
    assert opened(str(cached), "--corpus", "corpus.jsonl").run.path == Path("runs/eval-Agent-7B")


def test_a_model_needs_passages(model: str) -> None:
    """The fictional encyclopedia, the default, is nobody's corpus unless it is asked for."""
    with pytest.raises(UserError, match=r"comes without passages: --corpus FILE, or --config RECIPE with data.corpus"):
        opened(model, "rollout.protocol=steps")
    for words in (
        ["--corpus", "corpus.jsonl"], ["data.source=files", "data.corpus=corpus.jsonl"], ["retrieval.index_dir=wiki"],
        ["retrieval.kind=http", "retrieval.endpoint.url=http://localhost:1"], ["data.source=world"],
    ):  # fmt: skip
        assert not opened(model, *words).is_run


def test_what_does_not_go_with_a_model_or_a_run(model: str, tmp_path: Path) -> None:
    corpus = ["--corpus", "corpus.jsonl"]
    run = tmp_path / "runs" / "quick"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: quick\n")
    for words, rule in (
        ([model, *corpus, "--phase", "rl"], "--phase must be left out with a model, which is one policy; got rl"),
        ([model, *corpus, f"run_dir={model}"], "run_dir must be outside of the model's directory"),
        ([model, *corpus, f"run_dir={model}/results"], "run_dir must be outside of the model's directory"),
        ([model, *corpus, "name=quick"], "run_dir must not be a run, .* got runs/quick.*index_dir=runs/quick/index"),
        ([str(run), "--config", "x.yaml"], "--config must be left out with a run, which has its own; got x.yaml"),
        (["models"], "--checkpoint must be a run directory with config.yaml or a Hugging Face directory with"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rule):
            opened(*words)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["index", "corpus"])
def test_a_policy_from_elsewhere_does_what_it_does_in_its_run(
    name: str,
    finished: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Over the run's index, and over one that is built from the recipe's corpus and kept."""
    run = finished("tags")
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(run / "policy" / "rl", tmp_path / "agent")
    before = tiny_run.files(model)
    words = ["--checkpoint", str(model), "--config", str(run / "config.yaml")]
    test = ["--questions", str(run / "data" / "test.jsonl")]
    files = ["data.source=files", f"data.corpus={run / 'data' / 'corpus.jsonl'}"]
    want = (run / "trajectories" / "r3rag.jsonl").read_text()
    keys = [f"retrieval.index_dir={run / 'index'}"] if name == "index" else files
    assert evaluate.main([*words, *test, "--name", name, *keys]) == 0
    assert (tmp_path / "runs/eval-agent/trajectories" / f"{name}.jsonl").read_text() == want
    own, elsewhere = (
        json.loads((directory / "eval" / f"{name}.json").read_text())["groups"]
        for directory, name in ((run, "r3rag"), (tmp_path / "runs/eval-agent", name))
    )
    assert own == elsewhere
    if name == "index":
        return
    built = tiny_run.files(tmp_path / "runs/eval-agent/index")
    question = json.loads(want.splitlines()[0])["question"]
    capsys.readouterr()
    assert ask.main([*words, question, *files]) == 0
    assert question in capsys.readouterr().out
    assert tiny_run.files(tmp_path / "runs/eval-agent/index") == built and tiny_run.files(model) == before
