"""The teacher of the encyclopedia's questions, which writes the steps of the cold start's trajectories."""

from __future__ import annotations

import random
from typing import Any

from r3rag_jax.types import Question
from r3rag_jax.world.encyclopedia import RELATIONS, Hop, asked_order, in_order


def teacher_steps(
    question: Question, rng: random.Random, *, needless_retrievals: float, lucky_guesses: float = 0.0,
    max_steps: int = 5,
) -> list[dict[str, Any]]:  # fmt: skip
    """The teacher's steps for a question: {analysis, query, passage_ids} … {analysis, answer}.

    The answer is always correct; two flaws of real teachers are imitated.

    Args:
        needless_retrievals: probability of one superfluous query, about an entity already looked up; none is added
            if it would exceed `max_steps`.
        lucky_guesses: probability that a comparison omits its last retrieval and guesses; correct guesses survive
            the rejection of wrong answers.
        max_steps: maximum number of steps.
    """
    hops = [Hop(**hop) for hop in question.metadata["decomposition"]]
    is_comparison = question.metadata["type"].endswith("comparison")
    is_guess = is_comparison and rng.random() < lucky_guesses
    if is_guess:
        hops = hops[:-1]
    steps: list[dict[str, Any]] = []
    known = ""
    is_needless = len(hops) + 2 <= max_steps and rng.random() < needless_retrievals
    needless_index = rng.randrange(len(hops)) if is_needless else -1
    for number, hop in enumerate(hops):
        lead = f"{known} Now I need" if known else "I need"
        query = RELATIONS[hop.relation].questions[0].format(x=hop.entity)
        steps.append({"analysis": f"{lead} {hop.need()}.", "query": query, "passage_ids": [hop.passage_id]})
        known = hop.fact()
        if number == needless_index:
            query = f"What is known about {hop.entity}?"
            steps.append({"analysis": f"{known} I check {hop.entity} again.", "query": query, "passage_ids": []})
    if is_comparison and not is_guess:
        first, second = hops[-2:]
        known = f"{first.fact()} {second.fact()} {in_order(asked_order(question.question), first, second)}"
    steps.append({"analysis": known, "answer": question.golden_answers[0]})
    return steps
