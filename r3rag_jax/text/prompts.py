"""Prompts of the baselines: base models continue plain text; chat models get an instruction with examples."""

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
    return f"{_listed(passages)}Question: {question}\nAnswer:"


def instruction_prompt(question: str, passages: Sequence[Passage | str]) -> str:
    """The last user message for a chat model; it follows the turns of `example_turns`."""
    given = f"Documents:\n{_listed(passages)}\n" if passages else ""
    return f"{given}{INSTRUCTION}\nQuestion: {question}"


def example_turns(with_documents: bool) -> Turns:
    """Few-shot chat turns, with or without documents; they show a small chat model how short an answer is."""
    turns: Turns = []
    for document, question, answer in EXAMPLES:
        prompt = instruction_prompt(question, [document] if with_documents else [])
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return turns


# ------------------------------------------------------------------------------------------- IRCoT

ANSWER_MARK = "So the answer is:"
CHAIN_INSTRUCTION = (
    "Answer the question step by step. Write short sentences, each with one fact that the question needs. "
    f'End with "{ANSWER_MARK}" and a name, a number or a few words only.'
)
CHAIN_EXAMPLES = (
    (
        (
            '"Eiffel Tower"\nTower in Paris, built from 1887 to 1889 by the company of Gustave Eiffel.',
            '"Gustave Eiffel"\nFrench engineer, born in Dijon in 1832.',
        ),
        "Where was the engineer born whose company built the Eiffel Tower?",
        ("The Eiffel Tower was built by the company of Gustave Eiffel.", "Gustave Eiffel was born in Dijon."),
        "Dijon",
    ),
    (
        ('"Nile"\nRiver in Africa, some 6,650 km long.', '"Thames"\nRiver in England, 346 km long.'),
        "Which of the two is longer: the Nile or the Thames?",
        ("The Nile is some 6,650 km long.", "The Thames is 346 km long."),
        "Nile",
    ),
)


def chain_reading_prompt(question: str, passages: Sequence[Passage | str], sentences: Sequence[str]) -> str:
    """IRCoT's prompt for a base model: examples, then the question's passages and the chain of thought so far."""
    examples = "".join(
        f"{chain_frame(asked, documents, thoughts)} {ANSWER_MARK} {answer}\n\n"
        for documents, asked, thoughts, answer in CHAIN_EXAMPLES
    )
    return examples + chain_frame(question, passages, sentences)


def chain_instruction_prompt(question: str, passages: Sequence[Passage | str]) -> str:
    """IRCoT's last user message for a chat model, after `chain_example_turns`; the chain of thought opens the reply."""
    return f"Documents:\n{_listed(passages)}\n{CHAIN_INSTRUCTION}\nQuestion: {question}"


def chain_example_turns() -> Turns:
    """IRCoT's few-shot chat turns; each reply is a complete chain of thought with its answer."""
    turns: Turns = []
    for documents, question, sentences, answer in CHAIN_EXAMPLES:
        turns += [
            {"role": "user", "content": chain_instruction_prompt(question, documents)},
            {"role": "assistant", "content": f"{' '.join(sentences)} {ANSWER_MARK} {answer}"},
        ]
    return turns


def chain_frame(question: str, passages: Sequence[Passage | str], sentences: Sequence[str]) -> str:
    """The end of IRCoT's prompt for a base model, which asks the question."""
    chain = "".join(f" {sentence}" for sentence in sentences)
    return f"{_listed(passages)}Question: {question}\nReasoning:{chain}"


def _listed(passages: Sequence[Passage | str]) -> str:
    return "".join(f"{p.contents if isinstance(p, Passage) else p}\n" for p in passages)
