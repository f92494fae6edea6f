"""Section `rewards`: what trajectories are rewarded for."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from r3rag_jax.config.section import Section, key, require


class RewardConfig(Section):
    """Reward shaping of R3-RAG (arXiv 2505.23794)."""

    dotted: ClassVar[str] = "rewards"

    outcome: Literal["em", "f1", "cover_em", "judge"] = key(
        "em", "what makes an answer correct; `judge`: exact match or a judge's agreement (the paper's Acc)"
    )
    process: Literal["gold", "embedding", "gain", "judge"] = key(
        "gold",
        "relevance of a retrieval: its number of new gold passages; the smaller of the cosines of question and query "
        "and of query and passage (`embedding`); how much it tells of the gold answer, and wins the samples that read "
        "it (`gain`); or a judge's rating",
    )
    use_outcome: bool = key(True, "false: process rewards only")
    use_process: bool = key(True, "false: outcome reward only")
    outcome_weight: float = key(2.0, "reward of a correct answer")
    process_weight: float = key(
        1.0, "reward of a retrieval with relevance 1, before it is multiplied with one of the factors below", ge=0
    )
    max_process: float = key(
        6.4,
        "most that the process rewards of a trajectory add up to, factors included; beyond it searches earn nothing "
        "(not with compat=paper)",
        ge=0,
    )
    malformed: float = key(-1.0, "reward of a malformed step; unless given, -0.9 with compat=paper (as released)")
    no_answer: float = key(0.5, "penalty on the last step of a trajectory without answer (not with compat=paper)", ge=0)
    factor_correct: float = key(1.6, "factor of process rewards in a trajectory with a correct answer", ge=0)
    factor_wrong: float = key(0.8, "factor of process rewards in a trajectory with a wrong answer", ge=0)
    factor_no_answer: float = key(
        0.9,
        "factor of process rewards in a trajectory without answer; at most factor_wrong counts, unless compat=paper",
        ge=0,
    )
    compat: Literal["r3", "paper"] = key(
        "r3",
        "`r3`: with the same evidence right > wrong >= no answer > malformed; `paper`: the released shaping, which "
        "rewards no answer more than a wrong one",
    )
    clip: float = key(10.0, "rewards are clipped to [-clip, clip]", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _default_of_malformed(cls, given: Any) -> Any:
        is_paper = isinstance(given, dict) and given.get("compat") == "paper"
        return {"malformed": -0.9} | given if is_paper else given

    @property
    def needs_judge(self) -> bool:
        """Whether a reward depends on a judge."""
        return (self.use_outcome and self.outcome == "judge") or (self.use_process and self.process == "judge")

    @model_validator(mode="after")
    def _check_use(self) -> Self:
        require(
            self.use_outcome or self.use_process,
            "rewards.use_outcome or rewards.use_process must be true; got false for both",
            "rewards.use_outcome",
            "rewards.use_process",
        )
        return self
