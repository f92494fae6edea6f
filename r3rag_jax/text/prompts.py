"""Prompts of the baselines: plain reading for base models, an instruction with examples for chat models."""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.types import Passage

INSTRUCTION = "Answer the question with a name, a number or a few words only."


EXAMPLES = (
    (
        '"Eiffel Tower"\nTower in Paris, France, built from 1887 to 1889.',
        "In which country is the Eiffel Tower?",
        "France",
    ),
    ('"Titanic"\nBritish ocean liner. She sank on 15 April 1912.', "When did the Titanic sink?", "1912"),
    ('"Nile"\nRiver in Africa, some 6,650 km long.', "Which of the two is longer: the Nile or the Thames?", "Nile"),
)


def reading_prompt(question: str, passages: Sequence[Passage | str]) -> str:
    """The baselines' prompt for a base model (closed book without passages, one-shot RAG with): plain reading."""
    return f"{_listed(passages)}Question: {question}\nAnswer:"


def instruction_prompt(question: str, passages: Sequence[Passage | str]) -> str:
    """The baselines' last user message for a chat model, behind `EXAMPLES`."""
    given = f"Documents:\n{_listed(passages)}\n" if passages else ""
    return f"{given}{INSTRUCTION}\nQuestion: {question}"


def example_turns(with_documents: bool) -> list[dict[str, str]]:
    """The chat turns before it: a small chat model needs to see how short an answer is, with documents or without."""
    turns = []
    for document, question, answer in EXAMPLES:
        prompt = instruction_prompt(question, [document] if with_documents else [])
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return turns


def _listed(passages: Sequence[Passage | str]) -> str:
    return "".join(f"{p.contents if isinstance(p, Passage) else p}\n" for p in passages)
