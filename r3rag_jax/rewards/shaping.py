"""The reward shaping of R3-RAG (arXiv 2505.23794, section 3.3, and its released code): one reward per step.

| step                           | reward                                                         | part      |
|--------------------------------|----------------------------------------------------------------|-----------|
| malformed                      | malformed_reward, whatever else the step is                    | format    |
| last of an ANSWERED trajectory | outcome_weight * correct                                       | outcome   |
| last of one without an answer  | compat r3: -no_answer_penalty; compat paper: as any other step | no_answer |
| any other                      | process_weight * process * factor                              | process   |

The factor depends on how the trajectory ends; without an answer means NO_ANSWER or CONTEXT_FULL:

| trajectory                        | compat r3                            | compat paper       |
|-----------------------------------|--------------------------------------|--------------------|
| ANSWERED and correct (0.5 or more)| factor_correct                       | factor_correct     |
| ANSWERED and wrong                | factor_wrong                         | factor_wrong       |
| without an answer                 | min(factor_no_answer, factor_wrong)  | factor_no_answer   |
| FORMAT_ERROR                      | 0                                    | 1                  |

**compat paper** is the released shaping, with its incentives: it multiplies by 0.9 without an answer and by 0.8 with a
wrong one, which itself earns 0, so searching on at the last step is rewarded more than answering wrongly; and a step
that breaks the format keeps what the steps before it earned.

**compat r3** (the default) guarantees, of trajectories in which only the last step may be malformed:

a. A search that shows no passage that is new to its trajectory earns nothing, whatever the process reward
   (`Scorer.score` sets it to 0; `embedding` and `judge` give 0 to a repeated query too).
b. The process rewards of a trajectory add up to at most `max_process`: once they do, further searches earn nothing.
c. With the same evidence found, a right answer totals more than a wrong one, a wrong one at least as much as none, and
   none more than a malformed step, however many steps each took. Evidence is the sum of the process rewards before
   shaping: with `gold`, the number of supporting passages shown.

(a) and (b) hold for all settings, (c) where 0 < outcome_weight, factor_wrong <= factor_correct, 0 <= no_answer_penalty,
malformed_reward < -no_answer_penalty, and clip is at least as large as each of them and max_process. (A guess without
evidence may earn less than a wrong answer with all of it: that is what makes a policy search.)
`tests/rewards/test_guarantees.py` proves them by enumeration.

Ablations: without `use_process` only the outcome and the format count (compat paper: the reward of a correct answer
goes to *every* step of its trajectory, as released; all but the last belong to the part `process`). Without
`use_outcome` an answer earns nothing and a missing one costs nothing, and the factor is 1 (compat paper: still
factor_no_answer without an answer); of (c) it remains that a malformed step totals less than anything else.

A judgement that failed is NaN, and so is every reward that depends on it, and no other: nothing stands in for it. (The
sum that `max_process` bounds counts it as 0; such a trajectory is not trained on.)

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
    max_process: float = 6.4,
    malformed_reward: float | None = None,
    no_answer_penalty: float = 0.5,
    clip: float = 10.0,
) -> ShapedRewards:
    """Reward of every step by the module's tables.

    Args:
        process_BK: float [B, K], relevance of the passages that a step retrieved; NaN = unknown. compat paper clips it
            to [0, 1].
        correct_B: float [B], e.g. exact match or F1 of the final answer, in [0, 1]; NaN = unknown; read if ANSWERED.
        status_B: int [B], of `Status`.
        step_mask_BK: bool [B, K], True = the step was taken; the last True is the last step.
        malformed_BK: bool [B, K], True = the step broke the protocol.
        max_process: bound on the absolute sum of a trajectory's process rewards, factors included; not in compat paper.
        malformed_reward: None = -1 (the paper), or -0.9 with compat paper (its released code).
        clip: bound on the absolute value of every reward.

    Raises:
        ValueError: compat is neither r3 nor paper.
    """
    if compat not in ("r3", "paper"):
        raise ValueError(f"rewards.compat must be r3 or paper; got {compat!r}")
    if malformed_reward is None:
        malformed_reward = -1.0 if compat == "r3" else -0.9
    correct_B, process_BK = correct_B.astype(jnp.float32), process_BK.astype(jnp.float32)
    is_part_BK = _parts_of_steps(status_B, step_mask_BK, malformed_BK, has_penalty=use_outcome and compat == "r3")

    if use_process:
        factors = factor_correct, factor_wrong, factor_no_answer
        factor_B = _factors(correct_B, status_B, *factors, use_outcome=use_outcome, compat=compat)
        rewards_BK = _process_rewards(process_weight, process_BK, factor_B, compat)
        if compat == "r3":
            rewards_BK = _bounded(jnp.where(is_part_BK["process"], rewards_BK, 0.0), max_process)
    else:
        rewards_BK = jnp.zeros_like(process_BK)
    outcome_B = outcome_weight * correct_B if use_outcome else jnp.zeros_like(correct_B)
    rewards_BK = jnp.where(is_part_BK["outcome"], outcome_B[:, None], rewards_BK)
    rewards_BK = jnp.where(is_part_BK["no_answer"], -no_answer_penalty, rewards_BK)
    if use_outcome and compat == "paper" and not use_process:
        is_rewarded_B = (status_B == Status.ANSWERED) & ((correct_B >= 0.5) | jnp.isnan(correct_B))
        rewards_BK = jnp.where(is_rewarded_B[:, None], outcome_B[:, None], rewards_BK)
    rewards_BK = jnp.where(malformed_BK, jnp.float32(malformed_reward), rewards_BK)
    rewards_BK = jnp.where(step_mask_BK, jnp.clip(rewards_BK, -clip, clip), 0.0)
    return ShapedRewards(rewards_BK, {name: jnp.where(is_, rewards_BK, 0.0) for name, is_ in is_part_BK.items()})


def _process_rewards(weight: float, process_BK: jax.Array, factor_B: jax.Array, compat: Compat) -> jax.Array:
    """weight * process * factor; a factor of 0 makes an unknown relevance a known reward."""
    process_BK = process_BK if compat == "r3" else jnp.clip(process_BK, 0.0, 1.0)
    return jnp.where(factor_B[:, None] == 0, 0.0, weight * process_BK * factor_B[:, None])


def _factors(
    correct_B: jax.Array,
    status_B: jax.Array,
    factor_correct: float,
    factor_wrong: float,
    factor_no_answer: float,
    *,
    use_outcome: bool,
    compat: Compat,
) -> jax.Array:
    """float32 [B], what the process rewards of each trajectory are multiplied with; NaN = unknown."""
    is_answered_B, is_missing_B = status_B == Status.ANSWERED, jnp.isin(status_B, jnp.asarray(OUT_OF_BUDGET))
    if not use_outcome:
        return jnp.where(is_missing_B & (compat == "paper"), factor_no_answer, 1.0)
    factor_missing = jnp.minimum(factor_no_answer, factor_wrong) if compat == "r3" else factor_no_answer
    return jnp.select(
        [is_answered_B & jnp.isnan(correct_B), is_answered_B & (correct_B >= 0.5), is_answered_B, is_missing_B],
        [jnp.nan, factor_correct, factor_wrong, factor_missing],
        0.0 if compat == "r3" else 1.0,
    )


def _bounded(process_BK: jax.Array, bound: float) -> jax.Array:
    """Rewards whose running sum stays in [-bound, bound]: what would lead further out is cut off, NaN counts as 0.

    bound 2:  1.6 1.6 1.6 -1.6  ->  1.6 0.4 0 0
    """
    known_BK = jnp.nan_to_num(process_BK, nan=0.0)
    after_BK = jnp.cumsum(known_BK, axis=1)
    before_BK = after_BK - known_BK
    is_inside_BK = jnp.maximum(jnp.abs(before_BK), jnp.abs(after_BK)) <= bound
    cut_BK = jnp.clip(after_BK, -bound, bound) - jnp.clip(before_BK, -bound, bound)
    return jnp.where(is_inside_BK | jnp.isnan(process_BK), process_BK, cut_BK)


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
    is_no_answer_BK = is_last_BK & jnp.isin(status_B, jnp.asarray(OUT_OF_BUDGET))[:, None] & has_penalty
    return {
        "outcome": is_outcome_BK,
        "process": is_formed_BK & ~is_outcome_BK & ~is_no_answer_BK,
        "format": step_mask_BK & malformed_BK,
        "no_answer": is_no_answer_BK,
    }
