"""Class-balanced sampling: as many questions of one kind as of another (`sft.balance`, `rl.balance`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from r3rag_jax.data.records import Records
from r3rag_jax.errors import UserError
from r3rag_jax.types import Question


def strata_of(questions: Records[Question], fields: Sequence[str], key: str) -> list[tuple[str, ...]]:
    """The kind of each question: the values that these fields of its metadata have.

    Args:
        key: the key of the configuration that names the fields, for messages.

    Raises:
        UserError: a question lacks one of the fields.
    """
    if not fields:  # without reading them
        return [()] * len(questions)
    kinds = []
    for index, question in enumerate(questions):
        if missing := [field for field in fields if question.metadata.get(field) is None]:
            there = ", ".join(question.metadata) or "none"
            raise UserError(
                f"{key} must be fields of each question's metadata, which are {there} in "
                f"{questions.place(index)}; got {missing[0]}"
            )
        kinds.append(tuple(str(question.metadata[field]) for field in fields))
    return kinds


def shuffled(strata: Sequence[tuple[str, ...]], seed: Sequence[int]) -> list[int]:
    """All positions in a random order, `balanced`."""
    order = np.random.default_rng(seed).permutation(len(strata)).tolist()
    return [order[place] for place in balanced([strata[index] for index in order])]


def balanced(strata: Sequence[tuple[str, ...]]) -> list[int]:
    """An order of all positions whose every beginning has as many of each stratum as of any other, while there are any.

    Within a stratum the order is kept.
    """
    places: dict[tuple[str, ...], list[int]] = {}
    for place, stratum in enumerate(strata):
        places.setdefault(stratum, []).append(place)
    rounds = itertools.zip_longest(*places.values())  # the first of each stratum, the second of each, …
    return [place for one in rounds for place in one if place is not None]
