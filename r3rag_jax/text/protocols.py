"""The text protocols of a trajectory, `tags`, `steps` and `search_r1`: rendering and parsing.

`steps` is byte for byte the format of the published R3-RAG checkpoints (arXiv 2505.23794): each step is an assistant
turn of its own, and the user message holds the history. `tags` is the format in the paper's figure: one growing
assistant turn, with documents inserted after `</query>`. `search_r1` is the format of the published Search-R1
checkpoints (arXiv 2503.09516): one growing assistant turn, too, in which tags are ordinary text.

A protocol works on text; `transcript.py` converts the text to token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from r3rag_jax.types import Question, Step

TAGS = ("<think>", "</think>", "<query>", "</query>", "<doc>", "</doc>", "<answer>", "</answer>")


class TextProtocol(Protocol):
    """The text format of a trajectory: renders steps and passages, and parses steps."""

    @property
    def name(self) -> str:
        """`tags`, `steps` or `search_r1`."""
        ...

    @property
    def is_one_sequence(self) -> bool:
        """True: a trajectory is one sequence with inserted documents; False: each step is a chat turn of its own."""
        ...

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """Special tokens that end a step, in addition to the end of turn."""
        ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Text that ends a step, wherever in a token it ends."""
        ...

    @property
    def splices_ids(self) -> bool:
        """In one sequence: whether passages are encoded one by one, between tags that are special tokens.

        False: what is inserted is encoded as one text.
        """
        ...

    def user_message(self, question: str) -> str:
        """The user message that asks a question."""
        ...

    def step_pieces(self, step: Step, number: int) -> list[str]:
        """The model's text of step `number` (from 1), without passages or end of turn, in pieces.

        The first piece and every second one after it is the protocol's and may hold special tokens; the others are
        text, in which a word that spells a special token stays text.
        """
        ...

    def render_step(self, step: Step, number: int) -> str:
        """`step_pieces` as one text."""
        ...

    def render_passages(self, passages: Sequence[str]) -> str:
        """The text inserted after a query; `passages` are contents, already cut to the token budget."""
        ...

    def parse_step(self, text: str, number: int) -> Step:
        """Parse the model's text of step `number` (from 1); a malformed step has is_well_formed=False."""
        ...

    def preview_step(self, text: str, number: int) -> dict[str, str]:
        """The parts of step `number` (`analysis`, `query`, `answer`) as far as its text has been written.

        Each only grows as the text does, and begins what `parse_step` reads in the end; characters that may turn out to
        begin a tag or label are held back. In `tags`, a text that cannot become a step is the part `malformed`.
        """
        ...


def _malformed(text: str) -> Step:
    return Step(analysis=text, is_well_formed=False)


def _until(text: str, *ends: str) -> tuple[str, str]:
    """The text before the first of some ends without blanks around it, and the text from there on.

    Without any of them in the text, its last characters are left out where they may begin one.
    """
    at = min((place for end in ends if (place := text.find(end)) >= 0), default=-1)
    if at >= 0:
        return text[:at].strip(), text[at:]
    lengths = (size for end in ends for size in range(1, len(end)) if text.endswith(end[:size]))
    return text[: len(text) - max(lengths, default=0)].strip(), ""


def _cannot_begin(text: str, start: str) -> bool:
    """Whether a text neither begins with `start` nor may yet do so."""
    return not text.startswith(start) and not start.startswith(text)


def _present(**parts: str) -> dict[str, str]:
    return {name: text for name, text in parts.items() if text}


