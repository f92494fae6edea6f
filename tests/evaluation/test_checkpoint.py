"""Which run, which configuration and which policy an entry point works with."""

from __future__ import annotations

from pathlib import Path

import pytest

from r3rag_jax.config import Config, RolloutConfig, ServerConfig
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.checkpoint import choose_policy, load_run_config
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
