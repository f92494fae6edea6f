"""The reward shaping of R3-RAG (arXiv 2505.23794, section 3.3, and its released code): one reward per step.

| step                          | reward                                                         | part      |
|-------------------------------|----------------------------------------------------------------|-----------|
| malformed                     | malformed_reward, whatever else the step is                    | format    |
| last of an ANSWERED trajectory| outcome_weight * correct                                       | outcome   |
| last of a NO_ANSWER trajectory| compat r3: -no_answer_penalty; compat paper: as any other step | no_answer |
| any other                     | process_weight * process * factor                              | process   |

The factor depends on the trajectory: `factor_correct` or `factor_wrong` if it is ANSWERED (correct from 0.5 on),
`factor_no_answer` if it is NO_ANSWER; on a FORMAT_ERROR it is that of a wrong answer (compat paper: 1). CONTEXT_FULL is
rewarded as NO_ANSWER.

The paper multiplies by 0.9 without an answer and by 0.8 with a wrong one, which itself earns 0: at the last step,
searching on is rewarded more than answering wrongly. compat r3 takes the smaller of the two factors, and the penalty
instead of the last step's process reward: after the same steps, never answering always totals less than a wrong answer,
and breaking the format less still.

Ablations: without `use_process` only the outcome and the format count (compat paper: the reward of a correct answer
goes to *every* step of its trajectory, as released; all but the last belong to the part `process`). Without
`use_outcome` the factor is 1, and neither an answer nor a missing answer is rewarded.

A judgement that failed is NaN, and so is every reward that depends on it, and no other: nothing stands in for it.

Shape suffixes: B trajectories, K steps.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from r3rag_jax.types import OUT_OF_BUDGET, Status

Compat = Literal["r3", "paper"]


class ShapedRewards(NamedTuple):
    """Rewards of all steps, and the parts that they add up to: each step belongs to one."""

    rewards_BK: jax.Array  # float32, 0 where no step was taken
    parts_BK: dict[str, jax.Array]  # outcome, process, format, no_answer: float32 [B, K], 0 elsewhere


@functools.partial(jax.jit, static_argnames=("use_process", "use_outcome", "compat"))
def shape_rewards(
    process_BK: jax.Array,
    correct_B: jax.Array,
    status_B: jax.Array,
    step_mask_BK: jax.Array,
    malformed_BK: jax.Array,
    *,
    outcome_weight: float = 2.0,
    process_weight: float = 1.0,
    use_process: bool = True,
    use_outcome: bool = True,
    compat: Compat = "r3",
    factor_correct: float = 1.6,
    factor_wrong: float = 0.8,
    factor_no_answer: float = 0.9,
    malformed_reward: float | None = None,
    no_answer_penalty: float = 0.5,
    clip: float = 10.0,
) -> ShapedRewards:
    """Reward of every step by the module's table.

    Args:
        process_BK: float [B, K], relevance in [0, 1] of the passages that a step retrieved; NaN = unknown.
        correct_B: float [B], e.g. exact match or F1 of the final answer, in [0, 1]; NaN = unknown; read if ANSWERED.
        status_B: int [B], of `Status`.
        step_mask_BK: bool [B, K], True = the step was taken; the last True is the last step.
        malformed_BK: bool [B, K], True = the step broke the protocol.
        malformed_reward: None = -1 (the paper), or -0.9 with compat paper (its released code).
        clip: bound on the absolute value of every reward.

    Raises:
        ValueError: compat is neither r3 nor paper.
    """
    if compat not in ("r3", "paper"):
        raise ValueError(f"rewards.compat must be r3 or paper; got {compat!r}")
    if malformed_reward is None:
        malformed_reward = -1.0 if compat == "r3" else -0.9
    correct_B, process_BK = correct_B.astype(jnp.float32), process_weight * process_BK.astype(jnp.float32)
    is_part_BK = _parts_of_steps(status_B, step_mask_BK, malformed_BK, has_penalty=use_outcome and compat == "r3")

    rewards_BK = process_BK if use_process else jnp.zeros_like(process_BK)
    if use_outcome and use_process:
        factor_missing = jnp.minimum(factor_no_answer, factor_wrong) if compat == "r3" else factor_no_answer
        factor_B = _factors(correct_B, status_B, factor_correct, factor_wrong, factor_missing, compat)
        rewards_BK = rewards_BK * factor_B[:, None]
    outcome_B = outcome_weight * correct_B if use_outcome else jnp.zeros_like(correct_B)
    rewards_BK = jnp.where(is_part_BK["outcome"], outcome_B[:, None], rewards_BK)
    rewards_BK = jnp.where(is_part_BK["no_answer"], -no_answer_penalty, rewards_BK)
    if use_outcome and compat == "paper" and not use_process:
        is_rewarded_B = (status_B == Status.ANSWERED) & ((correct_B >= 0.5) | jnp.isnan(correct_B))
        rewards_BK = jnp.where(is_rewarded_B[:, None], outcome_B[:, None], rewards_BK)
    rewards_BK = jnp.where(malformed_BK, jnp.float32(malformed_reward), rewards_BK)
    rewards_BK = jnp.where(step_mask_BK, jnp.clip(rewards_BK, -clip, clip), 0.0)
    return ShapedRewards(rewards_BK, {name: jnp.where(is_, rewards_BK, 0.0) for name, is_ in is_part_BK.items()})


def _factors(
    correct_B: jax.Array,
    status_B: jax.Array,
    factor_correct: float,
    factor_wrong: float,
    factor_missing: float | jax.Array,
    compat: Compat,
) -> jax.Array:
    """float32 [B], what the process rewards of each trajectory are multiplied with; NaN = unknown."""
    is_answered_B = status_B == Status.ANSWERED
    return jnp.select(
        [
            is_answered_B & jnp.isnan(correct_B),
            is_answered_B & (correct_B >= 0.5),
            is_answered_B,
            _is_out_of_budget(status_B),
        ],
        [jnp.nan, factor_correct, factor_wrong, factor_missing],
        factor_wrong if compat == "r3" else 1.0,
    )


def _is_out_of_budget(status_B: jax.Array) -> jax.Array:
    return jnp.isin(status_B, jnp.asarray(OUT_OF_BUDGET))


def _parts_of_steps(
    status_B: jax.Array, step_mask_BK: jax.Array, malformed_BK: jax.Array, *, has_penalty: bool
) -> dict[str, jax.Array]:
    """Part of the reward -> bool [B, K], the steps that belong to it; `has_penalty`: a missing answer costs something.

    A step is in one part, a step that was not taken in none.
    """
    num_left_BK = jnp.cumsum(step_mask_BK[:, ::-1], axis=1)[:, ::-1]  # steps from this one on
    is_formed_BK = step_mask_BK & ~malformed_BK
    is_last_BK = is_formed_BK & (num_left_BK == 1)
    is_outcome_BK = is_last_BK & (status_B == Status.ANSWERED)[:, None]
    is_no_answer_BK = is_last_BK & _is_out_of_budget(status_B)[:, None] & has_penalty
    return {
        "outcome": is_outcome_BK,
        "process": is_formed_BK & ~is_outcome_BK & ~is_no_answer_BK,
        "format": step_mask_BK & malformed_BK,
        "no_answer": is_no_answer_BK,
    }
