"""What a table is made of: cells, each of which is one evaluation, and the plan that lists them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from r3rag_jax.evaluation.checkpoint import Checkpoint
from r3rag_jax.evaluation.evaluator import Evaluator
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.types import Question

FOLDER = "tables"  # of the cells' files, in the folders of results and of trajectories


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """The questions of a column.

    Fields:
        path: None: the run's test questions.
        limit: the first so many; 0: all.
    """

    name: str
    path: Path | None = None
    limit: int = 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """One system on one set of questions.

    Fields:
        row: title of its row.
        checkpoint: the run or model, with the keys of this cell.
        system: a key of `SYSTEMS`.
        policy: BASE_POLICY, or the phase that trained it; "" where an inference server has it.
        suffix: what tells its files from those of other cells of the same system, policy and questions.
    """

    row: str
    checkpoint: Checkpoint
    system: str
    policy: str
    questions: QuestionSet
    suffix: str = ""

    @property
    def name(self) -> str:
        """Name of its result."""
        return f"{FOLDER}/{'-'.join(filter(None, map(slug, (*self._subject, self.suffix))))}"

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which a result of the same evaluation may be: its own, another table's, the eval phase's."""
        return self.name, f"{FOLDER}/{'-'.join(filter(None, map(slug, self._subject)))}", self.system

    @property
    def _subject(self) -> tuple[str, str, str]:
        return self.system, self.policy, self.questions.name


@dataclasses.dataclass(frozen=True)
class OpenedCell:
    """What a cell is measured with.

    Fields:
        num_passages: of the index; None: not known.
    """

    evaluator: Evaluator
    questions: Sequence[Question]
    decoder: DecoderConfig
    num_passages: int | None


OpenCell = Callable[[Cell], OpenedCell]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table that is to be made.

    Fields:
        name: a key of PLANS.
        file: name of its files.
        row_title: what its rows are.
        metrics: its numbers, in order.
        varied: facts of the fingerprints in which its rows are meant to differ.
        reference: the row that the others are tested against, "" for none.
        notes: sentences that go under it.
    """

    name: str
    title: str
    row_title: str
    cells: list[Cell]
    metrics: tuple[str, ...]
    varied: tuple[str, ...] = ()
    reference: str = ""
    notes: tuple[str, ...] = ()
    file: str = ""


def slug(text: str) -> str:
    """A text as a part of a file name."""
    return re.sub(r"[^\w.+=-]+", "_", text).strip("_.")
