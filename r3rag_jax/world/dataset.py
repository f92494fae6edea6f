"""The embedded world as data-set files: passages, questions, the teacher's trajectories."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import jax

from r3rag_jax.components import Components
from r3rag_jax.config import Config
from r3rag_jax.data.jsonl import read_rows, write_jsonl
from r3rag_jax.data.questions import question_to_dict, read_passages
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.parallel.processes import barrier
from r3rag_jax.retrieval.faiss import FaissIndex
from r3rag_jax.types import Passage
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
            question,
            rng,
            waste=config.world.needless_retrievals,
            haste=config.world.lucky_guesses,
            max_steps=config.rollout.max_steps,
        )
        asking = [step for step in steps if "query" in step]
        for step, hits in zip(asking, index.search([step["query"] for step in asking], 8 * k), strict=True):
            step["retrieved_ids"] = [hit.passage.id for hit in hits if hit.passage.id not in hidden][: 4 * k]
        rows.append({**question_to_dict(question), "steps": steps})
    write_jsonl(directory / "sft.jsonl", rows)


def index_phase(components: Components) -> bool:
    """Write the data that the run makes itself, and build the index; False where that was done before."""
    config, run = components.config, components.run
    if (components.index_dir / "fingerprint.json").exists():
        return False
    corpus = components.dataset.path_of("corpus")
    write_data(config, run.data_dir, corpus, components.index_dir, components.build_index)
    components.console.print(f"{len(components.retriever.passages)} passages indexed", highlight=False)
    return True


def write_data(
    config: Config, directory: Path, corpus: Path, index_dir: Path, build_index: Callable[[list[Passage]], FaissIndex]
) -> None:
    """Write the files that a run makes itself, then build the index of `corpus`; process 0 alone works.

    The index is written last: where it is, everything is.

    Raises:
        UserError: the corpus or the teacher's trajectories are not well formed; with file and line.
    """
    if jax.process_index() == 0:
        if config.data.source == "world":
            world = World.generate(config.world.seed, num_people=config.world.num_people)
            write_world(world, config, directory)
        passages = read_passages(corpus)
        index = build_index(passages)
        if config.data.source == "world":
            write_teacher(world, config, index, directory)
        elif config.data.refresh_retrieved:
            read_trajectories(  # says what is wrong with the file, and where
                config.data.path("sft"), {p.id: p for p in passages}, config.retrieval.top_k
            )
            search_again(config, index, directory)
        index.save(index_dir)
    barrier("index")


def search_again(config: Config, index: FaissIndex, directory: Path) -> None:
    """The cold start's trajectories with what the index brings for their queries; `passage_ids` stay among it."""
    rows = [dict(row) for _, row in read_rows(config.data.path("sft"))]
    asking = [step for row in rows for step in row["steps"] if "query" in step]
    depth = 4 * config.retrieval.top_k
    for step, hits in zip(asking, index.search([step["query"] for step in asking], depth), strict=True):
        step["retrieved_ids"] = [hit.passage.id for hit in hits]
        step.pop("passages", None)
    write_jsonl(directory / "sft.jsonl", rows)
