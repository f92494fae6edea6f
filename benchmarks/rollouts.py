"""Rollouts compared with slower schedules, with the same policy and questions, in one process.

    python benchmarks/rollouts.py steps MODEL [--dtypes float32 bfloat16]     trajectories with random prompts
    python benchmarks/rollouts.py run RUN [--latencies 5 50 500]             a run's own questions, e.g. runs/quickstart
    python benchmarks/rollouts.py run RUN --model MODEL                      the same lengths, sampled from MODEL

`steps`: in each of five steps, every row samples 80 tokens and appends 300 given ones; at the end it samples 20 more.
MODEL is a Hugging Face directory or package:NAME. Keeping the KV cache between steps is compared with prefilling the
whole context at every step, with running one row at a time, and with both, as in the released R3-RAG code. In float32
all variants must sample the same tokens. `--singles N` runs only N rows (for `run`: trajectories) one at a time, and
scales the time to all of them.

`run`: the policy of a finished run answers test questions at temperature 1. Refilling a slot as soon as its trajectory
ends is compared with lockstep, in which a batch waits for its slowest row, and with one question at a time. Lockstep is
measured in two forms: computing all rows in every step, and dropping waiting rows from the computation once a quarter,
half or three quarters of the rows wait at the start of a decode call. Then a sleep of `--latencies` milliseconds makes
every search as slow as a remote server's. Overlapping searches with decoding (`rollout.search_overlap`) is compared
with no overlap (0) and with one question at a time. With `--model`, MODEL replays the policy's trajectories: it samples
as many tokens in each step, and gets the same queries and passages.

Every round runs all variants in turn; figures are medians over the rounds, and ratios are quotients of medians.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from timing import medians

from r3rag_jax.components import Components
from r3rag_jax.config import MeshConfig, load_config
from r3rag_jax.models.hf.decoder_files import load_decoder
from r3rag_jax.models.paths import model_path
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.retrieval.base import Hit, Retriever
from r3rag_jax.rollout.backends import EngineBackend
from r3rag_jax.rollout.env import Done, EnvFactory, Search, StopRule
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.sampler.cache.kv_cache import default_kv_dtype
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.distribution import Truncation
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.sampler.stops import NO_STOPS, StopTokens
from r3rag_jax.text.transcript import Codec, Transcript
from r3rag_jax.types import Completion, Context, Step, Trajectory

# Tokens that a row samples in a step, tokens that are then appended, number of steps, and tokens sampled at the end.
WRITTEN, GIVEN, STEPS, ANSWER = 80, 300, 5, 20


# ------------------------------------------------------------------------------------------ steps


class Steps:
    """Rows with random prompts, which alternate between sampling tokens and appending given ones."""

    def __init__(self, path: Path, dtype: str, batch: int, prompt: int):
        decoder = load_decoder(path, dtype=dtype)
        self.graphdef, self.params = nnx.split(decoder)
        self.config, self.batch, self.mesh = decoder.config, batch, make_mesh(MeshConfig())
        self.dtype = default_kv_dtype(dtype, self.config, self.mesh)
        rng = np.random.default_rng(0)
        self.prompts = rng.integers(0, self.config.vocab_size, (batch, prompt)).tolist()
        self.given = rng.integers(0, self.config.vocab_size, (batch, STEPS, GIVEN)).tolist()
        self.max_length = prompt + STEPS * (WRITTEN + GIVEN) + ANSWER
        self.prefill_s = 0.0

    def engine(self, slots: int) -> Engine:
        engine = Engine(
            self.graphdef, self.config, self.mesh, slots=slots, max_length=self.max_length, dtype=self.dtype
        )
        self.policy = engine.load(self.params)  # all engines share the policy
        return engine

    def run(self, engine: Engine, rows: Sequence[int], keep_cache: bool) -> list[list[int]]:
        """Return the final token ids of the rows; sets `prefill_s`. The KV cache is kept between steps, or dropped."""
        engine.reset()
        contexts = {slot: list(self.prompts[row]) for slot, row in enumerate(rows)}
        self.prefill_s = 0.0
        for step in range(STEPS + 1):
            num = WRITTEN if step < STEPS else ANSWER
            start = time.perf_counter()
            if not keep_cache:
                engine.reset()
            engine.set_context(self.policy, {slot: Context(ids, num) for slot, ids in contexts.items()})
            jax.block_until_ready(engine._cache)
            self.prefill_s += time.perf_counter() - start
            engine.decode(self.policy, num, leave_at=len(rows))
            for slot, ids in contexts.items():
                ids += engine.rows.tokens[slot, len(ids) : len(ids) + num].tolist()
                if step < STEPS:
                    ids += self.given[rows[slot]][step]
        return list(contexts.values())


def steps(
    console: Console, model: str, dtypes: Sequence[str], batch: int, singles: int, prompt: int, rounds: int
) -> None:
    title = f"{batch} rows, {STEPS} x ({WRITTEN} sampled + {GIVEN} given) + {ANSWER} sampled"
    table = Table("", "variant", "s", "ratio", "prefill, s", "ratio", title=title)
    for dtype in dtypes:
        work = Steps(model_path(model), dtype, batch, prompt)
        engines = {"": work.engine(batch), f"one at a time ({singles} of the rows), ": work.engine(1)}
        written: dict[str, list[list[int]]] = {}
        prefills: dict[str, list[float]] = {}

        def measure(name: str, engine: Engine, keep_cache: bool, num_rows: int) -> None:
            written[name], taken = [], 0.0  # noqa: B023
            for start in range(0, num_rows, engine.slots):
                written[name] += work.run(engine, range(start, start + engine.slots), keep_cache)  # noqa: B023
                taken += work.prefill_s  # noqa: B023
            prefills.setdefault(name, []).append(taken)  # noqa: B023

        variants, shares = {}, {}
        for rows, engine in engines.items():
            num_rows = batch if engine.slots == batch else singles
            for cache in ("cache kept", "whole context prefilled"):
                name = f"{rows}{cache}"
                variants[name] = functools.partial(measure, name, engine, cache == "cache kept", num_rows)
                shares[name] = batch / num_rows
                measure(name, engine, cache == "cache kept", engine.slots)  # compiles
        prefills.clear()
        seconds = {name: taken * shares[name] for name, taken in medians(variants, rounds, is_compiled=True).items()}
        if dtype == "float32" and not all(ids == written["cache kept"][: len(ids)] for ids in written.values()):
            raise RuntimeError("all variants must sample the same tokens in float32")
        prefill = {name: statistics.median(taken) * shares[name] for name, taken in prefills.items()}
        for name, taken in seconds.items():
            ratios = [f"{times[name] / times['cache kept']:.2f}" for times in (seconds, prefill)]
            table.add_row(dtype, name, f"{taken:.1f}", ratios[0], f"{prefill[name]:.1f}", ratios[1])
        table.add_section()
    console.print(table)


# -------------------------------------------------------------------------------------------- run


class DroppingLockstep(Engine):
    """Lockstep: a decode call ends when all rows wait; rows that wait at its start may be left out of it."""

    def decode(self, decoder: CachedDecoder, max_tokens: int, leave_at: int, stops: StopTokens = NO_STOPS) -> None:
        super().decode(decoder, self.max_length, self.slots, stops)


class Lockstep(DroppingLockstep):
    """Lockstep that computes all rows in every step, like `generate` of transformers.

    If the attention reads the cache in place, waiting rows take part in the matmuls, but not in attention.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.programs = copy.copy(self.programs)  # which other engines share
        self.programs.windows = [window for window in self.programs.windows if window.rows == self.slots]


