"""Training against other ways to do it: the same weights, data and machine, in turn, in one run.

    python benchmarks/training.py sft MODEL [--rows 8 --length 512]     a step, against PyTorch (needs torch)
    python benchmarks/training.py trees MODEL [--retrievals 4]          `steps`: one tree against a sample per step
    python benchmarks/training.py arrays                                rewards and GAE, against loops (needs torch)

MODEL is a Hugging Face directory, package:NAME or bundled. Every figure is the median of the rounds, in which all ways
take their turn, behind a first one that compiles; a ratio is of two medians of one run.

`sft` is AdamW on full rows of random tokens, all of them learnt. Its limit is what the 6 N multiply-adds of a token
(N parameters, the embedding counted once, as the output layer) and those of attention take at the speed of a large
matmul, measured here and now. `trees` packs the same trajectories both ways, to the same loss, and updates on all rows.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from timing import medians

from r3rag_jax import learner
from r3rag_jax.batch import minibatches
from r3rag_jax.config import MeshConfig, ModelConfig, SFTConfig
from r3rag_jax.models.decoder import param_shapes
from r3rag_jax.models.hf import load_decoder
from r3rag_jax.models.paths import model_path
from r3rag_jax.prefix_tree import share_prefixes
from r3rag_jax.rewards.answer import answer_scores, encode_answers, normalize_answer
from r3rag_jax.rl.advantages import gae
from r3rag_jax.session import use_compile_cache
from r3rag_jax.sharding import make_mesh, put_batch
from r3rag_jax.types import Question, Sample, SFTBatch, Status, Step, Trajectory

GIB = 2**30


def path_of(model: str) -> Path:
    return Path(str(files("r3rag_jax") / "assets" / "base")) if model == "bundled" else model_path(model)


class Ours:
    """The jitted SFT update over a mesh of all devices."""

    def __init__(self, model: str, dtype: str, remat: str = "none"):
        decoder = load_decoder(path_of(model), dtype=dtype, param_dtype="float32")
        self.config, self.mesh = decoder.config, make_mesh(MeshConfig())
        graphdef, params = nnx.split(decoder)
        tx = learner.sft_optimizer(SFTConfig(lr=1e-5), 100)
        self.state = learner.init_state(self.mesh, params, tx)
        settings = ModelConfig(dtype=dtype, remat=remat)  # type: ignore[arg-type]
        self._step = learner.make_sft_step(self.mesh, graphdef, tx, settings, self.state)

    def step(self, batch: SFTBatch) -> float:
        self.state, metrics = self._step(self.state, put_batch(self.mesh, batch))
        return float(metrics["loss"])

    def temporaries(self, batch: SFTBatch) -> int:
        """Bytes that the compiled step takes beside its arguments and results."""
        lowered = self._step.lower(self.state, put_batch(self.mesh, batch))  # type: ignore[attr-defined]
        return lowered.compile().memory_analysis().temp_size_in_bytes


# -------------------------------------------------------------------------------------------- sft


def pytorch_step(model: str, dtype: str, tokens: np.ndarray) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(path_of(model), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0)
    ids = torch.from_numpy(tokens).long()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = policy(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def sft(console: Console, model: str, rows: int, length: int, dtypes: Sequence[str], remat: str, rounds: int) -> None:
    rng, table = np.random.default_rng(0), Table("way", "s a step", "tokens/s", "share of the limit", "temporaries")
    ways: dict[str, Callable[[], Any]] = {}
    notes: dict[str, tuple[float, str]] = {}
    for dtype in dtypes:
        ours = Ours(model, dtype, remat)
        tokens = rng.integers(0, ours.config.vocab_size, (rows, length)).astype(np.int32)
        ones = np.ones_like(tokens)
        batch = SFTBatch(tokens, np.cumsum(ones, axis=1) - 1, ones, None, np.arange(length) > 0 * ones)  # type: ignore[arg-type]
        shapes = param_shapes(ours.config)
        num = sum(int(np.prod(s)) for name, s in shapes.items() if name != "embed" or ours.config.tie_embeddings)
        attended = 6 * ours.config.num_layers * ours.config.num_heads * ours.config.head_dim * length
        limit = rows * length * (6 * num + attended) / matmul_flops(dtype)
        notes[f"ours, {dtype}"] = limit, f"{ours.temporaries(batch) / GIB:.2f} GiB"
        notes[f"PyTorch, {dtype}"] = limit, ""
        ways[f"ours, {dtype}"] = functools.partial(ours.step, batch)
        ways[f"PyTorch, {dtype}"] = pytorch_step(model, dtype, tokens)
    seconds = medians(ways, rounds)
    for name, taken in seconds.items():
        limit, temporaries = notes[name]
        share = f"{100 * limit / taken:.0f} %"
        table.add_row(name, f"{taken:.2f}", f"{rows * length / taken:.0f}", share, temporaries)
    for dtype in dtypes:
        table.add_row(f"ratio, {dtype}", f"{seconds[f'PyTorch, {dtype}'] / seconds[f'ours, {dtype}']:.2f}", "", "", "")
    console.print(table)


def matmul_flops(dtype: str) -> float:
    """Multiply-adds, counted as two, a second, of a matmul large enough to be bound by them."""
    x, y = (jnp.ones((2048, 2048), dtype) for _ in range(2))
    multiply = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    seconds = medians({"": lambda: multiply(x, y).block_until_ready()}, 5)[""]
    return 2 * 2048**3 / seconds


# ------------------------------------------------------------------------------------------ trees


def trajectories(vocab_size: int, count: int, retrievals: int, written: int, passages: int) -> list[Trajectory]:
    """Of random tokens, in the layout of `steps`: each step's prompt holds the question, steps and passages so far."""
    rng, made = np.random.default_rng(0), []
    draw = lambda num: rng.integers(0, vocab_size, num).tolist()  # noqa: E731
    frame, close = draw(8), draw(6)
    for number in range(count):
        history, samples = [*frame, *draw(24)], []
        for step in range(retrievals + 1):
            ids = draw(written)
            prompt = [*history, *close]
            step_ids = np.repeat([-1, step], [len(prompt), written]).astype(np.int32)
            logprobs = np.where(step_ids >= 0, -1.0, 0.0).astype(np.float32)
            samples.append(Sample(np.asarray([*prompt, *ids], np.int32), step_ids >= 0, logprobs, step_ids))
            history += [*ids, *draw(passages)]
        steps = tuple(Step("", query="") for _ in samples)
        made.append(Trajectory(Question(str(number), "", ("",)), steps, Status.NO_ANSWER, tuple(samples)))
    return made


