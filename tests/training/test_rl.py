"""Asynchronous rollouts in whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_run
from jax.sharding import AxisType

from r3rag_jax import components as components_module
from r3rag_jax.config import load_config
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.mesh import AXES
from r3rag_jax.training.experience import IterationSampler
from r3rag_jax.training.rl import check_devices
from r3rag_jax.training.trainer import RLTrainer

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


@pytest.mark.slow
@pytest.mark.parametrize("sampler_devices", [4, 0])
def test_rollouts_ahead_are_one_step_behind_and_resume_as_they_were(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler_devices: int
) -> None:
    """On devices of their own, or beside the updates on one; killed while some are under way, and the same bits."""
    if sampler_devices == 0:
        alone = jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 3)
        monkeypatch.setattr(components_module, "make_mesh", lambda config: alone)
    settings = {
        "mesh__sampler_devices": sampler_devices, "rl__async_rollouts": "true", "rl__iterations": 5,
        "rl__checkpoint_every": 3, "rl__eval_every": 5, "phases": "[index, rl]", "rl__entropy_coef": 0.1,
    }  # fmt: skip  # with entropy even the first update moves the policy, whatever the rewards
    base, sampled_with = finished("tags") / "policy" / "sft", []
    run_rollouts, update = IterationSampler.run, RLTrainer.update

    def observed_run(sampler, iteration, backend):
        rollouts = run_rollouts(sampler, iteration, backend)
        sampled_with.append((iteration, jax.tree.leaves(backend._policy)))
        return rollouts

    def mortal_update(trainer, targets):
        if trainer.iteration == 4:
            raise tiny_run.Killed
        return update(trainer, targets)

    with monkeypatch.context() as patch:
        patch.setattr(IterationSampler, "run", observed_run)
        tiny_run.train(tmp_path / "whole", base, **settings)
    assert [iteration for iteration, _ in sampled_with] == [0, 1, 2, 3, 4]
    policies = [params for _, params in sampled_with]
    # 1 has the policy of 0, 2 that behind the first update; 3 is sampled behind the checkpoint, by the policy of then.
    assert are_equal(policies[0], policies[1]) and not are_equal(policies[1], policies[2])
    assert are_equal(policies[3], policies[4]) and not are_equal(policies[2], policies[3])
    devices = jax.devices()[4:] if sampler_devices else jax.devices()[:1]
    assert all(leaf.sharding.device_set == set(devices) for leaf in policies[1])

    with monkeypatch.context() as patch, pytest.raises(tiny_run.Killed):
        patch.setattr(RLTrainer, "update", mortal_update)
        tiny_run.train(tmp_path / "resumed", base, **settings)
    tiny_run.train(tmp_path / "resumed", base, **settings)
    whole, resumed = tmp_path / "whole" / "run", tmp_path / "resumed" / "run"
    assert tiny_run.metrics(whole) == tiny_run.metrics(resumed)
    np.testing.assert_equal(tiny_run.weights(whole, "rl"), tiny_run.weights(resumed, "rl"))
    gaps = [row["sampler_gap"] for row in tiny_run.metrics(whole)]
    assert max(gaps[0], gaps[3]) < 1e-4 < min(gaps[1], gaps[2], gaps[4])


def are_equal(one: list[jax.Array], other: list[jax.Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_rollouts_ahead_need_devices_that_nothing_else_launches_on(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rl.async_rollouts must have one device, or mesh.sampler_devices of its own"):
        tiny_run.train(tmp_path, base, rl__async_rollouts="true", phases="[index, rl]")


def test_rollouts_ahead_are_not_judged_on_the_devices_of_updates() -> None:
    words = ["rl.algorithm=rloo", "rl.drop_zero_variance=true", "rl.async_rollouts=true", "rewards.process=judge"]
    config = load_config(None, [*words, "rl.max_resamples=2", "judge.kind=local", "judge.local.path=judge"])
    several = SimpleNamespace(mesh=SimpleNamespace(size=4), sampler_mesh=SimpleNamespace(size=4))
    with pytest.raises(UserError, match=r"rl.max_resamples must be 0 with rl.async_rollouts and a local judge.*got 2"):
        check_devices(config, several)
    check_devices(config.replace(rl=config.rl.replace(max_resamples=0)), several)
    one = SimpleNamespace(size=1)
    check_devices(config, SimpleNamespace(mesh=one, sampler_mesh=one))
