"""Continuous rollouts against a retrieval server that fails at random: does anything grow, is anything lost or wrong?

    nice -n 15 python benchmarks/soak.py [--minutes 60] [--load 0.1] [--seed 0] [--faults 0.3]

A tiny policy with random weights samples with the engine of the package; its protocol is `tags` or `steps`, in turn.
Such a policy writes no queries: an Env around the real one lets it sample, and then writes a step with a query, or
after a few of them an answer, whose words depend on the sampled tokens. The searches go over HTTP to
`faulty_server.py`, in a process of its own, with `rollout.search_overlap`. A rollout that ends with a RetrievalError is
begun again for the questions that have no trajectory yet.

A line a minute (`--report-s`): what the server did, failed rollouts, trajectories, and of this process resident memory,
threads, file handles and programs that XLA has compiled. The exit status is 1 unless every question has one trajectory,
whose passages are those that its queries find without a server, and nothing has grown from the first tenth of the time
to the end: no program, no thread, no handle, and at most `--growth-mb` of memory. `--load` is the share of a core that
this process may take: it sleeps after each round.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ["no_proxy"] = "127.0.0.1"

import httpx
import numpy as np
from faulty_server import WORDS
from faulty_server import search as search_passages
from flax import nnx

from r3rag_jax.clients.transport import KEEPALIVE_S
from r3rag_jax.config import MeshConfig, ModelConfig, RolloutConfig
from r3rag_jax.config.retrieval import RemoteRetrieverConfig
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.models.policy import model_directory
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.retrieval.base import Hit, RetrievalError, Retriever
from r3rag_jax.retrieval.http import HttpRetriever
from r3rag_jax.retrieval.selection import select_passages
from r3rag_jax.rollout.backends import EngineBackend
from r3rag_jax.rollout.env import Env, EnvFactory, Transition
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.rollout.search_env import search_env_factory
from r3rag_jax.run.progress import num_compiled
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Completion, Passage, Question, Status, Step, Trajectory

SLOTS, QUESTIONS = 4, 8  # rows of the engine; questions of a round
TOP_K, MAX_PASSAGES, SAMPLED = 2, 8, 12  # passages of a step and of a trajectory; tokens that a step samples
TIMEOUT_S, HANG_S = 1.0, 2.0  # a request; a reply that hangs
PROTOCOLS = ("tags", "steps")


class LocalRetriever:
    """What the server finds, as a function call."""

    fingerprint = "local"

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`."""
        return [[Hit(Passage(**row), 1.0) for row in rows] for rows in search_passages(queries, k)]


class WritingEnv:
    """An Env whose steps have words of their own, chosen by what the policy has sampled."""

    def __init__(self, env: Env, codec: Codec):
        self._env, self._codec, self._number = env, codec, 0

    def start(self) -> Transition:
        """See `Env.start`."""
        return self._env.start()

    def step(self, completion: Completion) -> Transition:
        """See `Env.step`; the completion is replaced."""
        self._number += 1
        digest = hashlib.sha256(np.asarray(completion.ids, np.int32).tobytes()).digest()
        first, second = (WORDS[byte % len(WORDS)] for byte in digest[:2])
        text = f"I have read {digest.hex()[:8]}."
        is_last = self._number > 1 + digest[2] % 2
        step = Step(text, answer=first) if is_last else Step(text, query=f"the {first} near the {second}")
        return self._env.step(Completion(self._codec.step_ids(step, self._number), None))

    def observe(self, hits: Sequence[Hit]) -> Transition:
        """See `Env.observe`."""
        return self._env.observe(hits)


class Policy:
    """The engine with a random policy, and the Envs of both protocols."""

    def __init__(self) -> None:
        tokenizer = Tokenizer(model_directory(ModelConfig()))
        config = DecoderConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            ffn_size=64, tie_embeddings=True,
        )  # fmt: skip
        graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
        rollouts = RolloutConfig(max_new_tokens=SAMPLED, max_length=512, max_steps=4)
        engine = Engine(graphdef, config, make_mesh(MeshConfig()), slots=SLOTS, max_length=rollouts.max_length)
        decoder = engine.load(params)
        engine.warm_up(decoder)
        self._backend = EngineBackend(engine, decoder, tokenizer, decode_chunk=SAMPLED)
        codecs = [Codec(tokenizer, make_protocol(name), 32) for name in PROTOCOLS]
        self._factories = [_writing(codec, rollouts) for codec in codecs]

    def play(self, number: int, retriever: Retriever, done: dict[str, Trajectory]) -> None:
        """Roll out the questions of round `number` that are not `done`, and add their trajectories."""
        questions = [Question(f"{number}-{i}", f"What is near the {WORDS[i]}?", ("?",)) for i in range(QUESTIONS)]
        requests = [RolloutRequest(q, temperature=1.0, seed=number) for q in questions if q.id not in done]

        def keep(trajectory: Trajectory) -> None:
            if done.setdefault(trajectory.question.id, trajectory) is not trajectory:
                raise RuntimeError(f"question {trajectory.question.id} has two trajectories")

        factory = self._factories[number % len(PROTOCOLS)]
        rollout(self._backend, factory, retriever, requests, search_overlap=2, on_done=keep)


def _writing(codec: Codec, config: RolloutConfig) -> EnvFactory:
    plain = search_env_factory(codec, config, top_k=TOP_K, max_passages=MAX_PASSAGES)
    return EnvFactory(lambda request: WritingEnv(plain(request), codec), plain.stops)


