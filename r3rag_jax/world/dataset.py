"""The phase `index`: writes the data files that a run generates (world, refreshed trajectories), builds the index."""

from __future__ import annotations

import random
from pathlib import Path

from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import iterate_passages, passage_to_dict, question_to_dict
from r3rag_jax.data.records import OnError
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import on_process_0
from r3rag_jax.retrieval.base import Retriever, search_hits
from r3rag_jax.retrieval.encoders.spread import Spread, encoding_together
from r3rag_jax.retrieval.factory import build_index, open_local_retriever, open_store
from r3rag_jax.retrieval.fingerprint import corpus_fingerprint
from r3rag_jax.retrieval.manifest import has_index, read_manifest
from r3rag_jax.retrieval.refresh import refresh_retrieved
from r3rag_jax.run.digests import FileDigests, read_sums, stamp, write_sums
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.progress import bar_of_unknown_length
from r3rag_jax.world.encyclopedia import Split, World
from r3rag_jax.world.teacher import teacher_steps

PASSAGES = "passages"  # kind of digest: the fingerprint of a corpus
QUESTION_SPLITS: tuple[Split, ...] = ("rl", "dev", "test")  # written before the index; split `sft` needs the index


def prepare_data(config: Config, run: RunDirectory, corpus: Path, index_dir: Path, console: Console) -> bool:
    """Write the data files that the run generates, and build the index of `corpus`; returns False if all exist.

    Process 0 does the work, and all processes, which must call, encode the passages. An existing index is kept.

    Raises:
        UserError: the corpus or the teacher's trajectories are malformed (the message names file and line), or the
            existing index is of other passages than the corpus.
    """
    digests = FileDigests(run.digests)
    on_error = OnError.of(config.data, console)

    def prepare(spread: Spread) -> int | None:
        own = [path.name for path in _own_files(config, run)]
        is_new = not (has_index(index_dir) and all((run.data_dir / name).exists() for name in own))
        if is_new:
            _prepare(config, run, corpus, index_dir, digests, console, on_error, spread)
        else:
            _check_corpus(corpus, index_dir, digests, on_error)
        if unrecorded := [name for name in own if is_new or name not in read_sums(run.data_dir)]:
            write_sums(run.data_dir, unrecorded)
        return read_manifest(index_dir).num_passages if is_new else None

    with encoding_together(config.retrieval) as spread:
        num_passages = on_process_0(lambda: prepare(spread), "index phase")
    if num_passages is not None:
        console.print(f"{num_passages} passages indexed", highlight=False)
    return num_passages is not None


def _own_files(config: Config, run: RunDirectory) -> list[Path]:
    """The data files that the run generates, in the order in which they are written."""
    if config.data.source == "world":
        return [run.data(name) for name in ("corpus", *QUESTION_SPLITS, "sft")]
    return [run.data("sft")] if config.data.refresh_retrieved else []


def _prepare(
    config: Config,
    run: RunDirectory,
    corpus: Path,
    index_dir: Path,
    digests: FileDigests,
    console: Console,
    on_error: OnError,
    spread: Spread,
) -> None:
    if config.data.source == "world":
        world = World.generate(config.world.seed, num_people=config.world.num_people)
        write_world(world, config, run)
    if has_index(index_dir):
        _check_corpus(corpus, index_dir, digests, on_error)
    else:
        seen = stamp(corpus) if corpus.is_file() else None
        with bar_of_unknown_length("index", console=console, live=config.log.progress) as on_progress:
            passages = iterate_passages(corpus, on_error)
            build_index(config.retrieval, passages, index_dir, on_progress, spread=spread)
        if seen is not None:
            digests.record(corpus, PASSAGES, read_manifest(index_dir).corpus, seen)
    if config.data.source == "world":
        write_teacher(world, config, open_local_retriever(config.retrieval, index_dir), run)
    elif config.data.refresh_retrieved:
        refresh_retrieved(
            config.data.path("sft"), run.data("sft"), open_local_retriever(config.retrieval, index_dir),
            open_store(index_dir), config.retrieval.top_k, on_error,
        )  # fmt: skip


def _check_corpus(corpus: Path, index_dir: Path, digests: FileDigests, on_error: OnError) -> None:
    """Raise a UserError unless the existing index is of the passages of `corpus`.

    A corpus that was compared before is read again only if its size or time of change differs. One that has been
    removed since is not missed: the index holds its passages.
    """
    if not corpus.exists() and digests.knows(corpus, PASSAGES):
        return

    def fingerprint(path: Path) -> str:
        return corpus_fingerprint(iterate_passages(path, on_error))

    expected = digests.get(corpus, PASSAGES, fingerprint) if corpus.exists() else fingerprint(corpus)
    found = read_manifest(index_dir).corpus
    if found != expected:
        raise UserError(
            f"data.corpus must be what was indexed: the index in {index_dir} is of passages with fingerprint "
            f"{found[:16]}; got {corpus} with {expected[:16]}. Restore the file, or choose another name=… "
            "(or retrieval.index_dir) for the new corpus"
        )


def write_world(world: World, config: Config, run: RunDirectory) -> None:
    """Write the passages, and the questions of all splits except `sft`."""
    counts = {"rl": config.world.num_rl, "dev": config.world.num_dev, "test": config.world.num_test}
    write_jsonl(run.data("corpus"), map(passage_to_dict, world.passages))
    for split in QUESTION_SPLITS:
        write_jsonl(run.data(split), map(question_to_dict, world.questions(split, counts[split])))


def write_teacher(world: World, config: Config, retriever: Retriever, run: RunDirectory) -> None:
    """Write the teacher's trajectories for the cold start, with the passages retrieved for each query.

    Passages about entities of the test and dev splits are left out, so that the policy is never trained on them.
    """
    hidden = {id for id, split in world.split_of.items() if split in ("test", "dev")}
    k = config.retrieval.top_k
    rng = random.Random(f"teacher {world.seed}")
    rows = []
    for question in world.questions("sft", config.world.num_sft, with_trajectories=True):
        steps = teacher_steps(
            question, rng, needless_retrievals=config.world.needless_retrievals,
            lucky_guesses=config.world.lucky_guesses, max_steps=config.rollout.max_steps,
        )  # fmt: skip
        queries = [step for step in steps if "query" in step]
        found = search_hits(retriever, [step["query"] for step in queries], 8 * k)
        for step, hits in zip(queries, found, strict=True):
            step["retrieved_ids"] = [hit.passage.id for hit in hits if hit.passage.id not in hidden][: 4 * k]
        rows.append({**question_to_dict(question), "steps": steps})
    write_jsonl(run.data("sft"), rows)
