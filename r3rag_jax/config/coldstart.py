"""Sections `coldstart`, `coldstart.teacher`, `coldstart.local`: who writes the cold start's trajectories, and how."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from r3rag_jax.config.data import DataConfig, split_source
from r3rag_jax.config.endpoint import EndpointConfig
from r3rag_jax.config.judge import LocalJudgeConfig
from r3rag_jax.config.section import Section, key, require, section

TRAJECTORIES = "trajectories.jsonl"  # what a cold start builder writes to `dir`


class TeacherConfig(EndpointConfig):
    """The server of `coldstart.source: server`, what it may be asked in a minute, and what it costs."""

    dotted: ClassVar[str] = "coldstart.teacher"

    tokens_per_minute: int = key(
        0, "rate limit of prompts and replies together, evenly spaced; 0: no limit", "tokens/minute", ge=0
    )
    price_input: float = key(0.0, "price of a million tokens of prompts, in any currency", "per million tokens", ge=0)
    price_output: float = key(0.0, "price of a million tokens of replies, likewise", "per million tokens", ge=0)
    timeout_s: float = key(600.0, "a request fails unless its whole reply has come after this time", "seconds", gt=0)


class LocalTeacherConfig(LocalJudgeConfig):
    """The model of `coldstart.source: local`."""

    dotted: ClassVar[str] = "coldstart.local"

    slots: int = key(16, "steps that are written in parallel", "rows", ge=1)
    max_length: int = key(4096, "longest prompt and reply together", "tokens", ge=1)


class ColdStartConfig(Section):
    """How `python -m r3rag_jax.coldstart` makes the trajectories of the cold start."""

    dotted: ClassVar[str] = "coldstart"

    source: Literal["server", "local", "gold"] = key(
        "server",
        "who writes: `server`: a chat model on any OpenAI-compatible server; `local`: a Hugging Face model on the own "
        "devices; `gold`: the decompositions that the questions come with",
    )
    questions: str = key("", "questions with their answers, as data.rl; empty: those of data.rl", "path")
    max_questions: int = key(0, "the first so many of them; 0: all", "questions", ge=0)
    dir: str = key("", "directory of journal and trajectories; empty: runs/<name>-coldstart", "path")
    temperatures: tuple[float, ...] = key(
        (0.1, 0.4, 0.7, 1.0), "sampling temperature of each attempt at a question, until one is accepted; 0: greedy"
    )
    max_tokens: int = key(512, "longest reply, which is one step", "tokens", ge=1)
    correct: Literal["em", "judge"] = key(
        "em", "which answers are right: `em`: exact matches; `judge`: also those that the judge of `judge` says are"
    )
    min_searches: int = key(1, "trajectories with fewer searches are rejected: they answer from memory", ge=0)
    keep: int = key(1, "different trajectories of a question that are accepted at most", "trajectories", ge=1)
    num_trajectories: int = key(0, "ends with so many accepted ones; 0: with the last question", "trajectories", ge=0)
    max_cost: float = key(0.0, "ends when the teacher has cost so much; 0: no limit", "currency of the prices", ge=0)
    max_failure_share: float = key(
        0.2, "the command ends if the server fails in a larger share of the requests", "fraction", ge=0, le=1
    )
    prompt: str = key(
        "", "a text file with {transcript}, {step}, {max_steps} that asks for the next step; empty: built-in", "path"
    )
    teacher: TeacherConfig = section(TeacherConfig())
    local: LocalTeacherConfig = section(LocalTeacherConfig())

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if not temperatures or any(t < 0 for t in temperatures):
            shown = ", ".join(map(str, temperatures)) or "none"
            raise ValueError(f"must be one or more numbers of at least 0; got {shown}")
        return temperatures

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        require(
            self.max_cost == 0 or self.teacher.price_input + self.teacher.price_output > 0,
            f"coldstart.max_cost needs coldstart.teacher.price_input or price_output; got {self.max_cost} without them",
            "coldstart.max_cost",
            "coldstart.teacher.price_input",
        )
        require(
            self.max_tokens < self.local.max_length,
            f"coldstart.max_tokens must be less than coldstart.local.max_length={self.local.max_length}; "
            f"got {self.max_tokens}",
            "coldstart.max_tokens",
            "coldstart.local.max_length",
        )
        return self

    def question_source(self, data: DataConfig) -> str:
        """The file of the questions, as `NAME:FILE` where it has a name; empty where none is named here."""
        data_set, file = split_source(self.questions)
        path = str(Path(data.dir) / file) if file else ""
        return f"{data_set}:{path}" if data_set else path
