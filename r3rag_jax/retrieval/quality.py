"""How good an index is: recall@k and nDCG@k against supporting passages, and against exact search.

recall@k   share of the relevant passages among the first k hits, mean over the queries
all@k      share of the queries with all relevant passages among the first k hits
ndcg@k     sum over relevant hits of 1 / log2(rank + 1), divided by its largest possible value (Järvelin and Kekäläinen
           2002, binary relevance)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.data.fields import FieldError, get_field, get_id, get_ids, get_text
from r3rag_jax.data.jsonl import read_parsed
from r3rag_jax.data.questions import read_questions
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import Retriever, search_hits

_BATCH = 256  # queries searched at once
DECOMPOSED = "decomposed queries"


@dataclasses.dataclass(frozen=True)
class Query:
    """A text and the ids of the passages that are relevant to it, at least one."""

    text: str
    relevant: frozenset[str]


def read_queries(path: Path) -> dict[str, list[Query]]:
    """Name -> queries of a file of questions: those with `metadata.supporting_ids`, and their decompositions.

    `metadata.decomposition` is a list of {sub_question, passage_id}; a sub-question's only relevant passage is its own.

    Raises:
        UserError: the file is no file of questions, or no question names its supporting passages.
    """
    questions = read_questions(path)
    sets: dict[str, list[Query]] = {"questions": [], DECOMPOSED: []}
    for index, question in enumerate(questions):
        if question.supporting_ids:
            sets["questions"].append(Query(question.question, frozenset(question.supporting_ids)))
        try:
            for hop in get_field(question.metadata, "decomposition", list, default=[]):
                query = Query(get_text(hop, "sub_question"), frozenset([get_id(hop, "passage_id")]))
                sets[DECOMPOSED].append(query)
        except (FieldError, AttributeError) as error:
            rule = "metadata.decomposition must list {sub_question, passage_id}"
            raise UserError(f"{questions.place(index)}: {rule}; {error}") from None
    if not sets["questions"]:
        raise UserError(f"{path}: metadata.supporting_ids must name the passages of a question; no question has them")
    return {name: queries for name, queries in sets.items() if queries}


def read_trajectory_queries(path: Path) -> list[Query]:
    """The queries of a file of trajectories whose steps name their passages: `steps` with `query` and `passage_ids`.

    Raises:
        UserError: a line breaks a rule, or no step has both.
    """

    def parse(row: Mapping[str, Any]) -> list[Query]:
        steps = [step for step in get_field(row, "steps", list) if isinstance(step, dict) and step.get("query")]
        rows = [(get_text(step, "query"), frozenset(get_ids(step, "passage_ids"))) for step in steps]
        return [Query(text, relevant) for text, relevant in rows if relevant]

    queries = [query for _, row in read_parsed(path, parse) for query in row]
    if not queries:
        raise UserError(f"{path}: a step must have query and passage_ids; no step has both")
    return queries


def search_all(retriever: Retriever, texts: Sequence[str], k: int) -> list[list[str]]:
    """The ids of the k best passages for each text, best first."""
    found: list[list[str]] = []
    for start in range(0, len(texts), _BATCH):
        found += [[hit.passage.id for hit in hits] for hits in search_hits(retriever, texts[start : start + _BATCH], k)]
    return found


def measure(found: Sequence[Sequence[str]], relevant: Sequence[frozenset[str]], ks: Iterable[int]) -> dict[str, float]:
    """recall@k, all@k and ndcg@k for each k.

    Args:
        found: ids of the hits of each query, best first, as many as the largest k.
        relevant: ids of the relevant passages of each query, at least one.
    """
    metrics: dict[str, float] = {}
    for k in ks:
        recalls, gains = [], []
        for ids, wanted in zip(found, relevant, strict=True):
            is_hit = np.array([id in wanted for id in ids[:k]], float)
            discounts = 1 / np.log2(np.arange(2, k + 2))
            recalls.append(is_hit.sum() / len(wanted))
            gains.append(is_hit @ discounts[: len(is_hit)] / discounts[: min(k, len(wanted))].sum())
        metrics[f"recall@{k}"], metrics[f"ndcg@{k}"] = float(np.mean(recalls)), float(np.mean(gains))
        metrics[f"all@{k}"] = float(np.mean(np.array(recalls) == 1))
    return metrics


def against_exact(
    found: Sequence[Sequence[str]], exact: Sequence[Sequence[str]], ks: Iterable[int]
) -> dict[str, float]:
    """recall@k and ndcg@k where the k passages of an exact search are the relevant ones."""
    metrics: dict[str, float] = {}
    kept = [row for row in range(len(exact)) if exact[row]]
    for k in ks:
        wanted = [frozenset(exact[row][:k]) for row in kept]
        metrics |= measure([found[row] for row in kept], wanted, [k])
    return {name: value for name, value in metrics.items() if not name.startswith("all@")}
