"""Two processes train together the run that one process trains alone, and export what one exports.

Two devices each, and the parameters cut into four: every step, and every matrix that is exported, needs the other
process. In training, the one process has the same mesh of four, and begins RL from the cold start of the two (which
it was found to equal), as one rounding of a weight may choose another word. What two processes exchange goes through
sockets, for every decoded token, and both wait for it at full speed: there are no more of these than needed.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file
from two_processes import finish, free_port, spawn

from r3rag_jax.models.hf.decoder_files import load_decoder, save_decoder

SMALL = {"sft__epochs": 24, "rl__iterations": 2, "rl__eval_every": 2, "rollout__max_steps": 2, "world__num_test": 2}

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


OVERRIDES = ["mesh.fsdp=4", "eval.systems=r3rag"]  # the parameters are cut into four


ONE_PROCESS = """
import shutil
import sys
from r3rag_jax import train

recipe, theirs, own_copy, policy, *overrides = sys.argv[1:]
assert train.main(["--config", recipe, *overrides, "phases=[index,sft]"]) == 0
shutil.copytree(policy, own_copy)
shutil.copytree(theirs, policy, dirs_exist_ok=True)
assert train.main(["--config", recipe, *overrides]) == 0
"""


@pytest.mark.slow
def test_two_processes_train_the_same_run(base: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    recipe = tiny_run.write_recipe(two, base, **SMALL)
    pair = ["mesh.distributed=true", "mesh.num_processes=2", f"mesh.coordinator=127.0.0.1:{free_port()}"]
    pair.append("data.storage=array_record")  # each reads its own records; one process has them all in memory
    command = ["-m", "r3rag_jax.train", "--config", str(recipe), *OVERRIDES, *pair]
    said = finish([spawn([*command, f"mesh.process_id={rank}"], 2, two) for rank in range(2)])
    assert "Report" in said[0]
    assert "Report" not in said[1]  # one process speaks, writes and exports
    recipe, one, two = tiny_run.write_recipe(one, base, **SMALL), one / "run", two / "run"
    own_sft = one.parent / "own-sft"
    paths = [str(path) for path in (recipe, two / "policy" / "sft", own_sft, one / "policy" / "sft")]
    finish([spawn(["-c", ONE_PROCESS, *paths, *OVERRIDES], 4, one.parent)])
    assert_same_policy(own_sft, two / "policy" / "sft")
    assert_same_policy(one / "policy" / "rl", two / "policy" / "rl")
    assert tiny_run.files(two).keys() >= {name for name in tiny_run.files(one) if not name.startswith("checkpoints")}
    for want, got in zip(tiny_run.metrics(one), tiny_run.metrics(two), strict=True):
        assert want.keys() == got.keys()
        if "sampler_gap" in want:  # itself the largest rounding of the iteration
            assert max(want["sampler_gap"], got["sampler_gap"]) < 1e-4
        if "policy_loss" in want:  # whitened advantages, each about 1, that cancel
            assert got["policy_loss"] == pytest.approx(want["policy_loss"], abs=1e-4), want["step"]
        for name in want.keys() - {"phase", "sampler_gap", "policy_loss"}:
            assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), (want["phase"], want["step"], name)
    for name in ("data/sft.jsonl", "trajectories/rl.jsonl", "trajectories/r3rag.jsonl"):
        assert tiny_run.files(two)[name] == tiny_run.files(one)[name]  # the sampled words, too


def assert_same_policy(one: Path, two: Path) -> None:
    want, got = (load_file(policy / "model.safetensors") for policy in (one, two))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=f"{one} {name}")


EXPORT = """
import sys
import jax.numpy as jnp
from jax.sharding import NamedSharding
from r3rag_jax.config import MeshConfig
from r3rag_jax.models.decoder import PARAM_AXES, param_shapes
from r3rag_jax.models.hf.decoder_files import load_config, load_decoder, save_decoder
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.processes import start_distributed
from r3rag_jax.parallel.shardings import partition_spec

base, out, coordinator, rank = sys.argv[1:]
mesh_config = MeshConfig(
    data=1, fsdp=2, tensor=2, distributed=True, coordinator=coordinator, num_processes=2, process_id=int(rank)
)
start_distributed(mesh_config)
mesh = make_mesh(mesh_config)
shapes = param_shapes(load_config(base))
shardings = {name: NamedSharding(mesh, partition_spec(mesh, PARAM_AXES[name], shape)) for name, shape in shapes.items()}
decoder = load_decoder(base, dtype=jnp.float32, shardings=shardings)
assert not decoder.param("q_proj")[...].is_fully_addressable
save_decoder(decoder, out, dtype="bfloat16", max_file_bytes=40_000)
"""


def test_two_processes_export_what_one_exports(base: Path, tmp_path: Path) -> None:
    coordinator = f"127.0.0.1:{free_port()}"
    words = [["-c", EXPORT, str(base), out, coordinator, str(rank)] for rank, out in enumerate(("two", "unwritten"))]
    finish([spawn(command, 2, tmp_path) for command in words])
    save_decoder(load_decoder(base, dtype="float32"), tmp_path / "one", max_file_bytes=40_000)
    one = tiny_run.files(tmp_path / "one")
    assert len(one) > 3  # configuration, index, several files of weights
    assert tiny_run.files(tmp_path / "two") == one
    assert not (tmp_path / "unwritten").exists()