def trees(console: Console, model: str, retrievals: int, count: int, row_length: int, rounds: int) -> None:
    ours = Ours(model, "float32")
    played = trajectories(ours.config.vocab_size, count, retrievals, written=48, passages=200)
    shared = [share_prefixes(t.samples, row_length) for t in played]
    ways: dict[str, Callable[[], Any]] = {}
    sizes, losses = {}, {}
    for name, made in (
        ("a sample per step", played),
        ("trees", [Trajectory(t.question, t.steps, t.status, s) for t, s in zip(played, shared, strict=True)]),
    ):
        rewards = [np.zeros(len(t.steps), np.float32) for t in made]
        packed = minibatches(made, rewards, row_length=row_length, batch_rows=2, rng=np.random.default_rng(0))
        batches = [SFTBatch(b.tokens, b.positions, b.segment_ids, b.branch_ids, b.loss_mask) for b in packed]
        sizes[name] = sum(len(sample) for t in made for sample in t.samples), len(batches)

        def update(name: str = name, batches: list[SFTBatch] = batches) -> None:
            losses[name] = [ours.step(batch) for batch in batches]

        ways[name] = update
    seconds = medians(ways, rounds)
    table = Table(
        "way", "tokens", "batches", "s", title=f"{count} trajectories of {retrievals} retrievals and an answer"
    )
    for name, taken in seconds.items():
        table.add_row(name, str(sizes[name][0]), str(sizes[name][1]), f"{taken:.2f}")
    (single, separate), (tree, together) = sizes.items()
    table.add_row("ratio", f"{separate[0] / together[0]:.2f}", "", f"{seconds[single] / seconds[tree]:.2f}")
    console.print(table)


