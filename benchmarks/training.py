"""Training compared with PyTorch and with simpler implementations, with the same weights and data, in one process.

    python benchmarks/training.py sft MODEL [--rows 8 --length 512]     an SFT update and PyTorch's (needs torch)
    python benchmarks/training.py ppo MODEL [--rows 8 --length 512]     an update of policy and critic and PyTorch's
    python benchmarks/training.py trees MODEL [--retrievals 4]          prefix trees and one sample per step
    python benchmarks/training.py arrays                                rewards and GAE, and loops (needs torch)

MODEL is a Hugging Face directory, package:NAME or bundled. The first round compiles and is not measured. Every round
runs all variants in turn; figures are medians over the rounds, and ratios are quotients of medians. In `sft` and `ppo`
each variant does two updates per round, of which the second is measured: the first maps memory again that the process
returned to the system while the other variants ran.

`sft` is AdamW on full rows of random tokens, all in the loss; PyTorch chooses its attention implementation. `ppo` is a
clipped update of a policy and a separate critic, with given advantages. Both frameworks must compute the same loss.
"limit" is the time of 6 N operations per token (N parameters, the embedding counted only as the output layer) and of
attention, at the speed of a large matmul, which the script measures; "share of the limit" is the model FLOP
utilization. `trees` packs the same trajectories with and without shared prefixes, and updates on all rows.

On a GPU both frameworks use it: XLA_PYTHON_CLIENT_MEM_FRACTION=.5 leaves memory for PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from timing import matmul_flops, medians, torch_device

from r3rag_jax.config import CriticConfig, KLConfig, MeshConfig, ModelConfig, RLConfig, SFTConfig
from r3rag_jax.models.decoder import Decoder, param_shapes
from r3rag_jax.models.hf.decoder_files import load_config, load_decoder
from r3rag_jax.models.paths import model_path
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.shardings import device_put_batch
from r3rag_jax.rewards.answer import answer_scores, encode_answers
from r3rag_jax.rewards.normalization import normalize_answer
from r3rag_jax.rl.advantages import gae
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.training import optimizer
from r3rag_jax.training.batch import minibatches
from r3rag_jax.training.prefix_tree import share_prefixes
from r3rag_jax.training.state import Targets, init_state, new_critic
from r3rag_jax.training.steps import make_rl_step, make_sft_step
from r3rag_jax.types import Question, Sample, SFTBatch, Status, Step, TrainBatch, Trajectory

GIB = 2**30


def path_of(model: str) -> Path:
    """The model's directory; `bundled` is this package's base model."""
    return Path(str(files("r3rag_jax") / "world" / "base")) if model == "bundled" else model_path(model)


class Ours:
    """This package's jitted update, on a mesh of all devices."""

    def __init__(self, mesh: Mesh, state: Any, step: Any, *rest: Any):
        """`step` is called with the state, a batch on the mesh, and `rest`."""
        self.mesh, self.state, self._step, self._rest = mesh, state, step, rest

    @classmethod
    def sft(cls, model: str, settings: ModelConfig) -> Ours:
        graphdef, params = nnx.split(read(model, settings))
        mesh, tx = make_mesh(MeshConfig()), optimizer.sft_optimizer(SFTConfig(lr=1e-5), 100)
        state = init_state(mesh, params, tx)
        return cls(mesh, state, make_sft_step(mesh, graphdef, tx, settings, state))

    @classmethod
    def ppo(cls, model: str, settings: ModelConfig) -> Ours:
        """A PPO update of a policy and a separate critic."""
        policy, config = read(model, settings), RLConfig(lr=1e-5, critic=CriticConfig(lr=1e-5), kl=KLConfig(coef=0.0))
        models = {"policy": nnx.split(policy), "critic": nnx.split(new_critic(policy, "separate"))}
        graphdefs = {name: graphdef for name, (graphdef, _) in models.items()}
        mesh, tx = make_mesh(MeshConfig()), optimizer.rl_optimizer(config)
        state = init_state(mesh, {name: params for name, (_, params) in models.items()}, tx)
        return cls(mesh, state, make_rl_step(mesh, graphdefs, tx, settings, config, state), 1.0)

    def step(self, *batch: Any) -> float:
        self.state, metrics = self._step(self.state, *device_put_batch(self.mesh, batch), *self._rest)
        return float(metrics["loss"])

    def temporaries(self, *batch: Any) -> int:
        """Bytes of temporary buffers of the compiled step."""
        lowered = self._step.lower(self.state, *device_put_batch(self.mesh, batch), *self._rest)
        return int(lowered.compile().memory_analysis().temp_size_in_bytes)


