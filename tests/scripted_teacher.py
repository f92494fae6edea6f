"""A teacher that knows the gold decompositions and errs at a known rate, by the prompt alone."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Any

from openai_server import Reply, chat

from r3rag_jax.coldstart.decomposition import hops_of
from r3rag_jax.coldstart.gold import analysis
from r3rag_jax.coldstart.teacher_env import PROTOCOL
from r3rag_jax.types import Question, Step

ASKED = re.compile(r"\nWrite step (\d+) of at most (\d+)\.")
ERRORS = ("malformed", "wrong", "endless", "chatty")  # what an attempt that errs does; `chatty` is cut off


class ScriptedTeacher:
    """Writes the steps of a question's decomposition; one attempt in 1 / error_rate goes wrong."""

    def __init__(self, questions: Iterable[Question], error_rate: float = 0.0):
        self._by_text = {question.question: question for question in questions}
        self._error_rate = error_rate

    def error(self, question: Question, attempt: object) -> str:
        """How an attempt goes wrong; empty: it does not."""
        rng = random.Random(f"{question.id} {attempt}")
        return rng.choice(ERRORS) if rng.random() < self._error_rate else ""

    def step(self, prompt: str, attempt: object) -> str:
        """The text of the step that a prompt asks for; an attempt is told from others by any value."""
        transcript = prompt.rpartition("The question: ")[2]
        question = self._by_text[transcript.partition("\n")[0]]
        (number, max_steps) = map(int, ASKED.findall(prompt)[-1])
        error, hops = self.error(question, attempt), hops_of(question)
        if error == "malformed" and number == 2:
            return f"Let me think about step {number}."
        if error == "endless" and number <= max_steps:
            return PROTOCOL.render_step(Step("I search on.", query=f"{question.question} {number}"), number)
        if number <= len(hops):
            text = analysis(question, hops, number - 1)
            return PROTOCOL.render_step(Step(text, query=hops[number - 1].queries[0]), number)
        answer = "Nobody knows" if error == "wrong" else question.golden_answers[0]
        return PROTOCOL.render_step(Step(analysis(question, hops, len(hops)), answer=answer), number)

    def reply(self, body: dict[str, Any]) -> Reply:
        """The answer to a request of `/v1/chat/completions`, with counts of four characters a token."""
        [message] = body["messages"]
        prompt, attempt = message["content"], body["temperature"]
        text = self.step(prompt, attempt)
        question = self._by_text[prompt.rpartition("The question: ")[2].partition("\n")[0]]
        is_cut_off = self.error(question, attempt) == "chatty"
        reply = chat(text, "length" if is_cut_off else "stop")
        reply["usage"] = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}
        return 200, reply