@dataclasses.dataclass
class Slow:
    """A retriever whose searches take `seconds` longer."""

    inner: Retriever
    seconds: float

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        time.sleep(self.seconds)
        return self.inner.search(queries, k)


class ReplayEnv:
    """Replays a trajectory: each step samples as many tokens, and has the same query and passages."""

    def __init__(self, request: RolloutRequest, codec: Codec, trajectory: Trajectory):
        self._request, self._trajectory = request, trajectory
        self._transcript = Transcript(codec, request.question.question)

    def start(self) -> Context:
        return self._context()

    def step(self, completion: Completion) -> Search | Done:
        self._transcript.write(completion.ids, completion.behaviour_logprobs)
        if self._transcript.num_steps == len(self._trajectory.steps):
            return Done(self._trajectory)
        return Search(self._last_step.query or "", 1)

    def observe(self, hits: Sequence[Hit]) -> Context:
        self._transcript.add_passages(self._last_step.passages)
        return self._context()

    def _context(self) -> Context:
        step = self._transcript.num_steps
        num = sum(int((sample.step_ids == step).sum()) for sample in self._trajectory.samples)
        return Context(self._transcript.context, num, self._request.temperature, self._request.key(step))

    @property
    def _last_step(self) -> Step:
        return self._trajectory.steps[self._transcript.num_steps - 1]


def replays(codec: Codec, trajectories: Sequence[Trajectory]) -> EnvFactory:
    """Plays each request as it went in these trajectories."""
    by_request = {(t.question.id, t.sample_index): t for t in trajectories}

    def replay(request: RolloutRequest) -> ReplayEnv:
        return ReplayEnv(request, codec, by_request[request.question.id, request.sample_index])

    return EnvFactory(replay, StopRule())


