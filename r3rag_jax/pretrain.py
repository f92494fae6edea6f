"""Pretrain the bundled base model: a byte-level BPE tokenizer and a small Qwen2, trained only on `base` worlds.

    python -m r3rag_jax.pretrain --out r3rag_jax/world/base

Hardware and time: see the README's table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.errors import main_guard
from r3rag_jax.world.pretraining_loop import pretrain


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m r3rag_jax.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument(
        "--start", type=Path, help="continue from the base model in this directory, with the last curriculum stage only"
    )
    parser.add_argument("--steps", type=int, default=3000, help="optimizer updates, of 4096 tokens each")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    pretrain(args.out, start=args.start, num_steps=args.steps, lr=args.lr, seed=args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
