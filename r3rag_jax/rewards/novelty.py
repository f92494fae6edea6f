"""What a search brings that its trajectory did not have: a query not asked before, passages not shown before."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from r3rag_jax.types import Passage, Trajectory

_NO_WORD = re.compile(r"[\W_]+")


def normalize_query(text: str) -> str:
    """The words of a query in lower case with one space between them: two queries are the same if these are.

    "  Who wrote\\n'Origin'?" becomes "who wrote origin"; full-width letters become plain ones (Unicode's NFKC).
    """
    return _NO_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def new_passages(trajectory: Trajectory) -> list[tuple[Passage, ...]]:
    """For each step, those of its passages that no earlier step showed, neither by their id nor by their text."""
    seen: set[tuple[str, str]] = set()
    found = []
    for step in trajectory.steps:
        keys = [(("id", passage.id), ("text", passage.contents)) for passage in step.passages]
        found.append(tuple(p for p, pair in zip(step.passages, keys, strict=True) if seen.isdisjoint(pair)))
        seen.update(key for pair in keys for key in pair)
    return found


def shows_new(trajectories: Sequence[Trajectory], max_steps: int) -> np.ndarray:
    """bool [B, K], True for the steps that show a new passage (`new_passages`)."""
    is_new_BK = np.zeros((len(trajectories), max_steps), bool)
    for row, trajectory in enumerate(trajectories):
        is_new_BK[row, : len(trajectory.steps)] = [bool(passages) for passages in new_passages(trajectory)]
    return is_new_BK


def new_searches(trajectories: Sequence[Trajectory]) -> Iterator[tuple[int, int, tuple[Passage, ...]]]:
    """(trajectory, step, new passages) of the searches that bring something new.

    Their query is no earlier query of the trajectory (`normalize_query`), and they show a new passage
    (`new_passages`).
    """
    for i, trajectory in enumerate(trajectories):
        queries: set[str] = set()
        for k, (step, passages) in enumerate(zip(trajectory.steps, new_passages(trajectory), strict=True)):
            if step.query is None:
                continue
            query = normalize_query(step.query)
            if query not in queries and passages:
                yield i, k, passages
            queries.add(query)
