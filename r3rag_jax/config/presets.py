"""Published algorithms by name: what `rl.preset` sets of section `rl`.

A preset sets every key that defines the algorithm, also those that it switches off; learning rates, batches and the
length of a run stay the recipe's. Keys that are given beside `rl.preset` win over it. On trajectories of several steps
`returns: total` treats a trajectory as one response whose reward is the sum over its steps.
"""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["none", "ppo_paper", "grpo", "dr_grpo", "dapo", "rloo", "reinforce++"]

SOURCES = {
    "ppo_paper": "R3-RAG, arXiv 2505.23794, section 3.3, and its released code",
    "grpo": "arXiv 2402.03300, eq. 3 and 4, outcome supervision (section 4.1.2)",
    "dr_grpo": "arXiv 2503.20783, section 3",
    "dapo": "arXiv 2503.14476, eq. 8 to 13",
    "rloo": "arXiv 2402.14740, the estimator RLOO",
    "reinforce++": "arXiv 2501.03262",
}

# A clipped policy gradient of whole trajectories without anything else.
_PLAIN: dict[str, Any] = {
    "gamma": 1.0, "step_discount": 1.0, "returns": "total",
    "normalize_std": False, "whiten_advantages": False, "whiten_rewards": False, "negative_weight": 1.0,
    "drop_zero_variance": False, "max_resamples": 0, "overlong_share": 0.0,
    "clip": 0.2, "clip_high": 0.0, "loss_aggregation": "token", "max_importance_weight": 0.0, "entropy_coef": 0.0,
    "kl.coef": 0.0, "kl.placement": "reward", "kl.estimator": "k1", "kl.target": 0.0,
}  # fmt: skip

# Preset -> key of section `rl` -> value.
PRESETS: dict[str, dict[str, Any]] = {
    # Each step an episode and a sample of its own: averaged over its tokens, then over samples, in both losses.
    "ppo_paper": _PLAIN | {
        "algorithm": "ppo", "returns": "to_go", "step_discount": 0.0, "whiten_advantages": True,
        "loss_aggregation": "step", "kl.coef": 0.01, "critic.kind": "separate", "critic.gae_lambda": 1.0,
        "critic.value_coef": 1.0, "critic.value_clip": 0.2,
    },
    # A = (R - mean) / std of the group, std over n - 1; the loss a mean over trajectories; KL (k3) in the loss, 0.04.
    "grpo": _PLAIN | {
        "algorithm": "grpo", "normalize_std": True, "loss_aggregation": "sequence",
        "kl.coef": 0.04, "kl.placement": "loss", "kl.estimator": "k3",
    },
    # A = R - mean of the group; the loss a sum over tokens, divided by a constant.
    "dr_grpo": _PLAIN | {"algorithm": "grpo", "loss_aggregation": "constant"},
    # Clip-higher, dynamic sampling, a mean over tokens, soft overlong punishment over 4,096 of 20,480 tokens; no KL.
    "dapo": _PLAIN | {
        "algorithm": "grpo", "normalize_std": True, "clip_high": 0.28, "drop_zero_variance": True,
        "max_resamples": 10, "overlong_share": 0.2,
    },
    # A = R - mean of the others' R, KL in R; REINFORCE without clipping: the sum over tokens, a mean over trajectories.
    # The coefficient of the KL depends on the task: rl.kl.coef is left as it is.
    "rloo": {name: value for name, value in _PLAIN.items() if name != "kl.coef"} | {
        "algorithm": "rloo", "clip": 0.0, "loss_aggregation": "constant", "loss_length": 1,
    },
    # A_t = R - coef * sum of the KL from token t on, whitened over all tokens of the iteration; clipped as PPO.
    "reinforce++": _PLAIN | {
        "algorithm": "reinforce++", "returns": "to_go", "whiten_advantages": True, "kl.coef": 0.01,
    },
}  # fmt: skip


def filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A section's `given` values with `defaults` by dotted key in all places that nothing was given for.

    Nested sections are dicts or models; a model counts as given in the keys that it was made with.
    """
    filled = dict(given)
    for dotted, value in defaults.items():
        section, _, name = dotted.rpartition(".")
        if not section:
            filled.setdefault(name, value)
            continue
        nested = filled.get(section, {})
        if not isinstance(nested, dict):
            nested = {name: getattr(nested, name) for name in nested.model_fields_set}
        filled[section] = {name: value} | nested
    return filled
