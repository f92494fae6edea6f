"""Section `eval`: the final tables."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from r3rag_jax.config.baselines import BASELINES
from r3rag_jax.config.section import Section, check_names, key, require

BASE_SYSTEMS = BASELINES  # they use the base model, before any training
TRAINED_SYSTEMS = ("cold_start", "r3rag")  # before RL, after it
SYSTEMS = (*BASE_SYSTEMS, *TRAINED_SYSTEMS)


class EvalConfig(Section):
    """The final tables."""

    dotted: ClassVar[str] = "eval"

    systems: tuple[str, ...] = key(
        ("closed_book", "naive_rag", "cold_start", "r3rag"),
        f"systems that the eval phase compares, among {', '.join(SYSTEMS)}",
    )
    prompt: Literal["reading", "chat"] = key(
        "reading",
        "prompt of the baselines: `reading`: plain text to continue, for a base model; `chat`: an instruction, for a "
        "chat model",
    )
    max_questions: int = key(0, "the first so many test questions; 0: all", "questions", ge=0)
    judge: bool = key(False, "also report the share of answers that match exactly or that a judge calls correct")

    candidate_em: bool = key(
        False, "also report the share of answers of which the judge reads off a candidate that matches exactly"
    )
    recall_k: tuple[int, ...] = key(
        (5,), "depths k of `answer_recall@k`: does one of the first k passages of a search contain an answer?"
    )
    samples: int = key(1, "trajectories per question; several need a temperature", "trajectories", ge=1)
    temperature: float = key(0.0, "sampling temperature; 0: greedy", ge=0)
    seed: int = key(0, "seed of the sampled trajectories", ge=0)

    @property
    def asks_judge(self) -> bool:
        """Whether a metric needs the judge."""
        return self.judge or self.candidate_em

    @field_validator("systems")
    @classmethod
    def _check_systems(cls, systems: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(systems, SYSTEMS)

    @field_validator("recall_k")
    @classmethod
    def _check_recall_k(cls, recall_k: tuple[int, ...]) -> tuple[int, ...]:
        if any(k < 1 for k in recall_k) or len(set(recall_k)) < len(recall_k):
            raise ValueError(f"must be different numbers from 1; got {list(recall_k)}")
        return recall_k

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        require(
            self.samples == 1 or self.temperature > 0,
            f"eval.temperature must be above 0 with eval.samples={self.samples}, or all are the same; got 0",
            "eval.temperature",
            "eval.samples",
        )
        return self
