"""Writes a small run directory with every file of a finished run, for tests of what reads one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

TITLES = {
    "closed_book": "Closed book",
    "naive_rag": "Naive RAG",
    "cold_start": "Cold start",
    "r3rag": "R3-RAG",
}
EM = {"closed_book": 4.0, "naive_rag": 21.5, "cold_start": 55.5, "r3rag": 73.0}
TYPES = ("single", "bridge", "comparison", "bridge_comparison")
NUM_QUESTIONS = 200
CONFIG = "name: synthetic\nseed: 0\nrl:\n  iterations: 40\n  lr: 0.0001\n"

MALTHEN = Passage("p1", '"The Glass Harbour"\nThe Glass Harbour is a novel by Ilse Malthen that came out in 1931.')
TOWN = Passage(
    "p2",
    '"Ilse Malthen"\nIlse Malthen was born in Orvessa. She studied at the Lyceum of Tarn and later '
    "taught there. Her early poems, printed at her own cost, found few readers; the novels that "
    "followed were read all over the country, and one of them was filmed twice. She lies beside "
    "her husband, the painter Joren Adel, who drew the covers of her books.",
)
OTHER = Passage("p3", '"Glass Bay"\nGlass Bay is a village on the river Ane <& its "old" bridge>.')


def question(number: int, kind: str = "bridge") -> Question:
    """A two-hop question whose evidence is p1 and p2."""
    text = "Where was the author of The Glass Harbour born?"
    metadata = {"type": kind, "unseen": number % 2 == 0, "supporting_ids": ["p1", "p2"]}
    return Question(f"q{number}", text, ("Orvessa",), metadata)


def right(asked: Question) -> Trajectory:
    """Two retrievals, then the right answer."""
    return Trajectory(
        asked,
        (
            Step(
                "I start with the author of The Glass Harbour.",
                query="Who wrote The Glass Harbour?",
                passages=(MALTHEN, OTHER),
            ),
            Step(
                "The Glass Harbour was written by Ilse Malthen. Now I need her birthplace.",
                query="Where was Ilse Malthen born?",
                passages=(TOWN,),
            ),
            Step("Ilse Malthen was born in Orvessa, which answers the question.", answer="Orvessa"),
        ),
        Status.ANSWERED,
    )


def wrong(asked: Question) -> Trajectory:
    """One retrieval that misses, then a wrong answer."""
    return Trajectory(
        asked,
        (
            Step("I look for the harbour.", query="Where is the Glass Harbour?", passages=(OTHER,)),
            Step("Glass Bay is on the river Ane.", answer="Glass Bay"),
        ),
        Status.ANSWERED,
    )


def malformed(asked: Question) -> Trajectory:
    """A step that holds neither a query nor an answer."""
    text = "<think> I wonder <b>whether</b> [bold]this[/bold] ends </query>\x1b[31m"
    steps = (
        Step("I start with the author.", query="Who wrote The Glass Harbour?", passages=()),
        Step(text, is_well_formed=False),
    )
    return Trajectory(asked, steps, Status.FORMAT_ERROR)


def no_answer(asked: Question) -> Trajectory:
    """The step budget ran out."""
    steps = tuple(Step("I look again.", query="Who wrote The Glass Harbour?", passages=(MALTHEN,)) for _ in range(2))
    return Trajectory(asked, steps, Status.NO_ANSWER)


def build(run_dir: Path, phases: Sequence[str] = ("sft", "rl", "eval")) -> Path:
    """Writes what a run has after these phases; the same every time."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(CONFIG)
    rows = [row for phase in ("sft", "rl") if phase in phases for row in metrics(phase)]
    _write_lines(run_dir / "metrics.jsonl", rows)
    _write_lines(run_dir / "phases.jsonl", [cost(phase) for phase in ("index", *phases)])
    if "rl" in phases:
        _write_lines(run_dir / "trajectories" / "rl.jsonl", _rollouts())
    if "eval" in phases:
        (run_dir / "eval").mkdir()
        for system in TITLES:
            summary = evaluation(system)
            (run_dir / "eval" / f"{system}.json").write_text(json.dumps(summary, indent=2))
        for system in ("cold_start", "r3rag"):
            trajectories = map(trajectory_to_dict, _attempts(system))
            _write_lines(run_dir / "trajectories" / f"{system}.jsonl", trajectories)
    return run_dir


