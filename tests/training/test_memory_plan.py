"""Memory plans: what is counted is what is held."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
import tiny_run
from tiny_trainer import trainer_of

from r3rag_jax.components import Components
from r3rag_jax.config import Config, MeshConfig, RLConfig, RolloutConfig, SFTConfig
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.sampler import memory
from r3rag_jax.training.memory_plan import check_rows, nearest_rows

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


@pytest.mark.parametrize("rank", [0, 2])
def test_planned_memory_is_what_the_trainer_holds(base: Path, tmp_path: Path, rank: int) -> None:
    config = tiny_run.config(tmp_path, base, lora__rank=rank, rl__critic__kind="separate", mesh__fsdp=2)
    components = Components(config, config.run_directory)
    [planned] = components.memory_plans["rl"]
    rl = trainer_of(components)

    def held(tree: object) -> int:
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])

    assert planned.array_bytes["reference"] == held(rl._ref_params)
    assert planned.array_bytes["parameters"] == held(rl.progress.state.params["policy"])
    assert planned.array_bytes["critic"] == held(rl.progress.state.params["critic"])
    assert planned.array_bytes["optimizer"] == held(rl.progress.state.opt_state)
    assert planned.array_bytes.get("merged", 0) == (held(rl.policy_params) if rank else 0)
    assert planned.array_bytes["sampler weights"] == held(components.engine_backends(lambda: rl.policy_params)._policy)


def test_more_slots_than_memory_are_refused_before_anything_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 8 * 2**30)
    with pytest.raises(UserError, match=r"rollout.slots must be at most \d+ for 1.00 GiB of memory; got 1000000"):
        tiny_run.train(tmp_path, base, rollout__slots=1000000)
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_divide_by_the_devices_are_refused() -> None:
    """Eight devices, four of data and fsdp; the message has the nearest rows that do divide."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    config = Config().replace(sft=SFTConfig(batch_rows=6), rl=RLConfig(batch_rows=8), rollout=RolloutConfig(slots=13))
    check_rows(config, ["index"], mesh, mesh)
    with pytest.raises(UserError, match=r"sft.batch_rows must divide by the 4 devices .* got sft.batch_rows=6; .*=8 "):
        check_rows(config, ["index", "sft"], mesh, mesh)
    for phase in ("rl", "eval"):
        with pytest.raises(UserError, match=r"rollout.slots must .* got rollout.slots=13; nearest: rollout.slots=12 "):
            check_rows(config, [phase], mesh, mesh)
    with pytest.raises(UserError, match=r"sft.batch_rows and rollout.slots must"):
        check_rows(config, ["sft", "rl"], mesh, mesh)
    of_one = make_mesh(MeshConfig(tensor=8))
    check_rows(config, ["sft", "rl", "eval"], of_one, of_one)


@pytest.mark.parametrize(("rows", "ways", "nearest"), [(16, 64, 64), (6, 4, 8), (5, 4, 4), (128, 64, 128), (1, 8, 8)])
def test_nearest_rows(rows: int, ways: int, nearest: int) -> None:
    assert nearest_rows(rows, ways) == nearest
