"""The rows of `trajectories/rl.jsonl`: trajectories with the reward and advantage of steps and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.text.token_texts import token_texts
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.training.batch import IterationBatches
from r3rag_jax.training.experience import Experience
from r3rag_jax.types import Trajectory

DECIMALS = 4  # of numbers of tokens
Recorded = Mapping[str, np.ndarray]  # advantages, entropies: float32, of all tokens of an iteration's batches


def recorded_rows(
    experience: Experience,
    chosen: Sequence[int],
    packed: IterationBatches,
    recorded: Recorded,
    tokenizer: Tokenizer | None,
) -> list[dict[str, Any]]:
    """JSON objects of `trajectory_to_dict` of the chosen trajectories, and what RL knows of them.

    A trajectory has its `reward`, a step its `reward` and the mean `advantage` of its tokens. With a tokenizer, a step
    has its `tokens` (texts) with their `logprobs` while sampling and, where they differ within the step, `advantages`;
    and `entropies` where they are recorded. What was not trained on has no advantage.
    """
    table_rows = {trajectory: row for row, trajectory in enumerate(packed.rows)}
    rows = []
    for i in chosen:
        trajectory, rewards_K = experience.trajectories[i], experience.scores.rewards[i]
        tokens = _of_tokens(packed, table_rows[i], recorded) | _sampled(trajectory)
        row = trajectory_to_dict(trajectory) | {"reward": float(np.sum(rewards_K))}
        for number, step in enumerate(row["steps"]):
            step["reward"] = round(float(rewards_K[number]), DECIMALS)
            step |= _step(number, tokens, tokenizer)
        rows.append(row)
    return rows


def _sampled(trajectory: Trajectory) -> dict[str, np.ndarray]:
    """Ids, steps and log-probabilities of the tokens that the policy wrote, in their order."""
    fields = {"ids": "ids", "steps": "step_ids", "logprobs": "behaviour_logprobs"}
    return {
        name: np.concatenate([np.arange(0), *(getattr(s, field)[s.loss_mask] for s in trajectory.samples)])
        for name, field in fields.items()
    }


def _of_tokens(packed: IterationBatches, row: int, recorded: Recorded) -> dict[str, np.ndarray]:
    """Of each token that the policy wrote, in their order; NaN where it is in no batch."""
    indices = np.asarray(packed.table.indices[row])[np.asarray(packed.table.mask[row])]
    return {name: np.append(values, np.nan)[np.minimum(indices, len(values))] for name, values in recorded.items()}


def _step(number: int, tokens: dict[str, np.ndarray], tokenizer: Tokenizer | None) -> dict[str, Any]:
    of_step = {name: values[tokens["steps"] == number] for name, values in tokens.items()}
    found: dict[str, Any] = {}
    advantages = of_step.get("advantages", np.zeros(0))
    if len(advantages) and np.isfinite(advantages).all():
        found["advantage"] = round(float(advantages.mean()), DECIMALS)
    if tokenizer is None or not len(of_step["ids"]):
        return found
    found["tokens"] = token_texts(tokenizer, of_step["ids"].tolist())
    if np.isfinite(of_step["logprobs"]).all():
        found["logprobs"] = _rounded(of_step["logprobs"])
    if "advantage" in found and np.ptp(advantages) > 10**-DECIMALS:
        found["advantages"] = _rounded(advantages)
    entropies = of_step.get("entropies", np.zeros(0))
    if len(entropies) and np.isfinite(entropies).all():
        found["entropies"] = _rounded(entropies)
    return found


def _rounded(values: np.ndarray) -> list[float]:
    return (np.round(values.astype(float), DECIMALS) + 0.0).tolist()  # -0.0 + 0.0 is 0.0
