"""The R3 reward shaping: process, outcome and format become one reward per step.

Shape suffixes: B trajectories, K steps.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from r3rag_jax.rewards.format import format_rewards
from r3rag_jax.types import Status


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
    compat: Literal["r3", "paper"] = "r3",
    factor_correct: float = 1.6,
    factor_wrong: float = 0.8,
    factor_no_answer: float = 0.9,
    malformed_reward: float | None = None,
    no_answer_penalty: float = 0.5,
    clip: float = 10.0,
) -> jax.Array:
    """Reward of every step (arXiv 2505.23794, section 3.3, and its released code).

    | step                       | reward                                                          |
    |----------------------------|-----------------------------------------------------------------|
    | malformed                  | malformed_reward, whatever else it is                           |
    | last of an ANSWERED one    | outcome_weight * correct                                        |
    | last of a NO_ANSWER one    | compat r3: -no_answer_penalty; compat paper: as any other step  |
    | any other                  | process_weight * process * factor                               |

    The factor is that of the trajectory: `factor_correct` or `factor_wrong` when ANSWERED (correct
    from 0.5 on), `factor_no_answer` when NO_ANSWER; on a FORMAT_ERROR that of a wrong answer (compat paper: 1).

    The paper scales by 0.9 without an answer and by 0.8 with a wrong one, which itself earns 0: at
    the last step, searching on beats answering wrongly. compat r3 takes the smaller of the two
    factors, and the penalty instead of the last step's process reward: after the same steps, never
    answering always totals less, and breaking the format less still.

    Ablations: without `use_process` only the outcome and the format count (compat paper: a correct
    answer's reward goes to *every* step of its trajectory, as released). Without `use_outcome` the
    factor is 1, and neither answer nor missing answer is rewarded.

    A judgement that failed is NaN, and so is every reward that depends on it, and no other: nothing stands in for it.

    Args:
        process_BK: float [B, K], relevance in [0, 1] of the passages a step retrieved; NaN = unknown.
        correct_B: float [B], exact match or F1 of the final answer, in [0, 1]; NaN = unknown; read where ANSWERED.
        status_B: int [B], of `Status`.
        step_mask_BK: bool [B, K], True = the step was taken; the last True is the last step.
        malformed_BK: bool [B, K], True = the step broke the protocol.
        malformed_reward: None = -1 (the paper), or -0.9 with compat paper (its released code).
        clip: bound on the size of every reward.

    Returns:
        float32 [B, K], 0 where no step was taken.

    Raises:
        ValueError: compat is neither r3 nor paper.
    """
    if compat not in ("r3", "paper"):
        raise ValueError(f"rewards.compat must be r3 or paper; got {compat!r}")
    if malformed_reward is None:
        malformed_reward = -1.0 if compat == "r3" else -0.9
    correct_B = correct_B.astype(jnp.float32)
    is_answered_B, is_no_answer_B = status_B == Status.ANSWERED, status_B == Status.NO_ANSWER
    is_right_B = is_answered_B & (correct_B >= 0.5)
    is_unknown_B = is_answered_B & jnp.isnan(correct_B)
    taken_after_BK = jnp.cumsum(step_mask_BK[:, ::-1], axis=1)[:, ::-1]
    is_last_BK = step_mask_BK & (taken_after_BK == 1)
    is_answer_BK = is_last_BK & is_answered_B[:, None]

    process_BK = process_weight * process_BK.astype(jnp.float32)
    rewards_BK = process_BK if use_process else jnp.zeros_like(process_BK)
    if use_outcome:
        factor_missing = jnp.minimum(factor_no_answer, factor_wrong) if compat == "r3" else factor_no_answer
        factor_B = jnp.select(
            [is_unknown_B, is_right_B, is_answered_B, is_no_answer_B],
            [jnp.nan, factor_correct, factor_wrong, factor_missing],
            factor_wrong if compat == "r3" else 1.0,
        )
        if use_process:
            rewards_BK = rewards_BK * factor_B[:, None]
    outcome_B = outcome_weight * correct_B if use_outcome else jnp.zeros_like(correct_B)
    rewards_BK = jnp.where(is_answer_BK, outcome_B[:, None], rewards_BK)
    if use_outcome and compat == "r3":
        is_missing_BK = is_last_BK & is_no_answer_B[:, None]
        rewards_BK = jnp.where(is_missing_BK, -no_answer_penalty, rewards_BK)
    if use_outcome and compat == "paper" and not use_process:
        rewards_BK = jnp.where((is_right_B | is_unknown_B)[:, None], outcome_B[:, None], rewards_BK)
    rewards_BK = format_rewards(rewards_BK, malformed_BK, malformed_reward)
    return jnp.where(step_mask_BK, jnp.clip(rewards_BK, -clip, clip), 0.0)