# ----------------------------------------------------------------------------------------- arrays


def arrays(console: Console, rounds: int) -> None:
    import torch

    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(500)]
    text = lambda: " ".join(rng.choice(words, rng.integers(1, 6)))  # noqa: E731
    predictions, golds = [text() for _ in range(4096)], [[text() for _ in range(4)] for _ in range(4096)]
    rewards, values = (rng.normal(size=(256, 2048)).astype(np.float32) for _ in range(2))
    discounts, mask = np.full_like(rewards, 0.99), np.ones(rewards.shape, bool)
    batched = jax.jit(jax.vmap(functools.partial(gae, lam=0.95)))
    packed = jax.device_put(encode_answers(predictions, golds))
    on_device = jax.device_put((rewards, values, discounts, mask))
    tensors = [torch.from_numpy(x) for x in (rewards, values, discounts)]
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        found[name] = value

    seconds = medians(
        {
            "rewards, ids": lambda: note("ids", jax.block_until_ready(answer_scores(packed))),
            "rewards, text": lambda: jax.block_until_ready(answer_scores(encode_answers(predictions, golds))),
            "rewards, plain Python": lambda: note(
                "plain", [plain(p, g) for p, g in zip(predictions, golds, strict=True)]
            ),
            "GAE": lambda: note("gae", jax.block_until_ready(batched(*on_device))),
            "GAE, PyTorch loop": lambda: note("loop", torch_gae(*tensors)),
        },
        rounds,
    )
    np.testing.assert_allclose(np.asarray(found["ids"]["f1"]), [f1 for _, f1 in found["plain"]], atol=1e-6)
    np.testing.assert_allclose(found["gae"][0], found["loop"], rtol=1e-4, atol=1e-3)
    table = Table("", "ms", "ratio", title="4096 predictions with 4 gold answers; 256 trajectories of 2048 tokens")
    for name, taken in seconds.items():
        slow = "GAE, PyTorch loop" if name.startswith("GAE") else "rewards, plain Python"
        table.add_row(name, f"{1e3 * taken:.1f}", f"{seconds[slow] / taken:.1f}")
    console.print(table)


def plain(prediction: str, golds: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 as scripts write them."""
    em, best, words = 0.0, 0.0, normalize_answer(prediction).split()
    for gold in golds:
        expected = normalize_answer(gold).split()
        em = max(em, float(words == expected))
        common = sum((Counter(words) & Counter(expected)).values())
        best = max(best, 2 * common / (len(words) + len(expected)) if common else 0.0)
    return em, best


def torch_gae(rewards: Any, values: Any, discounts: Any) -> Any:
    """A loop over tokens, as trainers in PyTorch have it."""
    import torch

    advantages, last = torch.zeros_like(rewards), torch.zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros(rewards.shape[0])
        delta = rewards[:, t] + discounts[:, t] * following - values[:, t]
        last = delta + discounts[:, t] * 0.95 * last
        advantages[:, t] = last
    return advantages


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sft_of = commands.add_parser("sft")
    sft_of.add_argument("--rows", type=int, default=8)
    sft_of.add_argument("--length", type=int, default=512, help="tokens")
    sft_of.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    sft_of.add_argument("--remat", default="none", help="as model.remat")
    trees_of = commands.add_parser("trees")
    trees_of.add_argument("--retrievals", type=int, default=4, help="of a trajectory, behind which it answers")
    trees_of.add_argument("--trajectories", type=int, default=8)
    trees_of.add_argument("--row-length", type=int, default=2048, help="tokens")
    for command in (sft_of, trees_of):
        command.add_argument("model", metavar="MODEL")
    for command in (sft_of, trees_of, commands.add_parser("arrays")):
        command.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    use_compile_cache()
    console = Console()
    if args.command == "sft":
        sft(console, args.model, args.rows, args.length, args.dtypes, args.remat, args.rounds)
    elif args.command == "trees":
        trees(console, args.model, args.retrievals, args.trajectories, args.row_length, args.rounds)
    else:
        arrays(console, args.rounds)


if __name__ == "__main__":
    main()