def read(model: str, settings: ModelConfig) -> Decoder:
    return load_decoder(
        path_of(model), dtype=settings.dtype, param_dtype="float32", attention_implementation=settings.attention
    )


# ------------------------------------------------------------------------------------ sft and ppo


@dataclasses.dataclass(frozen=True)
class PPOWork:
    """Full rows of random tokens, and PPO's inputs per token; all [B, L]. A row's first token is not in the loss."""

    tokens: np.ndarray
    old_logprobs: np.ndarray
    old_values: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray

    @classmethod
    def random(cls, tokens: np.ndarray, rng: np.random.Generator) -> PPOWork:
        draw = lambda mean: (mean + 0.1 * rng.normal(size=tokens.shape)).astype(np.float32)  # noqa: E731
        return cls(tokens, draw(-10.0), draw(0.0), 10 * draw(0.0), 10 * draw(0.0))

    def batch(self) -> tuple[TrainBatch, Targets]:
        rows = plain_rows(self.tokens)
        temperature = np.ones(self.tokens.shape, np.float32)
        batch = TrainBatch(**vars(rows), behaviour_logprobs=self.old_logprobs, temperature=temperature)
        return batch, Targets(self.advantages, self.returns, self.old_values)  # type: ignore[arg-type]


def plain_rows(tokens: np.ndarray) -> SFTBatch:
    """One segment per row; all tokens but the first are in the loss."""
    ones = np.ones_like(tokens)
    return SFTBatch(
        tokens, np.cumsum(ones, axis=1, dtype=np.int32) - 1, ones, None, np.arange(tokens.shape[1]) > 0 * ones
    )  # type: ignore[arg-type]


