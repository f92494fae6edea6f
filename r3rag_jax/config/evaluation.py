"""Section `eval`: the final tables."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator

from r3rag_jax.config.section import Section, check_names, key

SYSTEMS = ("closed_book", "oneshot_rag", "ircot", "cold_start", "r3rag")
BASE_SYSTEMS = ("closed_book", "oneshot_rag", "ircot")  # they use the base model, before any training


class EvalConfig(Section):
    """The final tables."""

    dotted: ClassVar[str] = "eval"

    systems: tuple[str, ...] = key(
        ("closed_book", "oneshot_rag", "cold_start", "r3rag"),
        f"systems that the eval phase compares, among {', '.join(SYSTEMS)}",
    )
    prompt: Literal["reading", "chat"] = key(
        "reading",
        "prompt of the baselines: `reading`: plain text to continue, for a base model; `chat`: an instruction, for a "
        "chat model",
    )
    max_questions: int = key(0, "the first so many test questions; 0: all", "questions", ge=0)
    judge: bool = key(False, "also report the share of answers that match exactly or that a judge calls correct")

    @field_validator("systems")
    @classmethod
    def _check_systems(cls, systems: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(systems, SYSTEMS)
