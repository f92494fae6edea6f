"""Evaluation: questions to EM, F1, cover-EM and what they cost, for the trained policy and for baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from r3rag_jax.clients.completions import Server
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.answer import answer_metrics
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rewards.scorer import accuracy
from r3rag_jax.rollout.rollout import Job, OnDone, Player
from r3rag_jax.sampler.engine import Engine, complete_all
from r3rag_jax.text.prompts import example_turns, instruction_prompt, reading_prompt
from r3rag_jax.text.tokenizer import Tokenizer, chat_frame
from r3rag_jax.types import Context, Passage, Question, Status, Step, Trajectory

TITLES = {
    "closed_book": "Closed book",
    "oneshot_rag": "One-shot RAG",
    "cold_start": "Cold start",
    "r3rag": "R3-RAG",
}
MAX_ANSWER_TOKENS = 24


def play_greedy(
    roller: Player, policy: Any, questions: Sequence[Question], on_done: OnDone | None = None
) -> list[Trajectory]:
    """The policy's own trajectories, one per question, greedy."""
    return roller.play(policy, [Job(question) for question in questions], on_done)


def read_answers(
    engine: Engine | Server,
    tokenizer: Tokenizer,
    policy: Any,
    questions: Sequence[Question],
    retriever: Retriever | None,
    top_k: int,
    on_done: OnDone | None = None,
    *,
    chat: bool = False,
) -> list[Trajectory]:
    """The baselines: one line of answer, with one retrieval or with none.

    The prompt is plain reading ("Question: …\\nAnswer:") or, with `chat`, an instruction in the model's chat template,
    after three examples of short answers. One that outgrows the context loses its last passages.
    """
    frame = chat_frame(tokenizer, example_turns(retriever is not None)) if chat else None
    found: Sequence[tuple[Passage, ...]] = [()] * len(questions)
    if retriever is not None:
        hits = retriever.search([question.question for question in questions], top_k)
        found = [tuple(hit.passage for hit in row) for row in hits]
    contexts = [
        Context(_reading_ids(tokenizer, question, passages, engine.max_length, frame), MAX_ANSWER_TOKENS)
        for question, passages in zip(questions, found, strict=True)
    ]
    if isinstance(engine, Server):
        lines: Iterator[tuple[int, list[int]]] = ((place, line.ids) for place, line in engine.complete_all(contexts))
    else:
        lines = complete_all(engine, policy, contexts, chunk=MAX_ANSWER_TOKENS, leave_at=engine.slots)
    done: dict[int, Trajectory] = {}
    for place, ids in lines:
        done[place] = _read_trajectory(tokenizer, questions[place], found[place], ids)
        if on_done is not None:
            on_done(done[place])
    return [done[place] for place in range(len(questions))]


def reading_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a line of answer."""
    newlines = [i for text in ("\n", "\n\n") if len(ids := tokenizer.encode(text)) == 1 for i in ids]
    return tuple({*newlines, tokenizer.eos_id, tokenizer.pad_id})


def _reading_ids(
    tokenizer: Tokenizer,
    question: Question,
    passages: tuple[Passage, ...],
    max_length: int,
    frame: tuple[list[int], list[int]] | None,
) -> list[int]:
    prefix, suffix = frame or ([], [])
    prompt_of = instruction_prompt if frame else reading_prompt
    room = max_length - MAX_ANSWER_TOKENS - len(prefix) - len(suffix)
    for count in range(len(passages), -1, -1):
        ids = tokenizer.encode(prompt_of(question.question, passages[:count]), allow_special=False)
        if len(ids) <= room:
            break
    return [*prefix, *ids[-room:], *suffix]


def _read_trajectory(
    tokenizer: Tokenizer, question: Question, passages: tuple[Passage, ...], ids: list[int]
) -> Trajectory:
    text = tokenizer.decode(ids, skip_special=True).partition("\n")[0].strip()  # a token may hold more than the newline
    steps = [Step("", query=question.question, passages=passages)] if passages else []
    if not text:
        return Trajectory(question, tuple(steps), Status.NO_ANSWER)
    steps.append(Step("", answer=text))
    return Trajectory(question, tuple(steps), Status.ANSWERED, num_tokens=len(ids))


def measure(trajectories: Sequence[Trajectory], acc: np.ndarray | None = None) -> dict[str, Any]:
    """One row of a table; percentages are 0..100.

    `acc`: `rewards.scorer.accuracy` of the trajectories, where a judge was asked; those it failed on are counted apart.
    """
    scores = {name: float(100 * values.mean()) for name, values in answer_metrics(trajectories).items()}
    correct = round(scores["em"] / 100 * len(trajectories))
    found = [
        len(set(t.question.supporting_ids) & set(t.retrieved_ids)) / len(set(t.question.supporting_ids))
        for t in trajectories
        if t.question.supporting_ids
    ]
    tokens = sum(t.num_policy_tokens for t in trajectories)
    return {
        "num": len(trajectories),
        **scores,
        **({} if acc is None else _judged(acc)),
        "retrievals": float(np.mean([t.num_retrievals for t in trajectories])),
        "support_found": 100 * float(np.mean(found)) if found else None,
        "tokens_per_correct": tokens / correct if correct else None,
        "no_answer": 100 * float(np.mean([t.status != Status.ANSWERED for t in trajectories])),
    }


def _judged(acc: np.ndarray) -> dict[str, Any]:
    known = acc[np.isfinite(acc)]
    return {"acc": 100 * float(known.mean()) if len(known) else None, "judge_failures": len(acc) - len(known)}


def summarise(
    system: str, trajectories: Sequence[Trajectory], fingerprint: dict[str, Any], judge: Judge | None = None
) -> dict[str, Any]:
    """The content of `eval/<system>.json`: metrics of all questions and of each group.

    Raises:
        UserError: the judge fails too often.
    """
    acc = None if judge is None else accuracy(trajectories, judge)[0]
    groups: dict[str, list[int]] = {"all": list(range(len(trajectories)))}
    for place, trajectory in enumerate(trajectories):
        metadata = trajectory.question.metadata
        names = [str(metadata["type"])] if "type" in metadata else []
        if "unseen" in metadata:
            names.append("unseen" if metadata["unseen"] else "seen")
        for name in names:
            groups.setdefault(name, []).append(place)
    return {
        "system": system,
        "title": TITLES.get(system, system),
        "num_questions": len(trajectories),
        "fingerprint": fingerprint,
        "groups": {
            name: measure([trajectories[i] for i in places], None if acc is None else acc[places])
            for name, places in groups.items()
        },
    }


def fingerprint(questions: Iterable[Question], **parts: Any) -> dict[str, Any]:
    """What two evaluations must share to be comparable: the questions and the given parts."""
    lines = "\n".join(f"{q.id}\t{q.question}\t{q.golden_answers}" for q in questions)
    return {**parts, "questions": hashlib.sha256(lines.encode()).hexdigest()[:16]}
