"""What counts as a verdict in a judge's reply. Whatever is not spelled out as asked has failed: nothing is guessed."""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["relevance", "correctness", "candidates"]

LABELS: dict[Kind, str] = {"relevance": "relevance", "correctness": "correct", "candidates": "candidates"}
EXAMPLES: dict[Kind, str] = {  # a line of a reply
    "relevance": "Relevance: 0.7",
    "correctness": "Correct: yes",
    "candidates": "Candidates: Paris | Lyon",
}
_MARKUP = " \t*_`\"'"  # around a candidate
_LINE_ENDS = re.compile(r"\r\n|\r|\n")  # str.splitlines has more, which a quoted passage may hold
WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
_LINES: dict[Kind, re.Pattern[str]] = {
    kind: re.compile(rf"[\s>#*_`\"'{{-]*{label}(?:[ _]score)?[\s*_`\"']*[:=](?P<value>.*)", re.IGNORECASE)
    for kind, label in LABELS.items()
}
_VALUES: dict[Kind, re.Pattern[str]] = {
    "relevance": re.compile(r"[\s*_`\"']*(?P<value>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:\s*/\s*1(?:\.0+)?)?[\s*_`\"'}.,]*"),
    "correctness": re.compile(r"[\s*_`\"']*(?P<value>yes|no|true|false)[\s*_`\"'}.,]*", re.IGNORECASE),
}


def read_verdict(reply: str, kind: Kind) -> float | None:
    """The verdict in [0, 1] at the end of a judge's reply, or None: the reply has failed.

    A reply must contain one line `Relevance: 0.7` (a number from 0 to 1), or `Correct: yes` (yes and true are 1, no and
    false are 0), with nothing else on the line. These variants are accepted:

        **Relevance:** 0.85     _Relevance_: **0.85**     - Relevance score: 0.8.     ## relevance = .8
        > Relevance: 1 / 1      "relevance": 0.8,         {"relevance": 0.8}          `Correct`: **Yes**

    that is: any case, Markdown and quotes around label and value, `score` after the label, `=` for the colon, `/ 1`
    after the number, a full stop. Other lines may hold anything; text before `</think>` is not part of the answer.

    A reply fails if it has no such line, if a line with the label holds something else ("Relevance: 8/10", "-0.5",
    "1.2", "high", "0.8 or so", "80%", "0,8"), or if two such lines disagree.
    """
    values = {_read_value(text, kind) for text in _labelled(reply, kind)}
    return values.pop() if len(values) == 1 else None


def read_candidates(reply: str) -> tuple[str, ...] | None:
    """The candidate answers at the end of a judge's reply, or None: the reply has failed.

    A reply must contain one line `Candidates: Paris | Lyon` with at least one of them, or several equal lines. Markdown
    and quotes around a candidate are removed.
    """
    lines = {
        tuple(filter(None, (c.strip(_MARKUP) for c in text.split("|")))) for text in _labelled(reply, "candidates")
    }
    return (lines.pop() or None) if len(lines) == 1 else None


def is_verdict_line(line: str) -> bool:
    """Whether a line begins with the label of a verdict of any kind."""
    return any(pattern.fullmatch(line) for pattern in _LINES.values())


def _labelled(reply: str, kind: Kind) -> list[str]:
    """What follows the label, in each line that begins with it; text before `</think>` does not count."""
    answer = reply.rpartition("</think>")[2]
    if "<think>" in answer:  # the reply ends before the thinking does
        return []
    return [match["value"] for line in _LINE_ENDS.split(answer) if (match := _LINES[kind].fullmatch(line))]


def _read_value(text: str, kind: Kind) -> float | None:
    match = _VALUES[kind].fullmatch(text)
    if match is None:
        return None
    value = WORDS[match["value"].lower()] if kind == "correctness" else float(match["value"])
    return value if 0 <= value <= 1 else None
