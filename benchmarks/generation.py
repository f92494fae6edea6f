"""Generation compared with transformers or Tunix, with the same weights and prompts, in one process.

    python benchmarks/generation.py MODEL [--batches 1 8 32] [--rounds 3]     (needs torch)
    python benchmarks/generation.py MODEL --peer tunix                        (needs google-tunix; Llama and SmolLM2)

On a GPU both engines use it: XLA_PYTHON_CLIENT_MEM_FRACTION=.4 leaves memory for PyTorch.

MODEL is a Hugging Face directory or package:NAME. Decoding is greedy; prompts are random tokens. Every round runs all
engines in turn; figures are medians over the rounds, and ratios are quotients of medians. "decode" is the time after
the first token: the time of the whole generation minus the time of generating a single token.

"limit" is a lower bound for the time of a decode step: the longer of reading the weights and the KV cache once at the
memory's bandwidth, and of the step's operations at the speed of a large matmul. The script measures both speeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from timing import matmul_flops, read_bandwidth, torch_device

from r3rag_jax.config import MeshConfig
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import param_shapes
from r3rag_jax.models.hf.decoder_files import load_config, load_decoder
from r3rag_jax.models.paths import model_path
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.sampler.cache.kv_cache import default_kv_dtype
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.types import Context

Generate = Callable[[np.ndarray, int], None]  # (prompts [B, L], new tokens)


def this_package(path: Path, mesh: Mesh, dtype: str, batch: int, length: int) -> Generate:
    """This package's engine with `batch` slots of `length` tokens."""
    decoder = load_decoder(path, dtype=dtype)
    (graphdef, params), kv_dtype = nnx.split(decoder), default_kv_dtype(dtype, decoder.config, mesh)
    engine = Engine(graphdef, decoder.config, mesh, slots=batch, max_length=length, decode_chunk=length, dtype=kv_dtype)
    policy = engine.load(params)

    def generate(prompts: np.ndarray, new_tokens: int) -> None:
        engine.reset()
        engine.set_context(policy, {row: Context(ids.tolist(), new_tokens) for row, ids in enumerate(prompts)})
        engine.decode(policy, new_tokens, leave_at=batch)
        if engine.rows.lengths.tolist() != [prompts.shape[1] + new_tokens] * batch:
            raise RuntimeError(f"every row must have {new_tokens} new tokens; got {engine.rows.lengths}")

    return generate


def transformers(path: Path, dtype: str) -> Generate:
    """`generate` of transformers, on the same kind of device."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval().to(torch_device())

    def generate(prompts: np.ndarray, new_tokens: int) -> None:
        ids = torch.from_numpy(prompts).to(torch_device())
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
        if out.cpu().shape[1] != prompts.shape[1] + new_tokens:  # .cpu() waits for the device
            raise RuntimeError(f"every row must have {new_tokens} new tokens; got {out.shape}")

    return generate


class _Ids:
    """A tokenizer for Tunix, whose sampler takes text: a text is its token ids in decimal; no id is a stop token."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def pad_id(self) -> int:
        return 0

    bos_id = pad_id  # with id 0, Tunix puts no BOS token before the prompt

    def eos_id(self) -> int:
        return -1


def tunix(path: Path, dtype: str) -> Generate:
    """Tunix's sampler. Its Llama fixes the RoPE base, so its tokens may differ from ours, but the work is the same."""
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3.model import ModelConfig
    from tunix.models.llama3.params import create_model_from_safe_tensors

    own = load_config(path)
    config = ModelConfig(
        num_layers=own.num_layers, vocab_size=own.vocab_size, embed_dim=own.hidden_size, hidden_dim=own.ffn_size,
        num_heads=own.num_heads, head_dim=own.head_dim, num_kv_heads=own.num_kv_heads, rope_theta=int(own.rope_theta),
        norm_eps=own.norm_eps, weight_tying=own.tie_embeddings,
    )  # fmt: skip
    model = create_model_from_safe_tensors(str(path), config, dtype=jnp.dtype(dtype))
    samplers: dict[int, Sampler] = {}  # by the number of tokens in the cache

    def generate(prompts: np.ndarray, new_tokens: int) -> None:
        batch, length = prompts.shape
        size = length + new_tokens
        if size not in samplers:
            samplers[size] = Sampler(model, _Ids(), CacheConfig(size, own.num_layers, own.num_kv_heads, own.head_dim))
        texts = [" ".join(map(str, ids)) for ids in prompts]
        out = samplers[size](texts, new_tokens, max_prompt_length=length)
        if [len(ids) for ids in out.tokens] != [new_tokens] * batch:
            raise RuntimeError(f"every row must have {new_tokens} new tokens; got {[len(ids) for ids in out.tokens]}")

    return generate


