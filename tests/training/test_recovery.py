"""Injected faults: updates that are not finite, and guards that are broken."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from rich.console import Console
from tiny_trainer import NUM_PROMPT, iterate, scores_of, trainer_of, trajectory

from r3rag_jax.components import Components
from r3rag_jax.errors import UserError
from r3rag_jax.rewards.scorer import Scores
from r3rag_jax.rl import algorithms
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.types import Trajectory

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


MARK = -123.0  # the log-probability of a token whose batch makes the loss NaN


def marked(of: Trajectory) -> Trajectory:
    [sample] = of.samples
    logprobs = np.where(np.arange(len(sample)) == NUM_PROMPT, MARK, sample.behaviour_logprobs).astype(np.float32)
    return dataclasses.replace(of, samples=(dataclasses.replace(sample, behaviour_logprobs=logprobs),))


def inject_fault(patch: pytest.MonkeyPatch) -> None:
    policy_loss = algorithms.ppo_policy_loss

    def faulty(logprobs: jax.Array, old: jax.Array, *args: Any, **keys: Any) -> Any:
        loss, stats = policy_loss(logprobs, old, *args, **keys)
        return loss * jnp.where(jnp.any(old == MARK), jnp.nan, 1.0), stats

    patch.setattr(algorithms, "ppo_policy_loss", faulty)


def faulty_components(base: Path, tmp_path: Path, **keys: Any) -> tuple[Components, list[Trajectory], Scores]:
    """Four updates of one row each; the second question's first trajectory is the faulty one."""
    short = {"rollout__max_length": 64, "rl__row_length": 64, "rl__batch_rows": 1, "rl__algorithm": "rloo",
             "rl__kl__coef": 0.0, "rl__warmup": 0.0, "mesh__tensor": 8}  # fmt: skip
    config = tiny_run.config(tmp_path, base, **short | keys)
    components = Components(config, config.run_directory, console=Console(file=io.StringIO(), width=1000))
    trajectories = [trajectory(components, q, i, 3) for q in "xy" for i in (0, 1)]  # 33 tokens each
    trajectories[2] = marked(trajectories[2])
    return components, trajectories, scores_of([[0, 0, 2], [0, 0, 0], [1, 0, 2], [0, 1, 0]])


def on_host(tree: Any) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(tree)]


def test_a_step_of_nan_is_named_kept_and_replayed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components, trajectories, scores = faulty_components(base, tmp_path)
    with monkeypatch.context() as patch:
        inject_fault(patch)
        trainer = trainer_of(components)
        with pytest.raises(
            UserError, match=r"RL iteration 0, update \d of 4 \(batch \d\): .* finite; got nan and nan; kept"
        ):
            iterate(trainer, trajectories, scores)
        before = on_host(trainer.progress.state.params)
        assert all(np.isfinite(x).all() for x in before)
        [path] = (components.run.path / "checkpoints").glob("bad_step_*.npz")
        assert (np.load(path)["batch.behaviour_logprobs"] == MARK).any()
        replayed = trainer_of(components).replay(path)
        assert math.isnan(replayed["loss"]) and math.isfinite(replayed["entropy"])
    sound = trainer_of(components)  # the fault is repaired
    replayed = sound.replay(path)
    assert math.isfinite(replayed["loss"]) and replayed["grad_norm"] > 0
    state, _ = Checkpoints(path.with_suffix("")).restore(trainer.progress.state)
    np.testing.assert_equal(on_host(state.params), before)


@pytest.mark.parametrize("nonfinite", ["skip", "rollback"])
def test_a_step_of_nan_is_skipped_or_rolled_back(
    nonfinite: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, trajectories, scores = faulty_components(
        base, tmp_path, guards__nonfinite=nonfinite, guards__rollbacks=1
    )
    inject_fault(monkeypatch)
    trainer = trainer_of(components)
    start = on_host(trainer.progress.state.params)
    metrics = iterate(trainer, trajectories, scores)
    assert metrics["bad_steps"] == 1 and trainer.iteration == 1
    moved = not all(np.array_equal(a, b) for a, b in zip(on_host(trainer.progress.state.params), start, strict=True))
    assert all(np.isfinite(x).all() for x in on_host(trainer.progress.state))
    said = components.console.file.getvalue()  # type: ignore[attr-defined]
    if nonfinite == "skip":
        assert moved and math.isfinite(metrics["policy_loss"]) and "skipped" in said
        return
    assert not moved and "back to the state before iteration 0" in said
    with pytest.raises(UserError, match=r"rolled back 1 times before \(guards.rollbacks\)"):
        iterate(trainer, trajectories, scores)


def test_rewards_that_are_all_equal_move_nothing_and_are_told(base: Path, tmp_path: Path) -> None:
    keys = {"guards__equal_groups": 0.9, "guards__action": "rollback", "guards__rollbacks": 1}
    components, trajectories, scores = faulty_components(base, tmp_path, **keys)
    equal = dataclasses.replace(scores, rewards=[np.ones(3, np.float32)] * 4)
    trainer = trainer_of(components)
    start = on_host(trainer.progress.state.params)
    seen = {"trajectory_tokens": 20.0}
    metrics = iterate(trainer, trajectories, equal) | seen
    assert metrics["equal_groups"] == metrics["learnt_from"] == 1
    assert all(np.array_equal(a, b) for a, b in zip(on_host(trainer.progress.state.params), start, strict=True))
    trainer.guards.check(metrics)
    trainer.save()
    assert trainer.checkpoints.latest is None  # what may have to be rolled back is not kept
    trainer.guard(iterate(trainer, trajectories, scores) | seen)
    trainer.save()
    good, kl = on_host(trainer.progress.state.params), trainer.progress.kl
    iterate(trainer, trajectories, scores)
    trainer.guard(metrics)  # it has collapsed
    assert trainer.guards.rollbacks == 1 and trainer.iteration == 3 and trainer.progress.kl == kl
    np.testing.assert_equal(on_host(trainer.progress.state.params), good)
    with pytest.raises(UserError, match=r"RL iteration 2: equal_groups must be at most 0.9 .*; rolled back 1 times"):
        trainer.guard(metrics)