def cost(phase: str) -> dict[str, Any]:
    """What a phase took on a GPU."""
    seconds, sampled = {"index": (15.2, 0), "sft": (130.4, 0), "rl": (3725.0, 745_000), "eval": (61.0, 92_720)}[phase]
    memory = {"device_bytes": (9 if phase == "index" else 21) * 2**30, "host_bytes": 11 * 2**29}
    return {"phase": phase, "seconds": seconds, "sampled": sampled, "devices": "1 x NVIDIA H100"} | memory


def metrics(phase: str) -> list[dict[str, Any]]:
    """Noisy learning curves: 400 steps of SFT or 40 iterations of RL."""
    noise = random.Random(phase)
    if phase == "sft":
        return [
            {
                "phase": "sft",
                "step": i,
                "time_s": 0.3 * i,
                "tokens_per_s": 4000 + noise.gauss(0, 90),
            }
            | {"loss": 0.12 + 5 * math.exp(-i / 40) * noise.uniform(0.8, 1.2), "grad_norm": 1.0}
            | {"accuracy": 0.97 - 0.9 * math.exp(-i / 50)}
            for i in range(400)
        ]
    rows = []
    for i in range(40):
        progress = 1 - math.exp(-i / 12)
        row = {
            "phase": "rl",
            "step": i,
            "time_s": 9.0 * i,
            "tokens_per_s": 5000 + noise.gauss(0, 200),
        }
        row |= {"reward": 0.9 + 1.6 * progress + noise.gauss(0, 0.15), "kl": 0.03 * progress}
        row |= {"em": min(1.0, 0.45 + 0.3 * progress + noise.gauss(0, 0.04)), "f1": 0.6}
        row |= {"no_answer_rate": max(0.0, 0.12 - 0.1 * progress + noise.gauss(0, 0.02))}
        row |= {"format_error_rate": max(0.0, 0.05 - 0.05 * progress + noise.gauss(0, 0.005))}
        row |= {"mean_retrievals": 1.9 + 0.3 * progress + noise.gauss(0, 0.05), "sampler_gap": 1e-5}
        row |= {"entropy": 0.21 - 0.1 * progress + noise.gauss(0, 0.01), "approx_kl": 0.001}
        row |= {
            "clip_fraction": 0.02 + 0.03 * noise.random(),
            "policy_loss": 0.0,
            "value_loss": 0.4,
        }
        row |= {"explained_variance": 0.7 * progress + noise.gauss(0, 0.05)}
        rows.append(row | ({"dev_em": 0.5 + 0.24 * progress} if i % 5 == 4 else {}))
    return rows


def evaluation(system: str) -> dict[str, Any]:
    """The content of eval/<system>.json."""
    shifts = {"all": 0, "single": 8, "bridge": 2, "comparison": -1, "bridge_comparison": -3.5,
              "unseen": -2, "seen": 1.5}  # fmt: skip
    has_retrieval = system != "closed_book"

    def group(name: str) -> dict[str, Any]:
        em = EM[system] + shifts[name]
        return {
            "num": NUM_QUESTIONS if name == "all" else NUM_QUESTIONS // 4,
            "em": em,
            "f1": em + 4.2,
            "cover_em": em + 3.0,
            "retrievals": 1.95 if has_retrieval else 0.0,
            "support_found": em + 6 if has_retrieval else None,
            "tokens_per_correct": 4100 / em,
        }

    return {
        "system": system,
        "title": TITLES[system],
        "num_questions": NUM_QUESTIONS,
        "fingerprint": {"corpus": "c0", "index": "i0", "top_k": 2, "questions": "q0"},
        "groups": {name: group(name) for name in shifts},
    }


def _attempts(system: str) -> Iterable[Trajectory]:
    """Of each type: newly right, right both times, newly wrong, wrong both times."""
    outcomes = {
        "cold_start": (malformed, right, right, wrong),
        "r3rag": (right, right, no_answer, wrong),
    }[system]
    for number, kind in enumerate(TYPES):
        for place, outcome in enumerate(outcomes):
            yield outcome(question(4 * number + place, kind))


