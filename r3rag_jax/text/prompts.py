"""Prompts for one line of answer: base models continue plain text; chat models get an instruction with examples.

What baselines that reason are asked is in `baselines/`.
"""

from __future__ import annotations

from collections.abc import Sequence

from r3rag_jax.types import Passage

Turns = list[dict[str, str]]

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
    """The prompt for a base model: passages (none for the closed-book baseline), then the question, as plain text."""
    return f"{listed(passages)}Question: {question}\nAnswer:"


def instruction_prompt(question: str, passages: Sequence[Passage | str]) -> str:
    """The last user message for a chat model; it follows the turns of `example_turns`."""
    given = f"Documents:\n{listed(passages)}\n" if passages else ""
    return f"{given}{INSTRUCTION}\nQuestion: {question}"


def example_turns(with_documents: bool) -> Turns:
    """Few-shot chat turns, with or without documents; they show a small chat model how short an answer is."""
    turns: Turns = []
    for document, question, answer in EXAMPLES:
        prompt = instruction_prompt(question, [document] if with_documents else [])
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return turns


def listed(passages: Sequence[Passage | str]) -> str:
    """The passages as a prompt shows them, each on lines of its own."""
    return "".join(f"{p.contents if isinstance(p, Passage) else p}\n" for p in passages)
