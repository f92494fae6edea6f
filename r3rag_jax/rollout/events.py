"""What happens to a question while it is played, told as it happens.

Waiting* Started ( StepText* StepWritten [ SearchStarted PassagesFound ] [ Paused ] )* Ended | Failed | Cancelled
"""

from __future__ import annotations

import dataclasses

from r3rag_jax.types import Passage, Step, Trajectory


@dataclasses.dataclass(frozen=True)
class Waiting:
    """All slots are taken; again when the number changes."""

    num_ahead: int  # questions that get a slot first


@dataclasses.dataclass(frozen=True)
class Started:
    """The question has got a slot: at its beginning, and after a pause."""


@dataclasses.dataclass(frozen=True)
class StepText:
    """More of a step has been written."""

    number: int  # of the step, from 1
    part: str  # analysis, query, answer, or malformed
    text: str  # to be appended to the part


@dataclasses.dataclass(frozen=True)
class StepWritten:
    """A step is complete, but for its passages; what was shown of its parts begins these."""

    number: int
    step: Step


@dataclasses.dataclass(frozen=True)
class SearchStarted:
    """A step's query is searched for."""

    number: int
    query: str


@dataclasses.dataclass(frozen=True)
class PassagesFound:
    """The passages that a step shows, best first."""

    number: int
    passages: tuple[Passage, ...]
    scores: tuple[float, ...]  # the retriever's, of each passage; comparable within one search only


@dataclasses.dataclass(frozen=True)
class Paused:
    """The step is finished, and the next is written when the user says so; until then the question has no slot."""

    number: int


@dataclasses.dataclass(frozen=True)
class Ended:
    """The question is finished."""

    trajectory: Trajectory


@dataclasses.dataclass(frozen=True)
class Failed:
    """The question cannot be finished: the search, the inference server or the engine has failed."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Cancelled:
    """The user has stopped the question, or the scheduler was closed."""


Event = Waiting | Started | StepText | StepWritten | SearchStarted | PassagesFound | Paused | Ended | Failed | Cancelled
LAST = (Ended, Failed, Cancelled)  # nothing comes after these