class TagsProtocol:
    """`<think>…</think><query>…</query><doc>…</doc>…<think>…</think><answer>…</answer>`.

    A space follows each opening tag and precedes each closing tag, so that a word next to a tag has the same token
    as inside a sentence. Passages are joined by newlines.
    """

    name = "tags"
    is_one_sequence = True
    stop_tokens = ("</query>", "</answer>")
    stop_strings: tuple[str, ...] = ()
    splices_ids = True
    _step = re.compile(
        r"\s*<think>(?P<analysis>.*?)</think>\s*"
        r"(?:<query>(?P<query>.*?)</query>|<answer>(?P<answer>.*?)</answer>)\s*",
        re.DOTALL,
    )

    def user_message(self, question: str) -> str:
        return question_text(question)

    def step_pieces(self, step: Step, number: int) -> list[str]:
        tag, value = ("query", step.query) if step.answer is None else ("answer", step.answer)
        return ["<think>", f" {step.analysis} ", f"</think><{tag}>", f" {value} ", f"</{tag}>"]

    def render_step(self, step: Step, number: int) -> str:
        return "".join(self.step_pieces(step, number))

    def render_passages(self, passages: Sequence[str]) -> str:
        return "<doc> " + "\n".join(passages) + " </doc>"

    def parse_step(self, text: str, number: int) -> Step:
        match = self._step.fullmatch(text)
        if match is None:
            return _malformed(text)
        fields = {name: value.strip() for name, value in match.groupdict().items() if value is not None}
        nested = any(tag in value for value in fields.values() for tag in TAGS)
        if nested or not all(fields.values()):
            return _malformed(text)
        return Step(fields["analysis"], query=fields.get("query"), answer=fields.get("answer"))

    def preview_step(self, text: str, number: int) -> dict[str, str]:
        if _cannot_begin(text.lstrip(), "<think>"):
            return {"malformed": text}
        analysis, rest = _until(text.partition("<think>")[2], "</think>")
        rest = rest.removeprefix("</think>").lstrip()
        for tag in ("query", "answer"):
            if rest.startswith(f"<{tag}>"):
                return _present(analysis=analysis, **{tag: _until(rest.removeprefix(f"<{tag}>"), f"</{tag}>")[0]})
        return _present(analysis=analysis)


class StepsProtocol:
    """The published checkpoints' format: `Step k:\\nThe problem analysis: …\\nThe retrieval query: …`."""

    name = "steps"
    is_one_sequence = False
    stop_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    splices_ids = False
    _query = "The retrieval query:"
    _answer = "The final answer:"
    _analysis = "The problem analysis:"
    _labels = (_query, _answer, _analysis, "The retrieval documents:")
    # What ends a query or an answer, besides the end of its line.
    _next = re.compile(
        r"^Step \d+:$|The (?:problem analysis|retrieval query|retrieval documents|final answer):", re.MULTILINE
    )

    def user_message(self, question: str) -> str:
        return question_text(question)

    def step_pieces(self, step: Step, number: int) -> list[str]:
        return ["", self.render_step(step, number)]

    def render_step(self, step: Step, number: int) -> str:
        head = f"Step {number}:\n{self._analysis} {step.analysis}\n"
        return head + (f"{self._query} {step.query}" if step.answer is None else f"{self._answer} {step.answer}")

    def render_passages(self, passages: Sequence[str]) -> str:
        return "The retrieval documents: " + "\n".join(passages)

    def parse_step(self, text: str, number: int) -> Step:
        """Parse a step, which must hold its own header exactly once, a non-empty analysis, and a query or an answer.

        The header is `Step k:` with the end of its line, so an analysis may speak of "Step k: …". Of query and answer
        the first one counts. Its value is the first line after its label, and ends earlier where another label begins:
        with nothing in between, the step is malformed. docs/concepts.md says where the released parser differs.
        """
        header = f"Step {number}:\n"
        if text.count(header) != 1:
            return _malformed(text)
        body = text.partition(header)[2]
        labels = [(body.find(label), label) for label in (self._query, self._answer) if label in body]
        if self._analysis not in body or not labels:
            return _malformed(text)
        start, label = min(labels)
        analysis = body[:start].partition(self._analysis)[2].strip()
        value = self._next.split(body[start + len(label) :], maxsplit=1)[0].strip().partition("\n")[0].strip()
        if not analysis or not value:
            return _malformed(text)
        return Step(analysis, query=value) if label == self._query else Step(analysis, answer=value)

    def preview_step(self, text: str, number: int) -> dict[str, str]:
        body = text.partition(f"Step {number}:\n")[2].partition(self._analysis)[2]
        analysis, rest = _until(body, self._query, self._answer)
        for name, label in (("query", self._query), ("answer", self._answer)):
            if rest.startswith(label):
                value = rest.removeprefix(label).lstrip()
                return _present(analysis=analysis, **{name: _until(value, "\n", *self._labels)[0]})
        return _present(analysis=analysis)


