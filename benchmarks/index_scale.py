"""Builds, kills, resumes, opens and searches an index of millions of generated passages.

    python benchmarks/index_scale.py --passages 2000000 --dim 768 --kind ivfpq --work DIR [--memory 8]

Vectors have planted neighbours: passages come in groups of 16 around a point of a space of 32 dimensions with 512
clusters, which is mapped to D dimensions, with noise in all of them, and a query is near the point of one group.
Passages have about 100 words. Prints one JSON object: time and memory of each stage of the build, what was kept when
it was killed, the time to open the index with nothing of it in memory, milliseconds per query and recall@10 against
exact search. The index and the corpus are left in DIR.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.config.retrieval import EncoderConfig, FaissConfig, RetrievalConfig
from r3rag_jax.data.questions import iterate_passages
from r3rag_jax.retrieval.encoders.factory import ENCODERS
from r3rag_jax.retrieval.factory import build_index, open_local_retriever
from r3rag_jax.retrieval.faiss import ExactIndex
from r3rag_jax.retrieval.vectors import VectorShards
from r3rag_jax.types import Passage

GROUP, LATENT, CLUSTERS, BLOCK = 16, 32, 512, 4096
NUM_QUERIES, K = 200, 10


class PlantedEncoder:
    """Vectors by the number at the end of a text's first line: `passage 12`, `query 3`."""

    cosine_kind = "passage"

    def __init__(self, num_passages: int, dim: int) -> None:
        self.dim, self.fingerprint = dim, f"planted {num_passages} {dim}"
        rng = np.random.default_rng(0)
        self._num_groups = max(1, num_passages // GROUP)
        self._map = rng.normal(size=(LATENT, dim)).astype(np.float32) / np.float32(np.sqrt(LATENT))
        centres = rng.normal(size=(CLUSTERS, LATENT))
        latents = centres[rng.integers(0, CLUSTERS, self._num_groups)]
        self._queries = functools.cache(lambda block: self._block(block, "query"))  # searches are timed, not drawing
        self._latents = (latents + 0.7 * rng.normal(size=latents.shape)).astype(np.float32)

    def encode(self, texts: Sequence[str], *, kind: str = "query") -> np.ndarray:
        numbers = np.array([int(text.partition("\n")[0].strip('"').rpartition(" ")[2]) for text in texts])
        out_ND = np.empty((len(texts), self.dim), np.float32)
        for block in np.unique(numbers // BLOCK):
            rows = np.flatnonzero(numbers // BLOCK == block)
            vectors_ND = self._queries(int(block)) if kind == "query" else self._block(int(block), kind)
            out_ND[rows] = vectors_ND[numbers[rows] - block * BLOCK]
        return out_ND

    def _block(self, block: int, kind: str) -> np.ndarray:
        rng = np.random.default_rng([7, block, kind == "query"])
        numbers = np.arange(block * BLOCK, (block + 1) * BLOCK)
        # Strides: neither the members of a group nor the queries are beside each other.
        groups = numbers * (1 if kind == "passage" else 7919) % self._num_groups
        near, noise = (0.35, 0.5) if kind == "passage" else (0.2, 0.3)
        latents = self._latents[groups] + near * rng.standard_normal((BLOCK, LATENT), np.float32)
        vectors = latents @ self._map + noise * rng.standard_normal((BLOCK, self.dim), np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def save(self, directory: Path) -> None:
        """Nothing to remember."""


def passages(count: int) -> Iterator[Passage]:
    """Texts of about 100 words, of Zipf's distribution over 50,000 words."""
    rng = np.random.default_rng(1)
    for start in range(0, count, 10_000):
        words = np.minimum(rng.zipf(1.3, size=(10_000, 100)), 50_000)
        for number, row in enumerate(words[: count - start].tolist(), start):
            yield Passage(str(number), f'"passage {number}"\n' + " ".join(f"w{word}" for word in row))


def config_of(args: argparse.Namespace) -> RetrievalConfig:
    return RetrievalConfig(encoder=EncoderConfig(kind="hash"), faiss=FaissConfig(kind=args.kind), memory_gb=args.memory)


# ------------------------------------------------------------------------------------------ workers


def write_corpus(args: argparse.Namespace) -> None:
    with (args.work / "corpus.jsonl").open("w") as file:
        for passage in passages(args.passages):
            file.write(json.dumps({"id": passage.id, "contents": passage.contents}) + "\n")


def build(args: argparse.Namespace) -> None:
    """Build, or continue, the index; every stage's first and last report goes to events.jsonl."""
    with (args.work / "events.jsonl").open("a") as events:

        def event(name: str, **values: Any) -> None:
            events.write(json.dumps({"event": name, "time": time.time(), **values}) + "\n")
            events.flush()

        done: dict[str, int] = {}

        def on_progress(count: int, total: int, stage: str = "vectors") -> None:
            if stage not in done:
                event(f"{stage} begins")
            done[stage] = done.get(stage, 0) + count
            if done[stage] == total:
                event(f"{stage} ends")

        event("store begins")
        build_index(config_of(args), iterate_passages(args.work / "corpus.jsonl"), args.work / "index", on_progress)
        event("built")


def measure(args: argparse.Namespace) -> None:
    """Open the index with nothing of it in memory, then search."""
    index = args.work / "index"
    for path in index.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    retriever = open_local_retriever(config_of(args), index)
    result: dict[str, Any] = {"open_s": time.perf_counter() - began}
    queries = [f"query {number}" for number in range(NUM_QUERIES)]
    vectors_QD = ENCODERS["hash"](None, None).encode(queries)  # type: ignore[arg-type]
    cold = time.perf_counter()
    retriever.search(queries[:1], K)
    result["first_query_ms"] = 1e3 * (time.perf_counter() - cold)
    for _ in range(2):  # the first round reads the index from disk
        times, cpu = [], time.process_time()
        for query in queries:
            start = time.perf_counter()
            retriever.search([query], K)
            times.append(1e3 * (time.perf_counter() - start))
        result["cpu_ms_per_query"] = 1e3 * (time.process_time() - cpu) / NUM_QUERIES
        result.setdefault("cold_ms", {name: float(np.percentile(times, p)) for name, p in (("p50", 50), ("p95", 95))})
    result["warm_ms"] = {name: float(np.percentile(times, p)) for name, p in (("p50", 50), ("p95", 95))}
    start = time.perf_counter()
    found = retriever.search(queries, K)
    result["batch_ms_per_query"] = 1e3 * (time.perf_counter() - start) / NUM_QUERIES
    vectors = VectorShards.open(index)
    start = time.perf_counter()
    _, exact_QK = ExactIndex(vectors).search(vectors_QD, K)
    result["exact_batch_ms_per_query"] = 1e3 * (time.perf_counter() - start) / NUM_QUERIES
    ids = [{int(hit.passage.id) for hit in hits} for hits in found]
    result["recall_at_10"] = float(np.mean([len(a & set(b)) / K for a, b in zip(ids, exact_QK.tolist(), strict=True)]))
    groups = max(1, args.passages // GROUP)
    planted = [number * 7919 % groups for number in range(NUM_QUERIES)]
    result["hits_in_planted_group"] = float(
        np.mean([np.mean([id % groups == group for id in found]) for found, group in zip(ids, planted, strict=True)])
    )
    print(json.dumps(result))


# ------------------------------------------------------------------------------------------ parent


def run(args: argparse.Namespace, action: str, until: Any = None) -> dict[str, Any]:
    """Run an action in its own process, killed when `until()`; seconds, peak memory in GiB, and what it printed."""
    words = [sys.executable, __file__, "--passages", str(args.passages), "--dim", str(args.dim), "--kind", args.kind]
    words += ["--memory", str(args.memory), "--work", str(args.work), "--action", action]
    began, peaks, killed = time.time(), {"RssAnon": 0, "VmRSS": 0}, False
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        time.sleep(0.2)
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if (name := line.partition(":")[0]) in peaks:
                peaks[name] = max(peaks[name], int(line.split()[1]))
        if until is not None and not killed and until():
            process.send_signal(signal.SIGKILL)
            killed = True
    if process.returncode and not killed:
        raise SystemExit(f"{action} ended with status {process.returncode}")
    out = process.stdout.read() if process.stdout is not None else ""
    memory = {"anonymous_gib": peaks["RssAnon"] / 2**20, "with_mapped_files_gib": peaks["VmRSS"] / 2**20}
    return {"s": time.time() - began, "killed": killed, **memory, **(json.loads(out) if out.strip() else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--kind", choices=("flat", "hnsw", "ivfpq"), default="ivfpq")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB")
    parser.add_argument("--work", type=Path, required=True, help="a directory for corpus and index")
    parser.add_argument("--action", choices=("corpus", "build", "measure"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    ENCODERS["hash"] = lambda config, store: PlantedEncoder(args.passages, args.dim)  # type: ignore[assignment,return-value]
    if args.action:
        {"corpus": write_corpus, "build": build, "measure": measure}[args.action](args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "events.jsonl").unlink(missing_ok=True)
    partial = args.work / ".index.partial"
    report: dict[str, Any] = {"passages": args.passages, "dim": args.dim, "kind": args.kind, "cpus": os.cpu_count()}
    if not (args.work / "corpus.jsonl").exists():
        report["corpus"] = run(args, "corpus")
    half = -(-args.passages // BLOCK) // -(-args.passages // (256 * BLOCK)) // 2  # shards
    report["killed"] = run(args, "build", lambda: len(list(partial.glob("vectors-*.npy"))) >= max(1, half))
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("vectors-*.npy")}
    report["resumed"] = run(args, "build")
    index = args.work / "index"
    report["shards_kept"] = f"{sum((index / n).stat().st_mtime_ns == t for n, t in kept.items())} of {len(kept)}"
    report["gib"] = {
        name: sum(path.stat().st_size for path in index.glob(pattern)) / 2**30
        for name, pattern in (("passages", "passage*"), ("vectors", "vectors-*"), ("index", "index-*"))
    }
    events = [json.loads(line) for line in (args.work / "events.jsonl").read_text().splitlines()]
    report["stages_s"] = [[event["event"], round(event["time"] - events[0]["time"], 1)] for event in events]
    report["measured"] = run(args, "measure")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