class PyTorch:
    """The same updates in eager PyTorch with transformers: AdamW on float32 weights, forward pass under autocast."""

    def __init__(self, model: str, dtype: str, ppo: bool = False):
        import torch
        from transformers import AutoModel, AutoModelForCausalLM

        self.torch, self.device, self.dtype = torch, torch_device(), dtype
        read = {"dtype": torch.float32}
        self.policy = AutoModelForCausalLM.from_pretrained(path_of(model), **read).train().to(self.device)
        self.modules = [self.policy]
        if ppo:
            self.trunk = AutoModel.from_pretrained(path_of(model), **read).train().to(self.device)
            self.head = torch.nn.Linear(self.trunk.config.hidden_size, 1, bias=False, device=self.device)
            torch.nn.init.zeros_(self.head.weight)
            self.modules += [self.trunk, self.head]
        owned = [self.policy.parameters()] + ([[*self.trunk.parameters(), *self.head.parameters()]] if ppo else [])
        self.optimizers = [torch.optim.AdamW(list(params), lr=1e-5, weight_decay=0.0) for params in owned]

    def sft(self, tokens: np.ndarray) -> float:
        ids = self._tensor(tokens).long()
        with self._autocast():
            loss = self.policy(input_ids=ids, labels=ids).loss
        return self._update(loss)

    def ppo(self, work: PPOWork) -> float:
        torch, ids = self.torch, self._tensor(work.tokens).long()
        old, values_before, advantages, returns = (
            self._tensor(x)[:, 1:] for x in (work.old_logprobs, work.old_values, work.advantages, work.returns)
        )
        with self._autocast():
            logits = self.policy(input_ids=ids).logits[:, :-1]
            values = self.head(self.trunk(input_ids=ids).last_hidden_state[:, :-1])[..., 0].float()
        logprobs = -torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        ratio = torch.exp(logprobs - old)
        policy_loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        clipped = values_before + (values - values_before).clamp(-0.2, 0.2)
        value_loss = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()
        return self._update(policy_loss + value_loss)

    def _tensor(self, x: np.ndarray) -> Any:
        return self.torch.from_numpy(x).to(self.device)

    def _autocast(self) -> Any:
        return self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.dtype == "bfloat16")

    def _update(self, loss: Any) -> float:
        loss.backward()
        for adamw in self.optimizers:
            self.torch.nn.utils.clip_grad_norm_(adamw.param_groups[0]["params"], 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
        return loss.item()


def updates(
    console: Console, kind: str, model: str, rows: int, length: int, dtypes: Sequence[str], settings: ModelConfig,
    rounds: int,
) -> None:  # fmt: skip
    """Compare SFT or PPO updates (`kind`) with PyTorch's, on rows of `length` tokens."""
    rng, table = (
        np.random.default_rng(0),
        Table("variant", "s", "tokens/s", "TFLOP/s", "share of the limit", "temporaries"),
    )
    config = load_config(path_of(model))
    tokens = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    work = PPOWork.random(tokens, rng)
    num = sum(int(np.prod(s)) for name, s in param_shapes(config).items() if name != "embed" or config.tie_embeddings)
    num_head = config.vocab_size * config.hidden_size
    attended = 6 * config.num_layers * config.num_heads * config.head_dim * length  # causal: half of 12
    operations = rows * length * (6 * num + attended)
    if kind == "ppo":
        operations += rows * length * (6 * (num - num_head) + attended)
    variants: dict[str, Callable[[], Any]] = {}
    notes: dict[str, tuple[float, str]] = {}  # variant -> (limit in seconds, temporary memory)
    first_losses: dict[str, float] = {}

    def add_variant(name: str, step: Callable[[], float]) -> None:
        variants[name] = lambda: first_losses.setdefault(name, step()) if name not in first_losses else step()

    batch: tuple[Any, ...]
    for dtype in dtypes:
        chosen = settings.replace(dtype=dtype)
        limit, peer = operations / matmul_flops(dtype), PyTorch(model, dtype, kind == "ppo")
        if kind == "sft":
            ours, batch, theirs = Ours.sft(model, chosen), (plain_rows(tokens),), functools.partial(peer.sft, tokens)
        else:
            ours, batch, theirs = Ours.ppo(model, chosen), work.batch(), functools.partial(peer.ppo, work)
        temporaries = ours.temporaries(*batch)
        add_variant(f"ours, {dtype}", functools.partial(ours.step, *batch))
        add_variant(f"PyTorch, {dtype}", theirs)
        notes[f"ours, {dtype}"], notes[f"PyTorch, {dtype}"] = (limit, f"{temporaries / GIB:.2f} GiB"), (limit, "")
    seconds = medians(variants, rounds, warm_up=True)
    for dtype in dtypes:
        tolerance = 1e-3 if dtype == "float32" else 3e-2
        np.testing.assert_allclose(
            first_losses[f"ours, {dtype}"], first_losses[f"PyTorch, {dtype}"], rtol=tolerance, err_msg=dtype
        )
    for name, taken_s in seconds.items():
        limit, memory = notes[name]
        table.add_row(
            name, f"{taken_s:.3f}", f"{rows * length / taken_s:.0f}", f"{operations / taken_s / 1e12:.2f}",
            f"{100 * limit / taken_s:.0f} %", memory,
        )  # fmt: skip
    for dtype in dtypes:
        table.add_row(f"ratio, {dtype}", f"{seconds[f'PyTorch, {dtype}'] / seconds[f'ours, {dtype}']:.2f}")
    console.print(table)


# ------------------------------------------------------------------------------------------ trees


def trajectories(vocab_size: int, count: int, retrievals: int, written: int, passages: int) -> list[Trajectory]:
    """Random trajectories in the layout of the protocol `steps`: a step's prompt holds all that precedes it."""
    rng, result = np.random.default_rng(0), []
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
        result.append(Trajectory(Question(str(number), "", ("",)), steps, Status.NO_ANSWER, tuple(samples)))
    return result


def trees(console: Console, model: str, retrievals: int, count: int, row_length: int, rounds: int) -> None:
    """Compare SFT updates on prefix trees with updates on one sample per step, for `count` trajectories."""
    ours, vocab_size = Ours.sft(model, ModelConfig()), load_config(path_of(model)).vocab_size
    unshared = trajectories(vocab_size, count, retrievals, written=48, passages=200)
    shared = [share_prefixes(t.samples, row_length) for t in unshared]
    variants: dict[str, Callable[[], Any]] = {}
    sizes, losses = {}, {}
    for name, packable in (
        ("a sample per step", unshared),
        ("trees", [Trajectory(t.question, t.steps, t.status, s) for t, s in zip(unshared, shared, strict=True)]),
    ):
        samples = [sample for trajectory in packable for sample in trajectory.samples]
        packed, _ = minibatches(samples, row_length=row_length, batch_rows=2, rng=np.random.default_rng(0))
        batches = [SFTBatch(b.tokens, b.positions, b.segment_ids, b.branch_ids, b.loss_mask) for b in packed]
        sizes[name] = sum(len(sample) for t in packable for sample in t.samples), len(batches)

        def update(name: str = name, batches: list[SFTBatch] = batches) -> None:
            losses[name] = [ours.step(batch) for batch in batches]

        variants[name] = update
    seconds = medians(variants, rounds)
    table = Table(
        "variant", "tokens", "batches", "s", title=f"{count} trajectories of {retrievals} retrievals and an answer"
    )
    for name, taken in seconds.items():
        table.add_row(name, str(sizes[name][0]), str(sizes[name][1]), f"{taken:.2f}")
    (single, separate), (tree, together) = sizes.items()
    table.add_row("ratio", f"{separate[0] / together[0]:.2f}", "", f"{seconds[single] / seconds[tree]:.2f}")
    console.print(table)


# ----------------------------------------------------------------------------------------- arrays


def arrays(console: Console, rounds: int) -> None:
    """Compare jitted rewards and GAE with a Python loop over texts and a PyTorch loop over tokens."""
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
    """Exact match and F1 of one prediction, in plain Python."""
    em, best, words = 0.0, 0.0, normalize_answer(prediction).split()
    for gold in golds:
        expected = normalize_answer(gold).split()
        em = max(em, float(words == expected))
        common = sum((Counter(words) & Counter(expected)).values())
        best = max(best, 2 * common / (len(words) + len(expected)) if common else 0.0)
    return em, best


def torch_gae(rewards: Any, values: Any, discounts: Any) -> Any:
    """GAE as a loop over tokens, as in PyTorch trainers."""
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
    update_of = {kind: commands.add_parser(kind) for kind in ("sft", "ppo")}
    for command in update_of.values():
        command.add_argument("--rows", type=int, default=8)
        command.add_argument("--length", type=int, default=512, help="tokens")
        command.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
        command.add_argument("--remat", default="none", help="as model.remat")
        command.add_argument("--micro-tokens", type=int, default=0, help="as model.micro_tokens")
        command.add_argument("--attention", default="xla", help="as model.attention")
    trees_of = commands.add_parser("trees")
    trees_of.add_argument("--retrievals", type=int, default=4, help="retrievals of a trajectory before its answer")
    trees_of.add_argument("--trajectories", type=int, default=8)
    trees_of.add_argument("--row-length", type=int, default=2048, help="tokens")
    for command in (*update_of.values(), trees_of):
        command.add_argument("model", metavar="MODEL")
    for command in (*update_of.values(), trees_of, commands.add_parser("arrays")):
        command.add_argument("--rounds", type=int, default=3, help="measured rounds")
    args = parser.parse_args(argv)
    use_compile_cache()
    console = Console()
    if args.command in update_of:
        settings = ModelConfig(remat=args.remat, attention=args.attention, micro_tokens=args.micro_tokens)
        updates(console, args.command, args.model, args.rows, args.length, args.dtypes, settings, args.rounds)
    elif args.command == "trees":
        trees(console, args.model, args.retrievals, args.trajectories, args.row_length, args.rounds)
    else:
        arrays(console, args.rounds)


if __name__ == "__main__":
    main()
