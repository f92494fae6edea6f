"""Section `guards`: what is watched while RL runs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator

from r3rag_jax.config.section import Section, key


class GuardsConfig(Section):
    """Thresholds on an RL iteration's metrics, and what is done when one is exceeded. 0 switches a threshold off."""

    dotted: ClassVar[str] = "guards"

    action: Literal["warn", "stop", "rollback"] = key(
        "warn", "what an exceeded threshold does: print a warning, end the run, or restore the last good checkpoint"
    )
    patience: int = key(1, "consecutive iterations that must exceed a threshold", "iterations", ge=1)
    rollbacks: int = key(3, "the run ends after this many rollbacks", "rollbacks", ge=0)
    nonfinite: Literal["skip", "stop", "rollback"] = key(
        "stop",
        "what a NaN or infinite loss or gradient does; its update is never applied: go on, end the run, or roll back",
    )
    save_state: bool = key(True, "save state and batch of the first non-finite step, so that it can be repeated")
    approx_kl: float = key(
        0.0, "maximum approximate KL of the policies before and after an iteration's updates", "nats per token", ge=0
    )
    kl: float = key(0.0, "maximum KL to the reference policy", "nats per token", ge=0)
    clip_fraction: float = key(0.0, "maximum share of tokens with a clipped ratio", "fraction", ge=0, le=1)
    min_entropy: float = key(0.0, "minimum entropy", "nats per token", ge=0)
    max_entropy: float = key(0.0, "maximum entropy", "nats per token", ge=0)
    no_answer_rate: float = key(
        0.0, "maximum share of trajectories that ran out of steps or tokens before an answer", "fraction", ge=0, le=1
    )
    context_full_rate: float = key(
        0.0, "maximum share of trajectories that filled rollout.max_length before an answer", "fraction", ge=0, le=1
    )
    format_error_rate: float = key(0.0, "maximum share of trajectories with a malformed step", "fraction", ge=0, le=1)
    repeated_query_rate: float = key(
        0.0, "maximum share of queries that repeat an earlier query of their trajectory", "fraction", ge=0, le=1
    )
    equal_groups: float = key(
        0.0, "maximum share of questions whose samples all have the same reward", "fraction", ge=0, le=1
    )
    length_drift: float = key(
        0.0, "maximum factor by which the mean trajectory length grows or shrinks since the first iteration"
    )
    displacement: float = key(
        0.0,
        "maximum log-probability that tokens with positive advantage lose in an iteration's updates",
        "nats per token",
        ge=0,
    )

    @field_validator("length_drift")
    @classmethod
    def _check_length_drift(cls, factor: float) -> float:
        if factor != 0 and factor <= 1:
            raise ValueError(f"must be a factor above 1, or 0 for none; got {factor}")
        return factor