def is_right(trajectory: Trajectory) -> bool:
    """Whether a trajectory is whole, and shows what its queries find: searched again without a server."""
    seen: set[str] = set()
    for step in trajectory.steps:
        if step.query is None:
            continue
        [hits] = LocalRetriever().search([step.query], TOP_K + len(seen))
        if step.passages != select_passages(hits, seen, TOP_K, max_passages=MAX_PASSAGES):
            return False
        seen |= {passage.id for passage in step.passages}
    num_sampled = sum(int(sample.loss_mask.sum()) for sample in trajectory.samples)
    return trajectory.status is Status.ANSWERED and trajectory.steps[-1].answer is not None and num_sampled > 0


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What this process holds."""

    resident_mb: float
    num_threads: int
    num_handles: int
    num_programs: int  # that XLA has compiled since the start

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        handles = len(os.listdir("/proc/self/fd"))
        num_threads = len(os.listdir("/proc/self/task"))
        return cls(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, num_threads, handles, num_compiled())

    def growth(self, before: Footprint, growth_mb: float) -> list[str]:
        """What has grown since an earlier look, in words."""
        found = [
            f"{name.removeprefix('num_')}: {getattr(before, name)}, then {getattr(self, name)}"
            for name in ("num_threads", "num_handles", "num_programs")
            if getattr(self, name) > getattr(before, name)
        ]
        is_more = self.resident_mb > before.resident_mb + growth_mb
        return found + ([f"memory: {before.resident_mb:.0f} MB, then {self.resident_mb:.0f}"] if is_more else [])

    def __str__(self) -> str:
        return (
            f"{self.resident_mb:6.0f} MB  {self.num_threads:3} threads  {self.num_handles:3} handles  "
            f"{self.num_programs:3} programs"
        )


@contextlib.contextmanager
def faulty_server(seed: int, share: float) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    words = ["--seed", str(seed), "--share", str(share), "--hang-s", str(HANG_S)]
    path = Path(__file__).with_name("faulty_server.py")
    with subprocess.Popen(
        [sys.executable, str(path), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()  # its end


class Soak:
    """Rounds of rollouts against the server, each until all its questions have a trajectory."""

    def __init__(self, policy: Policy, url: str):
        self._policy, self._url = policy, url
        config = RemoteRetrieverConfig(url=url, timeout_s=TIMEOUT_S, format="search_r1")
        self._retriever = HttpRetriever(config)
        self.num_rounds = self.num_trajectories = self.num_failed = self.num_wrong = 0

    def round(self) -> None:
        """Play the next round."""
        number, self.num_rounds = self.num_rounds, self.num_rounds + 1
        done: dict[str, Trajectory] = {}
        while len(done) < QUESTIONS:
            try:
                self._policy.play(number, self._retriever, done)
            except RetrievalError:
                self.num_failed += 1
        self.num_trajectories += len(done)
        self.num_wrong += sum(not is_right(trajectory) for trajectory in done.values())

    def look(self) -> Footprint:
        """What the process holds after a search that did not fail: its connection is kept, idle ones are closed."""
        while True:
            with contextlib.suppress(RetrievalError):
                self._retriever.search(["amber"], 1)
                return Footprint.now()

    def line(self, minutes: float, footprint: Footprint) -> str:
        """What has happened so far."""
        counts = Counter(httpx.get(f"{self._url}/counts").json())
        num_faults = counts.total() - counts["none"]
        return (
            f"{minutes:6.1f} min  {counts.total():6} requests, {num_faults:5} with a fault  "
            f"{self.num_failed:5} failed rollouts  {self.num_trajectories:6} of {self.num_rounds * QUESTIONS} "
            f"trajectories, {self.num_wrong} wrong  {footprint}"
        )

    def faults(self) -> list[str]:
        """What is wrong with the trajectories, in words."""
        lost = self.num_rounds * QUESTIONS - self.num_trajectories
        wrong = {"questions without a trajectory": lost, "trajectories that show other passages": self.num_wrong}
        return [f"{count} {what}" for what, count in wrong.items() if count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--load", type=float, default=0.1, help="share of a core that this process takes at most")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--faults", type=float, default=0.3, help="share of the replies that have a fault")
    parser.add_argument("--report-s", type=float, default=60.0)
    parser.add_argument("--growth-mb", type=float, default=32.0, help="of memory that is no leak yet")
    args = parser.parse_args()
    num_compiled()  # from here on they are counted
    policy = Policy()
    for number in range(len(PROTOCOLS)):
        policy.play(number, LocalRetriever(), {})
    end_s, report_s = args.minutes * 60, 0.0
    warm: Footprint | None = None
    with faulty_server(args.seed, args.faults) as url:
        soak, start = Soak(policy, url), time.monotonic()
        while (passed_s := time.monotonic() - start) < end_s or warm is None:
            began_s = time.process_time()
            soak.round()
            if warm is None and passed_s >= end_s / 10:
                warm = soak.look()
            if passed_s >= report_s:
                print(soak.line(passed_s / 60, soak.look()), flush=True)
                report_s = passed_s + args.report_s
            time.sleep((time.process_time() - began_s) * (1 / args.load - 1))
        time.sleep(KEEPALIVE_S)  # until connections that nobody uses are closed
        footprint = soak.look()
        print(soak.line(passed_s / 60, footprint), flush=True)
        print(f"faults of the server: {httpx.get(f'{url}/counts').json()}")
    wrong = [*soak.faults(), *footprint.growth(warm, args.growth_mb)]
    print("; ".join(wrong) or "nothing is lost, wrong or grown")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
