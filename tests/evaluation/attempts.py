"""Four trajectories with typed-out metrics."""

from __future__ import annotations

from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

DARWIN = Passage("a", '"Origin"\nOrigin was written by Charles Darwin.')
BORN = Passage("b", '"Charles Darwin"\nCharles Darwin was born in Shrewsbury.')


def question(id: str, *golds: str, **metadata: object) -> Question:
    return Question(id, f"Question {id}?", golds, metadata)


def attempt(asked: Question, answer: str | None, *passages: Passage, num_tokens: int = 10) -> Trajectory:
    """One retrieval per passage, then an answer or a malformed step."""
    steps = [Step("x", query="q", passages=(passage,)) for passage in passages]
    steps.append(Step("x", answer=answer) if answer is not None else Step("?", is_well_formed=False))
    status = Status.ANSWERED if answer is not None else Status.FORMAT_ERROR
    return Trajectory(asked, tuple(steps), status, num_tokens=num_tokens, num_input_tokens=200)


def attempts() -> list[Trajectory]:
    """Right (of two supporting passages one), right without supports, half right, none."""
    return [
        attempt(
            question("1", "The Shrewsbury", type="bridge", unseen=True, supporting_ids=["a", "b"]),
            "shrewsbury.",
            DARWIN,
        ),
        attempt(question("2", "x", "Charles Darwin", type="single", unseen=False), "Charles Darwin", num_tokens=20),
        attempt(
            question("3", "Darwin", type="bridge", unseen=False, supporting_ids=["b"]), "Charles Darwin", BORN, DARWIN
        ),
        attempt(question("4", "1809", type="bridge", unseen=True), None, num_tokens=33),
    ]
