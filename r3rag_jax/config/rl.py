"""Sections `rl`, `rl.kl`, `rl.critic`: policy optimization."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from r3rag_jax.config.presets import PRESETS, SOURCES, Preset, filled
from r3rag_jax.config.section import Section, key, require, section

GROUPED = ("grpo", "rloo")  # algorithms that compare the samples of a question, as `rl/algorithms.py` says


class KLConfig(Section):
    """Distance of the policy to the reference policy, which is the one after the cold start."""

    dotted: ClassVar[str] = "rl.kl"

    coef: float = key(0.01, "coefficient of the per-token KL to the reference policy", ge=0)
    placement: Literal["reward", "loss"] = key(
        "reward", "`reward`: subtracted from every token's reward; `loss`: added to the policy loss"
    )
    estimator: Literal["k1", "k2", "k3"] = key(
        "k1", "with d = logprob - reference logprob: d, d^2 / 2, or exp(-d) - 1 + d"
    )
    target: float = key(
        0.0, "after each iteration the coefficient is adapted towards this KL; 0: it is fixed", "nats per token", ge=0
    )
    adaptation_rate: float = key(
        0.1,
        "gain of the adaptation (arXiv 1909.08593); an iteration changes the coefficient by at most 0.2 x this share",
        ge=0,
    )

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        require(
            self.placement != "loss" or self.estimator != "k1",
            "rl.kl.estimator must be k2 or k3 when rl.kl.placement is loss, for the gradient of k1 is 0 on average;"
            " got k1",
            "rl.kl.estimator",
            "rl.kl.placement",
        )
        require(
            self.target == 0 or self.coef > 0,
            f"rl.kl.coef must be above 0, for rl.kl.target={self.target} adapts it; got {self.coef}",
            "rl.kl.coef",
            "rl.kl.target",
        )
        return self


class CriticConfig(Section):
    """The value model of `rl.algorithm: ppo`; other algorithms have none."""

    dotted: ClassVar[str] = "rl.critic"

    kind: Literal["separate", "head"] = key(
        "separate", "`separate`: a value model with weights of its own; `head`: a value head on the policy's trunk"
    )
    lr: float = key(9e-6, "peak learning rate of the critic", ge=0)
    gae_lambda: float = key(1.0, "lambda of generalized advantage estimation (GAE)", "fraction", ge=0, le=1)
    value_coef: float = key(1.0, "coefficient of the value loss", ge=0)
    value_clip: float = key(
        0.2, "how far a value may move from the one at rollout time until its loss is clipped", gt=0
    )


class RLConfig(Section):
    """Policy optimization against the live retriever."""

    dotted: ClassVar[str] = "rl"

    preset: Preset = key(
        "none",
        "a published algorithm: sets the keys below that define it, except those given beside it; "
        + "; ".join(f"`{name}`: {source}" for name, source in SOURCES.items()),
    )
    algorithm: Literal["ppo", "grpo", "rloo", "reinforce++"] = key(
        "ppo",
        "advantages: `ppo`: GAE of a critic; else returns minus the mean return of the question's samples (`grpo`), of "
        "its other samples (`rloo`), or of the whole batch (`reinforce++`)",
    )
    iterations: int = key(40, "rollout-and-update rounds", "iterations", ge=1)
    questions: int = key(
        32, "questions per iteration; one that comes twice gives other samples, of the same group", "questions", ge=1
    )
    balance: tuple[str, ...] = key(
        (), "likewise `sft.balance`, of an iteration's questions, while a pass over all has any of a combination"
    )
    epochs: int = key(1, "passes over an iteration's trajectories", "epochs", ge=1)
    async_rollouts: bool = key(
        False, "rollouts of the next iteration run during the update, with the policy before it (one step off-policy)"
    )
    batch_rows: int = key(16, "packed rows per update", "rows", ge=1)
    row_length: int = key(512, "length of a packed row", "tokens", ge=1)
    lr: float = key(5e-7, "peak learning rate of the policy, cosine to 10 %", ge=0)
    warmup: float = key(0.03, "share of the updates with rising learning rate", "fraction", ge=0, le=1)
    max_grad_norm: float = key(1.0, "gradients are clipped to this global norm", gt=0)
    adam_eps: float = key(
        1e-8, "Adam's epsilon, added to the root of the second moment; much smaller gradients make no step", gt=0
    )
    # Credit and advantages.
    gamma: float = key(1.0, "discount per policy token", "fraction", ge=0, le=1)
    step_discount: float = key(
        1.0,
        "discount per reasoning step; 0: each step is an episode of its own, as in the released code",
        "fraction",
        ge=0,
        le=1,
    )
    returns: Literal["to_go", "total"] = key(
        "to_go", "return of a token: `to_go`: rewards from this token on; `total`: all rewards (not with ppo)"
    )
    normalize_std: bool = key(
        False, "grpo: advantages are divided by the standard deviation (over n - 1) of the question's n returns"
    )
    whiten_advantages: bool = key(
        True, "advantages are shifted and scaled to mean 0 and standard deviation 1 over an iteration's tokens"
    )
    whiten_rewards: bool = key(
        False, "step rewards are scaled to standard deviation 1 over an iteration; their mean is kept"
    )
    negative_weight: float = key(1.0, "factor of negative advantages; 0: learn from positive advantages only", ge=0)
    drop_zero_variance: bool = key(
        True, "grpo and rloo: leave out questions whose samples all have the same reward (zero variance)"
    )
    max_resamples: int = key(
        0,
        "extra sampling rounds per iteration that replace zero-variance questions (dynamic sampling of DAPO)",
        "rounds",
        ge=0,
    )
    overlong_share: float = key(
        0.0,
        "soft overlong punishment of DAPO: the last step's reward falls linearly by 1 over this last share of the "
        "tokens that a trajectory may sample",
        "fraction",
        ge=0,
        le=1,
    )
    # Policy loss.
    clip: float = key(0.2, "probability ratios new / old are clipped at 1 - clip; 0: not at all", ge=0)
    clip_high: float = key(0.0, "probability ratios are clipped at 1 + clip_high; 0: at 1 + clip", ge=0)
    loss_aggregation: Literal["token", "step", "sequence", "constant"] = key(
        "token",
        "the policy loss is a mean over tokens; over steps, each averaged over its tokens (the value loss too, as in "
        "R3-RAG's code); over trajectories, likewise; or a sum, divided by loss_length and the number of trajectories",
    )
    loss_length: int = key(512, "divisor of a trajectory's sum with loss_aggregation=constant", "tokens", ge=1)
    max_importance_weight: float = key(
        0.0,
        "truncated importance sampling: ratios are taken against the policy before the iteration's first update, and "
        "tokens are weighted by its probability over the sampler's, at most this; 0: ratios against the sampler",
        ge=0,
    )
    entropy_coef: float = key(0.0, "coefficient of the entropy bonus", ge=0)
    eval_every: int = key(10, "iterations between evaluations on dev", "iterations", ge=1)
    checkpoint_every: int = key(10, "iterations between checkpoints", "iterations", ge=1)
    checkpoint_minutes: float = key(
        0.0, "minutes between checkpoints, beside checkpoint_every; 0: by iterations alone", "minutes", ge=0
    )
    keep_checkpoints: int = key(
        2, "newest checkpoints that are kept: where the newest is damaged the one before is read", "checkpoints", ge=1
    )
    keep_best: int = key(
        1, "checkpoints of the highest exact match on dev that are kept besides the newest", "checkpoints", ge=0
    )
    kl: KLConfig = section(KLConfig())
    critic: CriticConfig = section(CriticConfig())

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        return filled(given, PRESETS.get(str(given.get("preset")), {})) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check_returns(self) -> Self:
        require(
            self.returns != "total" or (self.algorithm != "ppo" and self.gamma == self.step_discount == 1),
            "rl.returns must be to_go with rl.algorithm=ppo and unless rl.gamma and rl.step_discount are 1; got total "
            f"with {self.algorithm}, {self.gamma} and {self.step_discount}",
            "rl.returns",
            "rl.algorithm",
            "rl.step_discount",
            "rl.gamma",
        )
        return self

    @model_validator(mode="after")
    def _check_checkpoints(self) -> Self:
        require(
            not (self.async_rollouts and self.checkpoint_minutes),
            "rl.checkpoint_minutes must be 0 when rl.async_rollouts is true: rollouts are not started across a "
            f"checkpoint, so the clock would say which policy samples; got {self.checkpoint_minutes:g}",
            "rl.checkpoint_minutes",
            "rl.async_rollouts",
        )
        return self

    @model_validator(mode="after")
    def _check_algorithm(self) -> Self:
        require(
            self.clip > 0 or self.clip_high == 0,
            f"rl.clip_high must be 0 when rl.clip is 0, which clips no ratio; got {self.clip_high}",
            "rl.clip_high",
            "rl.clip",
        )
        require(
            self.algorithm != "reinforce++" or self.whiten_advantages,
            "rl.whiten_advantages must be true when rl.algorithm is reinforce++, whose baseline it is; got false",
            "rl.whiten_advantages",
            "rl.algorithm",
        )
        require(
            not self.normalize_std or self.algorithm == "grpo",
            f"rl.normalize_std must be false unless rl.algorithm is grpo; got true with {self.algorithm}",
            "rl.normalize_std",
            "rl.algorithm",
        )
        require(
            self.max_resamples == 0 or (self.algorithm in GROUPED and self.drop_zero_variance),
            "rl.max_resamples must be 0 unless rl.algorithm is grpo or rloo and rl.drop_zero_variance true; got "
            f"{self.max_resamples} with {self.algorithm} and {str(self.drop_zero_variance).lower()}",
            "rl.max_resamples",
            "rl.algorithm",
            "rl.drop_zero_variance",
        )
        return self