PEERS: dict[str, Callable[[Path, str], Generate]] = {"transformers": transformers, "tunix": tunix}


def seconds(call: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def step_limit(config: DecoderConfig, dtype: str, batch: int, length: float, bandwidth: float, flops: float) -> float:
    """Lower bound for the seconds of a decode step of `batch` rows with `length` cached tokens each.

    Args:
        bandwidth: bytes per second.
        flops: FLOP/s.
    """
    shapes = param_shapes(config)
    weights = sum(int(np.prod(shape)) for name, shape in shapes.items() if name != "embed" or config.tie_embeddings)
    cached = 2 * batch * length * config.num_layers * config.num_kv_heads * config.head_dim
    attended = 4 * batch * length * config.num_layers * config.num_heads * config.head_dim
    size = jnp.dtype(dtype).itemsize
    return max(size * (weights + cached) / bandwidth, (2 * batch * weights + attended) / flops)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--peer", choices=PEERS, default="transformers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=256, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=128, help="generated tokens per row")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes of both engines")
    args = parser.parse_args(argv)
    use_compile_cache()
    path, mesh = model_path(args.model), make_mesh(MeshConfig())
    config, rng = load_config(path), np.random.default_rng(0)
    peers = {dtype: PEERS[args.peer](path, dtype) for dtype in args.dtypes}
    bandwidth, flops = read_bandwidth(), {dtype: matmul_flops(dtype) for dtype in args.dtypes}
    table = Table("batch", "engine", "tokens/s", "decode: ms per step", "limit: ms", "share of the limit")
    for batch in args.batches:
        engines = {(args.peer, dtype): peer for dtype, peer in peers.items()}
        engines |= {
            ("r3rag_jax", dtype): this_package(path, mesh, dtype, batch, args.prompt + args.new + 1)
            for dtype in args.dtypes
        }
        prompts = rng.integers(1, config.vocab_size, (batch, args.prompt))
        for generate in engines.values():  # compiles
            generate(prompts, args.new)
            generate(prompts, 1)
        whole: dict[tuple[str, str], list[float]] = {name: [] for name in engines}
        first: dict[tuple[str, str], list[float]] = {name: [] for name in engines}
        for _ in range(args.rounds):
            for name, generate in engines.items():
                whole[name].append(seconds(generate, prompts, args.new))
                first[name].append(seconds(generate, prompts, 1))
        total = {name: statistics.median(times) for name, times in whole.items()}
        step = {name: (total[name] - statistics.median(first[name])) / (args.new - 1) for name in engines}
        for (engine, dtype), time_s in total.items():
            limit = step_limit(config, dtype, batch, args.prompt + args.new / 2, bandwidth, flops[dtype])
            table.add_row(
                str(batch), f"{engine} {dtype}", f"{batch * args.new / time_s:.1f}", f"{1e3 * step[engine, dtype]:.1f}",
                f"{1e3 * limit:.1f}", f"{100 * limit / step[engine, dtype]:.0f} %",
            )  # fmt: skip

        def ratio_of_best(taken: dict[tuple[str, str], float]) -> str:
            best = {engine: min(t for (e, _), t in taken.items() if e == engine) for engine in ("r3rag_jax", args.peer)}
            return f"{best[args.peer] / best['r3rag_jax']:.2f}"

        table.add_section()
        ratio = ratio_of_best(total), ratio_of_best(step)
        table.add_row(str(batch), "best of each, ratio", *ratio, end_section=True)
    console = Console()
    console.print(table)
    speeds = ", ".join(f"{dtype} {value / 1e9:.0f}" for dtype, value in flops.items())
    console.print(f"memory {bandwidth / 1e9:.1f} GB/s; matmul GFLOP/s: {speeds}; medians of {args.rounds}")


if __name__ == "__main__":
    main()
