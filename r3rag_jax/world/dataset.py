"""The embedded world as data-set files: passages, questions, the teacher's trajectories."""

from __future__ import annotations

import random
from pathlib import Path

from r3rag_jax.config.schema import Config
from r3rag_jax.data.qa import question_to_dict, write_jsonl
from r3rag_jax.retrieval.faiss import FaissIndex
from r3rag_jax.world.encyclopedia import World, teach


def write_world(world: World, config: Config, directory: Path) -> None:
    """Passages and the questions of every split but the cold start's, FlashRAG JSONL."""
    counts = {"rl": config.world.num_rl, "dev": config.world.num_dev, "test": config.world.num_test}
    write_jsonl(directory / "corpus.jsonl", [{"id": p.id, "contents": p.contents} for p in world.passages])
    for split, count in counts.items():
        questions = world.questions(split, count)  # type: ignore[arg-type]
        write_jsonl(directory / f"{split}.jsonl", [question_to_dict(q) for q in questions])


def write_teacher(world: World, config: Config, index: FaissIndex, directory: Path) -> None:
    """The cold start's trajectories, with what the retriever brings for each query.

    Passages of test and dev entities are left out of them, so that the policy never trained on one.
    """
    hidden = {id for id, split in world.split_of.items() if split in ("test", "dev")}
    k = config.retrieval.top_k
    rng = random.Random(f"teacher {world.seed}")
    rows = []
    for question in world.questions("sft", config.world.num_sft, with_trajectories=True):
        steps = teach(
            question, rng, waste=config.world.waste, haste=config.world.haste, max_steps=config.rollout.max_steps
        )
        asking = [step for step in steps if "query" in step]
        for step, hits in zip(asking, index.search([step["query"] for step in asking], 8 * k), strict=True):
            step["retrieved_ids"] = [hit.passage.id for hit in hits if hit.passage.id not in hidden][: 4 * k]
        rows.append({**question_to_dict(question), "steps": steps})
    write_jsonl(directory / "sft.jsonl", rows)
