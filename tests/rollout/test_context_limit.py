"""When passages at their limits cannot fit, a run says so before it begins."""

from __future__ import annotations

import pytest

from r3rag_jax.config import Config, RetrievalConfig, RolloutConfig, load_config
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.rollout.context_limit import context_notices
from r3rag_jax.training.memory_plan import notices


def config(max_length: int, top_k: int = 3, max_passages: int = 9, max_steps: int = 3, **settings: object) -> Config:
    return Config(
        retrieval=RetrievalConfig(top_k=top_k, max_passages=max_passages, passage_tokens=20),
        rollout=RolloutConfig(max_length=max_length, max_steps=max_steps, max_new_tokens=30),
        **settings,
    )


def test_the_numbers_typed_out() -> None:
    """Two searches of three passages of 20 tokens, and a step of 30: 150 tokens."""
    assert context_notices(config(150)) == []
    [notice] = context_notices(config(149))
    for text in (
        "rollout.max_length=149",
        "2 searches (rollout.max_steps=3) x retrieval.top_k=3",
        "x retrieval.passage_tokens=20 are 120 tokens",
        "up to 30 tokens a step",
        "210 tokens and those of the prompt would hold it",  # 120 and three steps
    ):
        assert text in notice
    assert context_notices(config(149, max_passages=5)) == []  # 5 passages are 100 tokens
    assert context_notices(config(31, max_steps=1)) == []  # nothing is read after the only search


def test_it_is_said_once_before_the_first_phase() -> None:
    mesh = make_mesh(Config().mesh)
    phases = ("index", "sft", "rl", "eval")
    told = [notices(config(149, phases=phases), phase, {}, mesh) for phase in phases]
    assert [len(found) for found in told] == [1, 0, 0, 0]
    assert notices(config(149, phases=("index", "sft")), "index", {}, mesh) == []


@pytest.mark.parametrize("recipe", ["quickstart", "r3rag_qwen2.5_7b", "r3rag_llama3.1_8b", "wikihop_smollm2"])
def test_the_recipes_fit(recipe: str) -> None:
    assert context_notices(load_config(f"configs/{recipe}.yaml")) == []
