"""Training's attention on a CPU: `model.attention=blocks` compared with `xla`, forward and backward pass of a layer.

    python benchmarks/attention.py [--rows 4 --length 1024 --heads 9 --kv-heads 3 --head-dim 64]

Rows are whole, shared by three trajectories, or a prefix tree of a prompt and four branches. Both run in turn, in one
process; figures are medians, the ratio is their quotient: above 1, blocks are faster. The sizes are SmolLM2-135M's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from timing import medians

from r3rag_jax.models.attention import attention

NAMES = ("xla", "blocks")


def layouts(length: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Segment and branch ids [length] by what shares the row."""

    def repeat(ids: list[int], shares: list[float]) -> np.ndarray:
        ends = np.round(np.cumsum(shares) * length).astype(int)
        return np.repeat(ids, np.diff(ends, prepend=0))

    one = np.ones(length, int)
    return {
        "one trajectory": (one, 0 * one),
        "three trajectories": (repeat([1, 2, 3, 0], [0.34, 0.37, 0.25, 0.04]), 0 * one),
        "a tree of four branches": (one, repeat([0, 1, 2, 3, 4], [0.12, 0.22, 0.22, 0.22, 0.22])),
    }


def passes(name: str, segments: jax.Array, branches: jax.Array, inputs: Sequence[jax.Array]) -> Callable[[], object]:
    """The forward and backward pass of q, k, v and the gradient of the output; waits for its end."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        _, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, branches, implementation=name), q, k, v)
        return pull(grad)

    return lambda: jax.block_until_ready(run(*inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rows", 4),
        ("length", 1024),
        ("heads", 9),
        ("kv-heads", 3),
        ("head-dim", 64),
        ("rounds", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = [
        jax.random.normal(key, (args.rows, args.length, heads, args.head_dim))
        for key, heads in zip(keys, (args.heads, args.kv_heads, args.kv_heads, args.heads), strict=True)
    ]
    table = Table("a row is", *(f"{name}, ms" for name in NAMES), "ratio")
    for title, ids in layouts(args.length).items():
        segments, branches = (jnp.asarray(np.tile(x, (args.rows, 1)), jnp.int32) for x in ids)
        seconds = medians({name: passes(name, segments, branches, inputs) for name in NAMES}, args.rounds)
        xla, blocks = (1000 * seconds[name] for name in NAMES)
        table.add_row(title, f"{xla:.0f}", f"{blocks:.0f}", f"{xla / blocks:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
