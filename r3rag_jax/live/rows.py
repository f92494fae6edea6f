"""Events and finished questions as JSON: what the demo's API sends, and `ask --json` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.live.player import Settings
from r3rag_jax.reporting.rendering import outcome
from r3rag_jax.rollout.events import (
    Cancelled,
    Ended,
    Event,
    Failed,
    PassagesFound,
    Paused,
    SearchStarted,
    Started,
    StepText,
    StepWritten,
    Waiting,
)
from r3rag_jax.types import Passage, Question, Trajectory


class WaitingRow(BaseModel):
    """All slots are taken."""

    event: Literal["waiting"] = "waiting"
    num_ahead: int = Field(description="questions that get a slot first")


class StartedRow(BaseModel):
    """The question has a slot; again after each pause."""

    event: Literal["started"] = "started"


class TextRow(BaseModel):
    """More text of a part of a step."""

    event: Literal["text"] = "text"
    step: int = Field(description="number of the step, from 1")
    part: Literal["analysis", "query", "answer", "malformed"]
    text: str = Field(description="to be appended to the part")


class StepRow(BaseModel):
    """A step is complete, but for its passages; its parts replace what was sent of them."""

    event: Literal["step"] = "step"
    step: int
    analysis: str = Field(description="of a malformed step: its whole text")
    query: str | None
    answer: str | None
    is_well_formed: bool


class SearchRow(BaseModel):
    """A query is searched for."""

    event: Literal["search"] = "search"
    step: int
    query: str


class PassageRow(BaseModel):
    """A passage that a step shows."""

    id: str
    title: str
    text: str
    score: float = Field(description="the retriever's; comparable within one search only")
    is_supporting: bool | None = Field(description="whether it is evidence; null where the data set does not say")


class PassagesRow(BaseModel):
    """What a search has found, best first; passages of earlier steps are not shown again."""

    event: Literal["passages"] = "passages"
    step: int
    passages: list[PassageRow]


class PausedRow(BaseModel):
    """The next step waits for `POST /v1/questions/{id}/next`; until then the question has no slot."""

    event: Literal["paused"] = "paused"
    step: int


class EndRow(BaseModel):
    """The question is finished."""

    event: Literal["end"] = "end"
    result: dict[str, Any] = Field(
        description="the trajectory as in trajectories/*.jsonl, with settings, answer, outcome (right, wrong, none or "
        "unknown), num_tokens, num_input_tokens, and a score beside each passage"
    )


class FailedRow(BaseModel):
    """The question cannot be finished."""

    event: Literal["failed"] = "failed"
    reason: str


class CancelledRow(BaseModel):
    """The question was stopped."""

    event: Literal["cancelled"] = "cancelled"


Row = (
    WaitingRow
    | StartedRow
    | TextRow
    | StepRow
    | SearchRow
    | PassagesRow
    | PausedRow
    | EndRow
    | FailedRow
    | CancelledRow
)
LAST_ROWS = ("end", "failed", "cancelled")


def rows_schema() -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schema of a row, and those it refers to, which belong in the components of an OpenAPI document."""
    rows: TypeAdapter[Any] = TypeAdapter(Annotated[Row, Field(discriminator="event")])
    schema = rows.json_schema(ref_template="#/components/schemas/{model}")
    return schema, schema.pop("$defs")


class RowMaker:
    """Turns the events of one question into rows."""

    def __init__(self, question: Question, settings: Settings):
        self._question, self._settings = question, settings
        self._scores: dict[str, float] = {}  # id of a passage that was found -> its score; none is found twice

    def row(self, event: Event) -> Row:
        """The row of an event; events come in their order."""
        match event:
            case Waiting(num_ahead):
                return WaitingRow(num_ahead=num_ahead)
            case Started():
                return StartedRow()
            case StepText(number, part, text):
                return TextRow(step=number, part=part, text=text)  # type: ignore[arg-type]
            case StepWritten(number, step):
                parts = {name: getattr(step, name) for name in ("analysis", "query", "answer", "is_well_formed")}
                return StepRow(step=number, **parts)
            case SearchStarted(number, query):
                return SearchRow(step=number, query=query)
            case PassagesFound(number, passages, scores):
                self._scores |= {passage.id: score for passage, score in zip(passages, scores, strict=True)}
                return PassagesRow(step=number, passages=[self._passage(passage) for passage in passages])
            case Paused(number):
                return PausedRow(step=number)
            case Ended(trajectory):
                return EndRow(result=result_of(trajectory, self._settings, self._scores))
            case Failed(reason):
                return FailedRow(reason=reason)
            case Cancelled():
                return CancelledRow()

    def _passage(self, passage: Passage) -> PassageRow:
        supporting = self._question.supporting_ids
        return PassageRow(
            id=passage.id, title="" if passage.title == passage.text else passage.title, text=passage.text,
            score=self._scores[passage.id], is_supporting=passage.id in supporting if supporting else None,
        )  # fmt: skip


def result_of(trajectory: Trajectory, settings: Settings, scores: Mapping[str, float]) -> dict[str, Any]:
    """A finished question as JSON.

    Args:
        scores: id of each passage of the trajectory -> its score.
    """
    row = trajectory_to_dict(trajectory)
    for step in row["steps"]:
        for passage in step.get("passages", ()):
            passage["score"] = scores[passage["id"]]
    chosen = dataclasses.asdict(settings)
    del chosen["single_steps"]  # changes nothing in the trajectory
    return row | {
        "answer": trajectory.answer,
        "outcome": outcome(trajectory).kind,
        "num_tokens": trajectory.num_tokens,
        "num_input_tokens": trajectory.num_input_tokens,
        "settings": chosen,
    }
