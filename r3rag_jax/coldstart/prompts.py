"""What the teacher is asked for one step of Algorithm 1 (arXiv 2505.23794); the wording is our own.

A reply is one step in the text of the protocol `steps`, which the policy's cold start may then render in any protocol.
"""

from __future__ import annotations

import re
from pathlib import Path

from r3rag_jax.errors import UserError

FIELDS = ("transcript", "step", "max_steps")
TEACHER_PROMPT = """\
You answer a question that needs several facts, with a search engine over an encyclopedia. You work in steps. A step \
is a short analysis, and then either one query to the search engine or the final answer.

Rules:
- Write one step: the one that is asked for at the end. Nothing stands before or after it, and nothing is in bold.
- The analysis says in one to three sentences what the documents so far have shown and what has to be found out next. \
Go by the documents, not by memory. Where they do not hold what was searched for, say so and search with other words.
- A query asks for one fact. It names people, works and places in full, never "he" or "this film", and no query is \
asked twice.
- As soon as the documents hold all that is needed, give the final answer: a name, a date, a number, yes or no, or a \
few words, as short as can be, without a sentence around it.
- There are at most {max_steps} steps; the last one gives the final answer.

Example, of which each step was asked for by itself:

The question: Where was the engineer born whose company built the Eiffel Tower?
Step 1:
The problem analysis: Nothing is known yet. First I have to find out whose company built the Eiffel Tower.
The retrieval query: Whose company built the Eiffel Tower?
The retrieval documents: "Eiffel Tower"
Tower in Paris, built from 1887 to 1889 by the company of Gustave Eiffel.
Step 2:
The problem analysis: The company of Gustave Eiffel built the tower. Where he was born is still missing.
The retrieval query: Where was Gustave Eiffel born?
The retrieval documents: "Gustave Eiffel"
French engineer, born in Dijon in 1832.
Step 3:
The problem analysis: Gustave Eiffel was born in Dijon, which answers the question.
The final answer: Dijon

Now your question, with the steps so far:

{transcript}

Write step {step} of at most {max_steps}. Begin with the line "Step {step}:", then "The problem analysis:", then \
either "The retrieval query:" or "The final answer:"."""
LAST_STEP = ' This is the last step: it must hold "The final answer:".'


def read_template(path: str) -> str:
    """The template in a file; the built-in one where `path` is empty.

    Raises:
        UserError: the file cannot be read, or has no {transcript}.
    """
    if not path:
        return TEACHER_PROMPT
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"coldstart.prompt must be a text file; {path} cannot be read: {error}") from None
    if "{transcript}" not in text:
        raise UserError(f"coldstart.prompt must hold {{transcript}}, question and steps so far; {path} does not")
    return text


def step_prompt(template: str, transcript: str, step: int, max_steps: int) -> str:
    """The prompt for step number `step` (from 1) after a transcript, filled in in one pass."""
    fields = {"transcript": transcript, "step": str(step), "max_steps": str(max_steps)}
    prompt = re.sub(rf"\{{({'|'.join(FIELDS)})\}}", lambda match: fields[match[1]], template)
    return prompt + (LAST_STEP if step == max_steps else "")
