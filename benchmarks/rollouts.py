"""Rollouts against slower ways to do them: the same policy, questions and machine, in turn, in one run.

    python benchmarks/rollouts.py steps MODEL [--dtypes float32 bfloat16]     trajectories of five steps, four ways
    python benchmarks/rollouts.py run RUN [--latencies 5 50 500]             a run's own questions, e.g. runs/quickstart
    python benchmarks/rollouts.py run RUN --model MODEL                      the same lengths, written by MODEL

`steps`: every row writes 80 tokens and is given 300, five times over, and then writes 20, whatever they are (MODEL is
a Hugging Face directory or package:NAME). The cache kept is compared with prefilling the whole history at every step,
with one question at a time, and with both, as the released code does it. In float32 the tokens must be the same.
`--singles` takes a part of the rows (of `run`: trajectories) one at a time, and as much longer as there are more.

`run`: the policy of a finished run answers test questions, sampled at temperature 1. Slots that are refilled at once
are compared with lockstep, in which a batch waits for its slowest row (and with one that leaves out, as our calls do,
rows that wait from a call's start, once a quarter, half or three quarters do), and with one question at a time; then
each search is made so many milliseconds slower, as one of a server is, and rows that wait while the others write
(`rollout.search_overlap`) are compared with everybody waiting (0) and with one question at a time. With `--model`,
another model writes as many tokens in each step as that policy did, whatever they are, searches for the same queries
and is given the same passages.

Every figure is the median of the rounds, in which all ways take their turn; a ratio is of two medians of one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
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

WRITTEN, GIVEN, STEPS, ANSWER = 80, 300, 5, 20  # tokens, tokens, how often, and tokens in the end


# ------------------------------------------------------------------------------------------ steps


class Steps:
    """Rows of random prompts that write and are given tokens in turn."""

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
        made = Engine(self.graphdef, self.config, self.mesh, slots=slots, max_length=self.max_length, dtype=self.dtype)
        self.policy = made.load(self.params)  # the same for all
        return made

    def play(self, engine: Engine, rows: Sequence[int], keep: bool) -> list[list[int]]:
        """The ids of the rows in the end; the cache is kept between steps, or not."""
        engine.reset()
        contexts = {slot: list(self.prompts[row]) for slot, row in enumerate(rows)}
        self.prefill_s = 0.0
        for step in range(STEPS + 1):
            num = WRITTEN if step < STEPS else ANSWER
            start = time.perf_counter()
            if not keep:
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
    title = f"{batch} rows, {STEPS} x ({WRITTEN} written + {GIVEN} given) + {ANSWER} written"
    table = Table("", "way", "s", "ratio", "of it prefill, s", "ratio", title=title)
    for dtype in dtypes:
        work = Steps(model_path(model), dtype, batch, prompt)
        engines = {"": work.engine(batch), f"one at a time ({singles} of the rows), ": work.engine(1)}
        written: dict[str, list[list[int]]] = {}
        prefills: dict[str, list[float]] = {}

        def play(name: str, engine: Engine, keep: bool, num_rows: int) -> None:
            written[name], taken = [], 0.0  # noqa: B023
            for start in range(0, num_rows, engine.slots):
                written[name] += work.play(engine, range(start, start + engine.slots), keep)  # noqa: B023
                taken += work.prefill_s  # noqa: B023
            prefills.setdefault(name, []).append(taken)  # noqa: B023

        ways, shares = {}, {}
        for number, engine in engines.items():
            num_rows = batch if engine.slots == batch else singles
            for how in ("cache kept", "prefilled anew"):
                name = f"{number}{how}"
                ways[name] = functools.partial(play, name, engine, how == "cache kept", num_rows)
                shares[name] = batch / num_rows
                play(name, engine, how == "cache kept", engine.slots)  # compiles
        prefills.clear()
        seconds = {name: taken * shares[name] for name, taken in medians(ways, rounds, is_compiled=True).items()}
        if dtype == "float32" and not all(ids == written["cache kept"][: len(ids)] for ids in written.values()):
            raise RuntimeError("the tokens must be the same in float32")
        prefill = {name: statistics.median(taken) * shares[name] for name, taken in prefills.items()}
        for name, taken in seconds.items():
            ratios = [f"{of[name] / of['cache kept']:.2f}" for of in (seconds, prefill)]
            table.add_row(dtype, name, f"{taken:.1f}", ratios[0], f"{prefill[name]:.1f}", ratios[1])
        table.add_section()
    console.print(table)


# -------------------------------------------------------------------------------------------- run


class LeftOut(Engine):
    """In lockstep, decoding until the last row of the batch waits; calls leave out rows that wait from their start."""

    def decode(self, decoder: CachedDecoder, max_tokens: int, leave_at: int, stops: StopTokens = NO_STOPS) -> None:
        super().decode(decoder, self.max_length, self.slots, stops)


class Lockstep(LeftOut):
    """In lockstep, with the whole batch in every step, as `generate` of transformers does it.

    Where the cache is read in place the whole batch is multiplied, and what waits is not attended to.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._windows = [window for window in self._windows if window.rows == self.slots]


