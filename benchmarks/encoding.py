"""Encoding passages compared with sentence-transformers, with the same model and passages, in one process.

    python benchmarks/encoding.py MODEL CORPUS [--passages 1024] [--rounds 3]     (needs torch, sentence-transformers)

MODEL is a Hugging Face directory or package:NAME; CORPUS is a file of passages, as `index build` reads it, from which
passages are drawn. On a GPU both use it: XLA_PYTHON_CLIENT_MEM_FRACTION=.4 leaves memory for PyTorch.

Every round runs all variants in turn; figures are medians over the rounds, and ratios are quotients of medians. Both
tokenize, sort by length and return vectors on the host. "of a matmul" is the share of the speed of a large matmul of
the same dtype in JAX that the model's operations on the passages' tokens reach; padding counts as lost time.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from timing import matmul_flops, medians, torch_device

from r3rag_jax.config import EncoderConfig, RetrievalConfig
from r3rag_jax.data.questions import iterate_passages
from r3rag_jax.data.records import STOP
from r3rag_jax.models.encoder import BertConfig, load_config
from r3rag_jax.models.paths import model_path
from r3rag_jax.retrieval.encoders.factory import open_encoder
from r3rag_jax.retrieval.encoders.sentence_transformers import read_max_length, read_tokenizer
from r3rag_jax.run.caches import use_compile_cache

OURS, THEIRS = "this package", "sentence-transformers"
MIN_COSINE = {"float32": 0.99999, "bfloat16": 0.99}  # of both packages' vectors of a passage


def this_package(path: Path, dtype: str, texts: list[str]) -> Callable[[], np.ndarray]:
    """This package's encoder as a run makes it."""
    encoder = open_encoder(RetrievalConfig(encoder=EncoderConfig(kind="bert", path=str(path), dtype=dtype)), "")
    return lambda: encoder.encode(texts, kind="passage")


def sentence_transformers(path: Path, dtype: str, texts: list[str], batch: int) -> Callable[[], np.ndarray]:
    """`SentenceTransformer.encode`, on the same kind of device."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = SentenceTransformer(str(path), device=torch_device(), model_kwargs={"dtype": getattr(torch, dtype)})
    encode = functools.partial(model.encode, texts, batch_size=batch, show_progress_bar=False)
    return lambda: np.asarray(encode(normalize_embeddings=True), np.float32)


def model_flops(config: BertConfig, lengths: np.ndarray) -> float:
    """Operations of the matmuls and the attention for texts of these lengths, without padding."""
    D, F = config.hidden_size, config.ffn_size
    per_token = 2 * (4 * D * D + 2 * D * F)
    return float(config.num_layers * (per_token * lengths.sum() + 4 * D * np.square(lengths).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--passages", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="sentence-transformers' batch_size; its default is 32")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", default=["float32", "bfloat16"])
    options = parser.parse_args()
    use_compile_cache()
    path = model_path(options.model)
    corpus = [passage.contents for passage in iterate_passages(options.corpus, STOP)]
    chosen = np.random.default_rng(0).choice(len(corpus), min(options.passages, len(corpus)), replace=False)
    texts = [corpus[i] for i in chosen]
    config = load_config(path)
    tokenizer = read_tokenizer(path, config.vocab_size)
    tokenizer.enable_truncation(read_max_length(path, 0, config.max_positions))
    lengths = np.array([len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts)])

    variants: dict[str, Callable[[], np.ndarray]] = {}
    for dtype in options.dtypes:
        variants[f"{OURS} {dtype}"] = this_package(path, dtype, texts)
        variants[f"{THEIRS} {dtype}"] = sentence_transformers(path, dtype, texts, options.batch)
    for dtype in options.dtypes:
        ours, theirs = (variants[f"{name} {dtype}"]() for name in (OURS, THEIRS))
        worst = float(np.einsum("nd,nd->n", ours, theirs).min())
        if worst < MIN_COSINE[dtype]:
            raise RuntimeError(f"vectors in {dtype} must have cosines of {MIN_COSINE[dtype]} at least; got {worst}")
    seconds = medians(variants, options.rounds, is_compiled=True)

    console = Console()
    peak = {dtype: matmul_flops(dtype) for dtype in options.dtypes}
    table = Table(title=f"{len(texts)} passages of {lengths.mean():.0f} tokens ({lengths.min()} to {lengths.max()})")
    for column in ("", "passages/s", "tokens/s", "GFLOP/s", "of a matmul"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, taken in seconds.items():
        speed = model_flops(config, lengths) / taken
        share = speed / peak[name.split()[-1]]
        table.add_row(
            name, f"{len(texts) / taken:.1f}", f"{lengths.sum() / taken:.0f}", f"{speed / 1e9:.0f}", f"{share:.0%}"
        )
    console.print(table)
    ours, theirs = (min((taken, key) for key, taken in seconds.items() if key.startswith(x)) for x in (OURS, THEIRS))
    console.print(f"best of each: {ours[1]} against {theirs[1]}, ratio {theirs[0] / ours[0]:.2f}")


if __name__ == "__main__":
    main()