def _rollouts() -> Iterable[dict[str, Any]]:
    for iteration in range(40):
        trajectory = (malformed, wrong, right)[min(2, iteration // 15)](question(100 + iteration))
        yield trajectory_to_dict(trajectory) | {"reward": iteration / 20, "iteration": iteration}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def add_recorded(
    run_dir: Path, *, iterations: int = 40, questions: int = 1, samples: int = 4, num_steps: int = 0
) -> Path:
    """Gives a run what RL records of an iteration: where its time goes, whole groups, steps' and tokens' numbers.

    Args:
        num_steps: steps of every trajectory, long ones as a language model writes them; 0: those of `right` and others.
    """
    noise = random.Random("recorded")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["phase"] == "rl":
            row |= _timing(noise, row["step"])
    _write_lines(run_dir / "metrics.jsonl", rows)
    recorded = (
        _recorded(noise, iteration, 1000 + iteration * questions + number, sample, num_steps)
        for iteration in range(iterations)
        for number in range(questions)
        for sample in range(samples)
    )
    _write_lines(run_dir / "trajectories" / "rl.jsonl", recorded)
    return run_dir


def _timing(noise: random.Random, step: int) -> dict[str, float]:
    parts = {"prefill_s": 0.6, "decode_s": 4.1, "search_wait_s": 0.3, "score_s": 0.1, "update_s": 2.9}
    parts = {name: mean * noise.uniform(0.9, 1.1) for name, mean in parts.items()}
    parts |= {"eval_s": 2.0} if step % 5 == 4 else {}
    row = parts | {"iteration_s": sum(parts.values()) + 0.4, "checkpoint_s": 0.5 if step % 10 == 9 else 0.0}
    row |= {"rollout_wait_s": 5.2, "rollout_s": 5.4, "staleness": 0.0, "eta_s": 9.0 * (39 - step)}
    row |= {"search_p50_s": 0.004, "search_p95_s": 0.011, "search_failures": float(step == 7), "decoded_per_s": 2200.0}
    return row | {"mfu": 0.31 * noise.uniform(0.95, 1.05), "memory_bandwidth": 0.55 * noise.uniform(0.95, 1.05)}


def _recorded(noise: random.Random, iteration: int, number: int, sample: int, num_steps: int) -> dict[str, Any]:
    kind = TYPES[number % len(TYPES)]
    asked = question(number, kind)
    trajectory = (
        _long(noise, asked, num_steps) if num_steps else (malformed, wrong, right, no_answer)[sample % 4](asked)
    )
    row = trajectory_to_dict(trajectory) | {"sample_index": sample, "iteration": iteration}
    for step in row["steps"]:
        text = " ".join(step.get(name, "") for name in ("analysis", "query", "answer")).strip()
        tokens = [word if place == 0 else f" {word}" for place, word in enumerate(text.split(" "))]
        step |= {"reward": round(noise.uniform(-0.2, 1), 4), "advantage": round(noise.gauss(0, 1), 4), "tokens": tokens}
        step["logprobs"] = [round(-noise.expovariate(2), 4) for _ in tokens]
        if sample == 2:
            step["advantages"] = [round(step["advantage"] + noise.gauss(0, 0.1), 4) for _ in tokens]
    return row | {"reward": sum(step["reward"] for step in row["steps"])}


def _long(noise: random.Random, asked: Question, num_steps: int) -> Trajectory:
    """Steps of 40 words with three passages of 100 words, as a language model with Wikipedia writes and reads them."""
    words = "the author was born in a harbour town where her novel about glass and rivers had been filmed twice".split()

    def text(length: int) -> str:
        return " ".join(noise.choice(words) for _ in range(length))

    def passages(step: int) -> tuple[Passage, ...]:
        ids = [noise.randrange(3000) for _ in range(3)]
        return tuple(
            Passage(f"w{id}", f'"Title {id}"\n{random.Random(id).choice(words)} {" ".join(words * 5)} {id}')
            for id in ids
        )

    searching = [Step(text(40), query=text(8), passages=passages(k)) for k in range(num_steps - 1)]
    return Trajectory(asked, (*searching, Step(text(40), answer="Orvessa")), Status.ANSWERED)
