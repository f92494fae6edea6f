"""The trainer: every algorithm updates the policy and resumes."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest
import tiny_run
from tiny_trainer import iterate, scores_of, trainer_of, trajectory

from r3rag_jax.components import Components

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


OPTIONS = {
    "ppo": {"rl.kl.target": 1e-3, "rl.max_importance_weight": 2.0, "rollout.protocol": "steps"},
    "grpo": {
        "rl.normalize_std": "true", "rl.returns": "total", "rl.loss_aggregation": "sequence", "rl.clip_high": 0.28,
        "rl.kl.coef": 0.1, "rl.kl.placement": "loss", "rl.kl.estimator": "k3", "rl.whiten_advantages": "false",
    },
    "rloo": {
        "rl.loss_aggregation": "constant", "rl.kl.coef": 0.0, "rollout.protocol": "steps", "rl.step_discount": 0.5
    },
    "reinforce++": {"rl.whiten_rewards": "true", "rl.kl.estimator": "k2"},
}  # fmt: skip


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(name, marks=pytest.mark.slow if name in ("rloo", "reinforce++") else ()) for name in OPTIONS],
)
def test_every_algorithm_updates_the_policy_and_resumes(algorithm: str, base: Path, tmp_path: Path) -> None:
    settings = {"rl.algorithm": algorithm, "rl.questions": 3, "rl.batch_rows": 8, "rl.row_length": 320}
    keys = {name.replace(".", "__"): value for name, value in (settings | OPTIONS[algorithm]).items()}
    config = tiny_run.config(tmp_path, base, keys.pop("rollout__protocol", "tags"), **keys)
    components = Components(config, config.run_directory)
    names = zip("xxyyzz", (0, 1) * 3, (3, 1, 2, 2, 1, 2), strict=True)
    trajectories = [trajectory(components, q, i, n) for q, i, n in names]
    scores = scores_of([[0.5, 0.5, 2], [-1], [0.8, 2], [0.8, 2], [0], [1, -0.5]])
    one = trainer_of(components)
    metrics = iterate(one, trajectories, scores)
    assert all(math.isfinite(value) for value in metrics.values())
    is_grouped = algorithm in ("grpo", "rloo")
    assert metrics["equal_groups"] == pytest.approx(1 / 3)  # y
    assert metrics["learnt_from"] == pytest.approx(2 / 3 if is_grouped else 1)
    assert ("explained_variance" in metrics) == ("value_loss" in metrics) == (algorithm == "ppo")
    assert ("kl" in metrics) == (algorithm != "rloo")
    assert ("kl_loss" in metrics) == (algorithm == "grpo")
    assert ("weight" in metrics) == (algorithm == "ppo")
    assert metrics["grad_norm"] > 0
    one.save()
    one.checkpoints.wait()
    other = trainer_of(components)  # from the checkpoint
    assert other.iteration == 1 and other.progress.kl == one.progress.kl
    if algorithm == "ppo":
        change = min(max((metrics["kl"] - 1e-3) / 1e-3, -0.2), 0.2)
        assert one.progress.kl == pytest.approx(config.rl.kl.coef * (1 + 0.1 * change), rel=1e-6)
        assert one.progress.kl != config.rl.kl.coef
    again, resumed = (iterate(trainer, trajectories, scores) for trainer in (one, other))
    assert again == resumed and again["policy_loss"] != metrics["policy_loss"]
