"""Encoding passages compared with sentence-transformers, with the same model and passages, in one process.

    python benchmarks/encoding.py MODEL CORPUS [--passages 1024] [--rounds 3] [--profile]

Needs torch and sentence-transformers. MODEL is a Hugging Face directory or package:NAME; CORPUS is a file of passages,
as `index build` reads it, from which passages are drawn. On a GPU both use it: XLA_PYTHON_CLIENT_MEM_FRACTION=.4 leaves
memory for PyTorch.

Every round runs all variants in turn; figures are medians over the rounds, and ratios are quotients of medians. Both
tokenize, sort by length and return vectors on the host. "of a matmul" is the share of the speed of a large matmul of
the same dtype in JAX that the model's operations on the passages' tokens reach; padding counts as lost time. "CPU
µs/token" is the CPU time of all threads, which other programs disturb less. `--profile` adds the operations of this
package that take the longest; those of `while` are the layers.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
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


def cpu_seconds(call: Callable[[], np.ndarray]) -> float:
    """CPU time of a call, of all threads of the process."""
    began = time.process_time()
    call()
    return time.process_time() - began


def longest_operations(call: Callable[[], np.ndarray], count: int = 16) -> list[tuple[str, float]]:
    """(name, seconds) of XLA's operations that take the longest, summed over a call."""
    seconds: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            call()
        [trace] = Path(directory).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for event in (event for line in plane.lines for event in line.events):
                if "hlo_op" in (stat for stat, _ in event.stats):
                    seconds[event.name] += event.duration_ns / 1e9
    return seconds.most_common(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--passages", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="sentence-transformers' batch_size; its default is 32")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", default=["float32", "bfloat16"])
    parser.add_argument("--profile", action="store_true", help="also print the operations that take the longest")
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
    for column in ("", "passages/s", "tokens/s", "GFLOP/s", "of a matmul", "CPU µs/token"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, taken in seconds.items():
        speed = model_flops(config, lengths) / taken
        share = speed / peak[name.split()[-1]]
        cpu_us = 1e6 * cpu_seconds(variants[name]) / lengths.sum()
        rates = f"{len(texts) / taken:.1f}", f"{lengths.sum() / taken:.0f}", f"{speed / 1e9:.0f}"
        table.add_row(name, *rates, f"{share:.0%}", f"{cpu_us:.0f}")
    console.print(table)
    ours, theirs = (min((taken, key) for key, taken in seconds.items() if key.startswith(x)) for x in (OURS, THEIRS))
    console.print(f"best of each: {ours[1]} against {theirs[1]}, ratio {theirs[0] / ours[0]:.2f}")
    for name, taken in longest_operations(variants[ours[1]]) if options.profile else ():
        console.print(f"{1e6 * taken / lengths.sum():8.1f} µs/token  {name}", highlight=False)


if __name__ == "__main__":
    main()
