"""Guards of RL: which metrics of an iteration are out of bounds, and for how many iterations in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from r3rag_jax.config import GuardsConfig, RLConfig
from r3rag_jax.rl.algorithms import ALGORITHMS

ABOVE = (
    "approx_kl", "kl", "clip_fraction", "no_answer_rate", "context_full_rate", "format_error_rate",
    "repeated_query_rate", "equal_groups",
)  # fmt: skip


def is_finite(metrics: Mapping[str, Any]) -> bool:
    """Whether loss and gradient norm of an update are finite; an update with others changed nothing."""
    return bool(math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]))


class Guards:
    """Compares the metrics of each iteration with the thresholds of `guards`; its state is part of a checkpoint."""

    def __init__(self, config: GuardsConfig, rl: RLConfig):
        self._config, self._rl = config, rl
        self._first_length: float | None = None  # tokens of a trajectory in the first iteration
        self._broken: dict[str, int] = {}  # iterations in a row, by metric
        self.rollbacks = 0

    def check(self, metrics: Mapping[str, float]) -> list[str]:
        """One sentence for each threshold that has been broken for as long as `guards.patience`."""
        found = self._outside(metrics)
        self._broken = {name: self._broken.get(name, 0) + 1 for name in found}
        return [sentence for name, sentence in found.items() if self._broken[name] >= self._config.patience]

    def _outside(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Metric -> a sentence with the rule and the value, for metrics out of bounds."""
        config, found = self._config, {}

        def require(is_inside: bool, name: str, key: str, rule: str) -> None:
            if not is_inside:
                found[name] = f"{name} must be {rule} (guards.{key}); got {metrics[name]:.4g}"

        for name in ABOVE:
            limit = getattr(config, name)
            has_meaning = name != "equal_groups" or ALGORITHMS[self._rl.algorithm].is_grouped
            if limit > 0 and name in metrics and has_meaning:
                require(metrics[name] <= limit, name, name, f"at most {limit}")
        if "entropy" in metrics:
            entropy, low, high = metrics["entropy"], config.min_entropy, config.max_entropy or math.inf
            require(entropy >= low, "entropy", "min_entropy", f"at least {low}")
            require(entropy <= high or "entropy" in found, "entropy", "max_entropy", f"at most {high}")
        if config.displacement > 0 and "displacement" in metrics:
            is_inside = metrics["displacement"] >= -config.displacement
            require(is_inside, "displacement", "displacement", f"at least {-config.displacement}")
        if self._first_length is None:
            self._first_length = max(metrics["trajectory_tokens"], 1.0)
        if config.length_drift > 0:
            low, high = self._first_length / config.length_drift, self._first_length * config.length_drift
            is_inside = low <= metrics["trajectory_tokens"] <= high
            require(is_inside, "trajectory_tokens", "length_drift", f"in [{low:.4g}, {high:.4g}]")
        return found

    @property
    def is_clean(self) -> bool:
        """Whether the last iteration broke no threshold, not even one that `guards.patience` still tolerates."""
        return not self._broken

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"first_length": self._first_length, "broken": self._broken, "rollbacks": self.rollbacks}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `get_state` returned."""
        self._first_length, self._broken = state["first_length"], dict(state["broken"])
        self.rollbacks = state["rollbacks"]
