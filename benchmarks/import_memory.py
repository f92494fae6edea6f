"""Peak host memory of importing a checkpoint, beyond the size of the imported arrays.

    python benchmarks/import_memory.py [--gigabytes 2] [--devices 8]

The script writes a Llama with random bfloat16 weights to several safetensors files in a temporary directory, and
imports it on forced host devices in a new process. It reads memory from /proc, and therefore needs Linux.

On CPU devices the arrays are in host memory, so the process must grow by their size. Any growth beyond that is the host
memory that an import to accelerators would need. Only anonymous memory (RssAnon) is counted. The parent process samples
it every millisecond, so that no lock in the importing process can hide a peak. Pages of mapped files are printed
separately, because the kernel can drop them when memory is short. The size of the arrays is the sum of their shards: a
replicated array counts once per device. The baseline is taken after the devices have started.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from r3rag_jax.config import MeshConfig
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import PARAM_AXES, param_shapes
from r3rag_jax.models.hf.decoder_files import hf_tensors, load_config, load_decoder, write_model
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.shardings import partition_spec

MB = 1e6
NUM_FILES = 4


def config_of_size(gigabytes: float) -> DecoderConfig:
    """A Llama of about `gigabytes` * 10^9 bytes in bfloat16; it has layers of width 2048, at least one."""

    def build(num_layers: int) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=32_000, hidden_size=2048, num_layers=num_layers, num_heads=16, num_kv_heads=4, head_dim=128,
            ffn_size=8192, tie_embeddings=True,
        )  # fmt: skip

    one, two = (num_bytes(build(num_layers)) for num_layers in (1, 2))
    return build(1 + max(0, round((gigabytes * 1e9 - one) / (two - one))))


def num_bytes(config: DecoderConfig) -> int:
    """Bytes of the model's weights in bfloat16."""
    return sum(2 * math.prod(shape) for shape in param_shapes(config).values())


def write_checkpoint(config: DecoderConfig, path: Path) -> None:
    """Write a model with random normal weights, generated one tensor at a time."""
    tensors, rng = hf_tensors(config), np.random.default_rng(0)

    def draw(name: str) -> np.ndarray:
        return rng.standard_normal(tensors[name].shape, np.float32).astype(ml_dtypes.bfloat16)

    write_model(path, config, draw, dtype="bfloat16", max_file_bytes=num_bytes(config) // NUM_FILES)


def memory(pid: int | str = "self") -> dict[str, int]:
    """The sizes in /proc/PID/status in bytes, by name; empty if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }


def measure(path: Path) -> None:
    """Import a model on all devices; prints bytes as JSON: before the import, of all shards, of the largest shard."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=jax.device_count() // 2, tensor=2))
    shapes = param_shapes(load_config(path))
    shardings = {n: NamedSharding(mesh, partition_spec(mesh, PARAM_AXES[n], shape)) for n, shape in shapes.items()}
    jax.block_until_ready(jax.device_put([np.zeros(8)] * jax.device_count(), jax.devices()))
    before, started = memory()["RssAnon"], time.time()
    decoder = load_decoder(path, dtype="bfloat16", shardings=shardings)
    seconds = time.time() - started
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(nnx.state(decoder)) for shard in leaf.addressable_shards]
    result = {
        "before": before,
        "arrays": sum(shards),
        "slice": max(shards),
        "mapped": memory()["RssFile"],
        "s": seconds,
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint in 10^9 bytes")
    parser.add_argument("--devices", type=int, default=8, help="number of forced host devices, even")
    parser.add_argument(
        "--measure",
        type=Path,
        metavar="DIR",
        help="import DIR in this process; the script starts itself with this flag",
    )
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure)
        return
    with tempfile.TemporaryDirectory() as directory:
        config = config_of_size(args.gigabytes)
        write_checkpoint(config, Path(directory))
        print(
            f"checkpoint   {num_bytes(config) / MB:8.0f} MB in {len(list(Path(directory).glob('*.safetensors')))} files"
        )
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
        child = subprocess.Popen(
            [sys.executable, __file__, "--measure", directory], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()},
        )  # fmt: skip
        peak = 0
        while child.poll() is None:
            peak = max(peak, memory(child.pid).get("RssAnon", 0))
            time.sleep(1e-3)
        answer = child.communicate()[0]
    if child.returncode:
        sys.exit(child.returncode)  # the child has printed its error
    result = json.loads(answer)
    print(f"arrays       {result['arrays'] / MB:8.0f} MB on {args.devices} devices, read in {result['s']:.1f} s")
    print(f"largest slice{result['slice'] / MB:8.0f} MB")
    print(f"peak         {(peak - result['before']) / MB:8.0f} MB more than before the import")
    print(f"overhead     {(peak - result['before'] - result['arrays']) / MB:8.0f} MB beyond the arrays")
    print(f"(file cache  {result['mapped'] / MB:8.0f} MB mapped at the end)")


if __name__ == "__main__":
    main()
