"""Section `world`: the generated encyclopedia."""

from __future__ import annotations

from typing import ClassVar

from r3rag_jax.config.section import Section, key

MAX_SEED = 2**32 - 1  # the largest seed that numpy takes


class WorldConfig(Section):
    """The fictional encyclopedia with multi-hop questions that `data.source: world` generates."""

    dotted: ClassVar[str] = "world"

    seed: int = key(0, "seed of the world; each seed generates other entities and questions", ge=0, le=MAX_SEED)
    num_people: int = key(600, "people in the encyclopedia", "entities", ge=1)
    num_sft: int = key(500, "questions with a teacher's trajectory, for the cold start", "questions", ge=1)
    num_rl: int = key(3000, "questions without trajectories, for RL", "questions", ge=1)
    num_dev: int = key(64, "questions for the evaluations while training", "questions", ge=1)
    num_test: int = key(400, "questions for the final tables", "questions", ge=1)
    needless_retrievals: float = key(
        0.25, "share of teacher trajectories that contain a needless retrieval", "fraction", ge=0, le=1
    )
    lucky_guesses: float = key(
        0.0, "share of the teacher's comparison questions that end with a lucky guess", "fraction", ge=0, le=1
    )