@dataclasses.dataclass
class Slow:
    """A retriever that takes so much longer."""

    inner: Retriever
    seconds: float

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        time.sleep(self.seconds)
        return self.inner.search(queries, k)


class ReplayEnv:
    """Each step is as long as in a trajectory that was rolled out, asks the same and is given the same."""

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


def run(console: Console, args: argparse.Namespace) -> None:
    path, slots = args.run, args.slots
    config = load_config(path / "config.yaml", ["phases=index"])
    session = Components(config, path, console=console)
    params = session.policy.load(session.run.policy("rl" if session.run.policy("rl").exists() else "sft"))
    questions = session.dataset.questions("test")[: args.questions]
    requests = [RolloutRequest(question, i, temperature=1.0) for i in range(args.samples) for question in questions]
    graphdef, decoder_config, dtype = session.policy.graphdef, session.policy.decoder_config, session.kv_dtype
    env_factory = session.search_env

    def engine(kind: type[Engine], slots: int = slots) -> Engine:
        return kind(
            graphdef, decoder_config, session.mesh, slots=slots, max_length=config.rollout.max_length,
            truncation=Truncation.of(config.rollout), dtype=dtype,
        )  # fmt: skip

    def roll_out(
        engine: Engine,
        policy: CachedDecoder,
        requests: Sequence[RolloutRequest],
        latency_ms: float = 0.0,
        overlap: int = 0,
    ) -> list[Trajectory]:
        backend = EngineBackend(engine, policy, session.policy.tokenizer, decode_chunk=config.rollout.decode_chunk)
        retriever = Slow(session.retriever, latency_ms / 1e3) if latency_ms else session.retriever
        return rollout(backend, env_factory, retriever, requests, search_overlap=overlap)

    if args.model:
        own = engine(Engine)
        trajectories = roll_out(own, own.load(params), requests)
        by_request = {(each.question.id, each.sample_index): each for each in trajectories}

        def replay(request: RolloutRequest) -> ReplayEnv:
            return ReplayEnv(request, session.codec, by_request[request.question.id, request.sample_index])

        env_factory = EnvFactory(replay, StopRule())
        decoder = load_decoder(model_path(args.model), dtype=args.dtype)
        (graphdef, params), decoder_config = nnx.split(decoder), decoder.config
        dtype = default_kv_dtype(args.dtype, decoder_config, session.mesh)
    ours, single = engine(Engine), engine(Engine, 1)
    policy = ours.load(params)

    def in_lockstep(engine: Engine) -> None:
        for start in range(0, len(requests), slots):
            roll_out(engine, policy, requests[start : start + slots])

    singles = requests[: args.singles]
    one_at_a_time = f"one at a time ({len(singles)} of them)"
    ways: dict[str, Callable[[], Any]] = {
        "slots refilled at once": functools.partial(roll_out, ours, policy, requests),
        "lockstep": functools.partial(in_lockstep, engine(Lockstep)),
        "lockstep, rows that wait left out": functools.partial(in_lockstep, engine(LeftOut)),
        one_at_a_time: functools.partial(roll_out, single, policy, singles),
    }
    for latency in args.latencies:
        for overlap in args.turns:
            name = f"{latency:g} ms, search_overlap={overlap}"
            ways[name] = functools.partial(roll_out, ours, policy, requests, latency, overlap)
        ways[f"{latency:g} ms, {one_at_a_time}"] = functools.partial(roll_out, single, policy, singles, latency)
    seconds = medians(ways, args.rounds)
    for name in ways:
        if name.endswith(one_at_a_time):
            seconds[name] *= len(requests) / len(singles)
    ours_s = seconds["slots refilled at once"]
    title = f"{len(requests)} trajectories of {path}" + (f", {args.model} in {args.dtype}" if args.model else "")
    table = Table("way", "s", "trajectories/s", "speed, of slots refilled at once", title=f"{title}, {slots} slots")
    for name, taken in seconds.items():
        table.add_row(name, f"{taken:.2f}", f"{len(requests) / taken:.1f}", f"{ours_s / taken:.2f}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    steps_of = commands.add_parser("steps")
    steps_of.add_argument("model", metavar="MODEL")
    steps_of.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    steps_of.add_argument("--batch", type=int, default=8, help="rows")
    steps_of.add_argument("--singles", type=int, help="of them, how many are played one at a time (default: all)")
    steps_of.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    run_of = commands.add_parser("run")
    run_of.add_argument("run", metavar="RUN", type=Path)
    run_of.add_argument("--model", metavar="MODEL", help="writes in the policy's place")
    run_of.add_argument("--dtype", default="bfloat16", help="of MODEL")
    run_of.add_argument("--questions", type=int, default=200)
    run_of.add_argument("--samples", type=int, default=1, help="trajectories of each question")
    run_of.add_argument("--singles", type=int, help="how many trajectories are played one at a time (default: all)")
    run_of.add_argument("--slots", type=int, default=64)
    run_of.add_argument("--latencies", type=float, nargs="*", default=[5.0, 50.0, 500.0], help="milliseconds")
    run_of.add_argument("--turns", type=int, nargs="*", default=[0, 1, 8], help="each as rollout.search_overlap")
    for command in (steps_of, run_of):
        command.add_argument("--rounds", type=int, default=3)
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
