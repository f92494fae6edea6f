"""A whole run in miniature: a small world, a two-layer policy, and a cold start of two or three dozen updates.

They teach the random policy enough of the format that RL rollouts retrieve, and nothing more.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from rich.console import Console
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from r3rag_jax.components import Components
from r3rag_jax.config import Config, load_config
from r3rag_jax.experiment import run
from r3rag_jax.models.hf.decoder_files import save_decoder
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.world.encyclopedia import World

VOCAB_SIZE = 1024
PHRASES = (
    "<think> I need the author of </think><query> Who wrote </query><answer>",
    "Step 1:\nThe problem analysis: I need\nThe retrieval query: Who is the\nThe final answer:",
    "The retrieval documents: The question: user assistant\nQuestion:\nAnswer:",
)
SETTINGS: dict[str, Any] = {
    "world.num_people": 60,
    "world.num_sft": 8,
    "world.num_rl": 12,
    "world.num_dev": 2,
    "world.num_test": 4,
    "world.needless_retrievals": 0.0,
    "retrieval.encoder.dim": 256,
    "retrieval.passage_tokens": 12,
    "retrieval.top_k": 1,
    "baselines.naive_rag.top_k": 2,
    "rollout.max_new_tokens": 48,
    "rollout.max_steps": 3,
    "rollout.max_length": 320,
    "rollout.slots": 8,
    "rollout.samples": 2,
    "rollout.temperatures": [0.1, 0.4],
    "sft.batch_rows": 8,
    "sft.row_length": 384,
    "sft.lr": 1e-2,
    "sft.checkpoint_every": 8,
    "rl.iterations": 3,
    "rl.questions": 4,
    "rl.batch_rows": 8,
    "rl.row_length": 320,
    "rl.lr": 1e-3,
    "rl.critic.lr": 1e-3,
    "rl.adam_eps": 1e-4,  # without, gradients that are rounding make whole steps
    "rl.critic.kind": "head",
    "rl.eval_every": 3,
    "rl.checkpoint_every": 1,
    "log.progress": "false",
}
EPOCHS = {"tags": 56, "steps": 40}  # `steps` has a sample per step


def write_tokenizer(path: Path) -> Tokenizer:
    """Byte-level BPE over a small world's text, with tags and ChatML; about four letters a token."""
    tiny.tokenizer(path)  # its settings and template
    world = World.generate(0, num_people=60)
    texts = [p.contents for p in world.passages] + [q.question for q in world.questions("rl", 40)] + [*PHRASES] * 50
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(tiny.SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


def write_base(path: Path) -> Path:
    """A Hugging Face directory that `model.path` takes."""
    write_tokenizer(path)
    save_decoder(tiny.decoder(VOCAB_SIZE, scale=1.0), path, dtype="float32")
    return path


def write_recipe(directory: Path, base: Path, protocol: str = "tags", **settings: Any) -> Path:
    """`recipe.yaml` with the settings above; a keyword's `__` stands for the dot of a key."""
    values = {"run_dir": directory / "run", "model.path": base, "rollout.protocol": protocol} | SETTINGS
    values |= {"sft.epochs": EPOCHS[protocol]}
    values |= {name.replace("__", "."): value for name, value in settings.items()}
    directory.mkdir(parents=True, exist_ok=True)
    shown = {name: json.dumps(str(value)) if isinstance(value, Path) else value for name, value in values.items()}
    (directory / "recipe.yaml").write_text("".join(f"{name}: {value}\n" for name, value in shown.items()))
    return directory / "recipe.yaml"


def config(directory: Path, base: Path, protocol: str = "tags", **settings: Any) -> Config:
    return load_config(write_recipe(directory, base, protocol, **settings))


def train(directory: Path, base: Path, protocol: str = "tags", **settings: Any) -> str:
    """All phases in this process, over all its devices; returns what the run said."""
    console = Console(file=io.StringIO(), width=200)
    run(config(directory, base, protocol, **settings), console)
    return console.file.getvalue()


def files(run_dir: Path) -> dict[str, bytes]:
    """Every file of a run by its relative path."""
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def open_components(run_dir: Path, *overrides: str) -> Components:
    """A finished run to work with; it is only read."""
    config = load_config(run_dir / "config.yaml", [*overrides, "phases=index"])
    return Components(config, run_dir, console=Console(quiet=True))


def weights(run_dir: Path, phase: str) -> dict[str, np.ndarray]:
    """The exported policy of a phase."""
    return load_file(run_dir / "policy" / phase / "model.safetensors")


class Killed(Exception):
    """Stands for a preempted machine."""


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock or on when a process began."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.endswith("_s") and name != "num_compiled"}
        for row in rows
    ]