class SearchR1Protocol:
    """`<think> … </think>`, then `<search> … </search>` or `<answer> … </answer>`, as Search-R1's checkpoints write.

    The tags are ordinary text. Passages come as `Doc 1(Title: "title") text` in `<information>` after `</search>`.
    """

    name = "search_r1"
    is_one_sequence = True
    stop_tokens: tuple[str, ...] = ()
    stop_strings = ("</search>", "</answer>")
    splices_ids = False
    _action = re.compile(r"<(?P<tag>search|answer)>(?P<value>.*?)</(?P=tag)>", re.DOTALL)
    _instruction = (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get "
        "new information. After reasoning, if you find you lack some knowledge, you can call a search engine by "
        "<search> query </search> and it will return the top searched results between <information> and "
        "</information>. You can search as many times as your want. If you find no further external knowledge needed, "
        "you can directly provide the answer inside <answer> and </answer>, without detailed illustrations. For "
        "example, <answer> Beijing </answer>. Question: "
    )

    def user_message(self, question: str) -> str:
        """The instruction that the checkpoints were trained with; a question ends with a question mark."""
        question = question.strip()
        return f"{self._instruction}{question}{'' if question.endswith('?') else '?'}\n"

    def step_pieces(self, step: Step, number: int) -> list[str]:
        return ["", self.render_step(step, number)]

    def render_step(self, step: Step, number: int) -> str:
        tail = f"<search> {step.query} </search>" if step.answer is None else f"<answer> {step.answer} </answer>"
        return f"<think> {step.analysis} </think>\n{tail}"

    def render_passages(self, passages: Sequence[str]) -> str:
        lines = []
        for number, contents in enumerate(passages, 1):
            title, _, text = contents.partition("\n")
            lines.append(f"Doc {number}(Title: {title}) {text}")
        shown = "\n".join(lines).strip()
        return f"\n\n<information>{shown}</information>\n\n"

    def parse_step(self, text: str, number: int) -> Step:
        """Parse a step: the first `<search>…</search>` or `<answer>…</answer>` counts, and what stands before it.

        As in the released code nothing else is required, not even a `<think>`: checkpoints leave it out at times.
        """
        action = self._action.search(text)
        if action is None or not (value := action["value"].strip()):
            return _malformed(text)
        analysis = text[: action.start()].strip().removeprefix("<think>").removesuffix("</think>").strip()
        return Step(analysis, query=value) if action["tag"] == "search" else Step(analysis, answer=value)

    def preview_step(self, text: str, number: int) -> dict[str, str]:
        analysis, rest = _until(text, "<search>", "<answer>")
        if _cannot_begin(analysis, "<think>") or analysis.startswith("<think>"):
            analysis = _until(analysis.removeprefix("<think>"), "</think>")[0]
        else:
            analysis = ""
        for name, tag in (("query", "search"), ("answer", "answer")):
            if rest.startswith(f"<{tag}>"):
                return _present(analysis=analysis, **{name: _until(rest.removeprefix(f"<{tag}>"), f"</{tag}>")[0]})
        return _present(analysis=analysis)


def question_text(question: str | Question) -> str:
    """The question as the user message of `tags` and `steps` states it."""
    return f"The question: {question.question if isinstance(question, Question) else question}"


def make_protocol(name: str) -> TextProtocol:
    """Return the protocol named `tags`, `steps` or `search_r1`.

    Raises:
        ValueError: another name.
    """
    protocols: dict[str, TextProtocol] = {p.name: p for p in (TagsProtocol(), StepsProtocol(), SearchR1Protocol())}
    if name not in protocols:
        raise ValueError(f"protocol must be one of {sorted(protocols)}; got {name!r}")
    return protocols[name]
