"""flags.py: the command line of `python -m r3rag_jax.train`."""

from __future__ import annotations

from pathlib import Path

import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.run.flags import parse_training


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "recipe.yaml").write_text("name: x\nretrieval:\n  top_k: 3\n")
    return ["--config", str(tmp_path / "recipe.yaml")]


def test_the_profiled_iteration(words: list[str]) -> None:
    assert [config.log.profile for config in parse_training(words, "p", "d")] == [-1]
    assert [config.log.profile for config in parse_training([*words, "--profile", "3"], "p", "d")] == [3]


def test_a_run_for_each_seed_over_the_index_of_the_first(words: list[str]) -> None:
    first, second, third = parse_training([*words, "--seeds", "4,0,7", "seed=9", "rl.lr=1e-3"], "p", "d")
    assert [config.seed for config in (first, second, third)] == [4, 0, 7]
    places = [str(config.run_directory) for config in (first, second, third)]
    assert places == ["runs/x-seed_4", "runs/x-seed_0", "runs/x-seed_7"]
    indexes = [config.retrieval.index_dir for config in (first, second, third)]
    assert indexes == ["", "runs/x-seed_4/index", "runs/x-seed_4/index"]
    assert third.replace(seed=4, name=first.name, retrieval=first.retrieval) == first
    assert (first.retrieval.top_k, first.rl.lr) == (3, 1e-3)


def test_a_single_seed_is_named_by_it_too(words: list[str]) -> None:
    (only,) = parse_training([*words, "--seeds", "2"], "p", "d")
    assert (only.seed, only.name, only.retrieval.index_dir) == (2, "x-seed_2", "")


@pytest.mark.parametrize(
    ("key", "places", "index"),
    [
        ("run_dir=out/y/", ["out/y-seed_0", "out/y-seed_1"], "out/y-seed_0/index"),
        ("run_dir=gs://b/y", ["gs://b/y-seed_0", "gs://b/y-seed_1"], ""),
        ("retrieval.index_dir=wiki", ["runs/x-seed_0", "runs/x-seed_1"], "wiki"),
    ],
)
def test_where_the_runs_and_their_index_are(words: list[str], key: str, places: list[str], index: str) -> None:
    configs = parse_training([*words, "--seeds", "0,1", key], "p", "d")
    assert [str(config.run_directory) for config in configs] == places
    assert configs[1].retrieval.index_dir == index


@pytest.mark.parametrize("text", ["", "a", "1,1", "0,", "-1", "0-2", "4294967296", "1, 2"])
def test_wrong_seeds(words: list[str], text: str) -> None:
    with pytest.raises(UserError, match=r"--seeds must be different numbers up to 4294967295 with commas"):
        parse_training([*words, f"--seeds={text}"], "p", "d")