def run(console: Console, args: argparse.Namespace) -> None:
    path, slots = args.run, args.slots
    config = load_config(path / "config.yaml", ["phases=index"])
    components = Components(config, path, console=console)
    params = components.policy.load(components.run.policy("rl" if components.run.policy("rl").exists() else "sft"))
    questions = components.dataset.questions("test")[: args.questions]
    requests = [RolloutRequest(question, i, temperature=1.0) for i in range(args.samples) for question in questions]
    graphdef, decoder_config, dtype = components.policy.graphdef, components.policy.decoder_config, components.kv_dtype
    env_factory = components.search_env

    def engine(kind: type[Engine], slots: int = slots) -> Engine:
        return kind(
            graphdef, decoder_config, components.mesh, slots=slots, max_length=config.rollout.max_length,
            truncation=Truncation.of(config.rollout), dtype=dtype,
        )  # fmt: skip

    def trajectories_of(
        engine: Engine,
        policy: CachedDecoder,
        requests: Sequence[RolloutRequest],
        wait_ms: float = 0,
        overlap: int = 0,
    ) -> list[Trajectory]:
        backend = EngineBackend(engine, policy, components.policy.tokenizer, decode_chunk=config.rollout.decode_chunk)
        retriever = Slow(components.retriever, wait_ms / 1e3) if wait_ms else components.retriever
        return rollout(backend, env_factory, retriever, requests, search_overlap=overlap)

    if args.model:
        own = engine(Engine)
        env_factory = replays(components.codec, trajectories_of(own, own.load(params), requests))
        decoder = load_decoder(model_path(args.model), dtype=args.dtype)
        (graphdef, params), decoder_config = nnx.split(decoder), decoder.config
        dtype = default_kv_dtype(args.dtype, decoder_config, components.mesh)
    ours, single = engine(Engine), engine(Engine, 1)
    policy = ours.load(params)

    def in_lockstep(engine: Engine) -> None:
        for start in range(0, len(requests), slots):
            trajectories_of(engine, policy, requests[start : start + slots])

    singles = requests[: args.singles]
    one_at_a_time = f"one at a time ({len(singles)} of them)"
    variants: dict[str, Callable[[], Any]] = {
        "slots refilled at once": functools.partial(trajectories_of, ours, policy, requests),
        "lockstep": functools.partial(in_lockstep, engine(Lockstep)),
        "lockstep, waiting rows left out": functools.partial(in_lockstep, engine(DroppingLockstep)),
        one_at_a_time: functools.partial(trajectories_of, single, policy, singles),
    }
    for latency in args.latencies:
        for overlap in args.turns:
            name = f"{latency:g} ms, search_overlap={overlap}"
            variants[name] = functools.partial(trajectories_of, ours, policy, requests, latency, overlap)
        variants[f"{latency:g} ms, {one_at_a_time}"] = functools.partial(
            trajectories_of, single, policy, singles, latency
        )
    seconds = medians(variants, args.rounds)
    seconds |= {name: s * len(requests) / len(singles) for name, s in seconds.items() if name.endswith(one_at_a_time)}
    title = f"{len(requests)} trajectories of {path}" + (f", {args.model} in {args.dtype}" if args.model else "")
    console.print(speeds_table(f"{title}, {slots} slots", seconds, len(requests)))


def speeds_table(title: str, seconds: Mapping[str, float], num_trajectories: int) -> Table:
    """Seconds and trajectories/s of each variant, and its speed relative to the first one's."""
    first, *_ = seconds
    table = Table("variant", "s", "trajectories/s", f"speed relative to {first}", title=title)
    for name, taken in seconds.items():
        rates = (f"{num_trajectories / taken:.1f}", f"{seconds[first] / taken:.2f}")
        table.add_row(name, f"{taken:.2f}", *rates)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    steps_of = commands.add_parser("steps")
    steps_of.add_argument("model", metavar="MODEL")
    steps_of.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    steps_of.add_argument("--batch", type=int, default=8, help="rows")
    steps_of.add_argument("--singles", type=int, help="number of rows to run one at a time (default: all)")
    steps_of.add_argument("--prompt", type=int, default=64, help="tokens per prompt")
    run_of = commands.add_parser("run")
    run_of.add_argument("run", metavar="RUN", type=Path)
    run_of.add_argument("--model", metavar="MODEL", help="a model that replays the policy's trajectories")
    run_of.add_argument("--dtype", default="bfloat16", help="dtype of MODEL")
    run_of.add_argument("--questions", type=int, default=200)
    run_of.add_argument("--samples", type=int, default=1, help="trajectories per question")
    run_of.add_argument("--singles", type=int, help="number of trajectories to run one at a time (default: all)")
    run_of.add_argument("--slots", type=int, default=64)
    run_of.add_argument(
        "--latencies", type=float, nargs="*", default=[5.0, 50.0, 500.0], help="milliseconds added to a search"
    )
    run_of.add_argument("--turns", type=int, nargs="*", default=[0, 1, 8], help="values of rollout.search_overlap")
    for command in (steps_of, run_of):
        command.add_argument("--rounds", type=int, default=3, help="measured rounds")
    args = parser.parse_args(argv)
    use_compile_cache()
    console = Console()
    if args.command == "steps":
        singles = min(args.singles or args.batch, args.batch)
        steps(console, args.model, args.dtypes, args.batch, singles, args.prompt, args.rounds)
    else:
        run(console, args)


if __name__ == "__main__":
    main()
