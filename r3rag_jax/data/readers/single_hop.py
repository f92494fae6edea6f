"""Natural Questions, TriviaQA, PopQA and Bamboogle as their authors release them, and as the hub's copies hold them.

Released: github.com/google-research-datasets/natural-questions (v1.0, full and simplified; NQ-open), DPR's files of
both, nlp.cs.washington.edu/triviaqa (`wikipedia-dev.json`, …), github.com/AlexTMallen/adaptive-retrieval (`popQA.tsv`),
github.com/ofirpress/self-ask (Bamboogle, a CSV).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from r3rag_jax.data.decomposition import parsed
from r3rag_jax.data.fields import FieldError, Row, as_rows, get_field, get_id, get_text, get_texts, show
from r3rag_jax.data.readers.flashrag import golden_answers
from r3rag_jax.types import Question

YES_NO = {
    "YES": "yes",
    "NO": "no",
    "1": "yes",
    "0": "no",
}  # NONE and -1: the annotator answered with text, or not at all


def _answers(texts: Iterable[str]) -> tuple[str, ...]:
    """The accepted answers, each once and in order; a FieldError says that there are none."""
    found = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not found:
        raise FieldError("a question must have an answer; got none")
    return found


# -------------------------------------------------------------------------------- Natural Questions


def nq_released(row: Row, default_id: str | None) -> Question:
    """Parse v1.0, `{example_id, question_text, document_text or document_tokens, annotations}`.

    The accepted answers are the short answers of all annotators, and yes or no; a question that has only long ones has
    none.
    """
    if "document_text" in row:  # the simplified files
        tokens = get_text(row, "document_text").split(" ")
    else:
        tokens = _tokens(_rows(row, "document_tokens", ("token", "html_token")), "html_token")
    return Question(get_id(row, "example_id"), get_text(row, "question_text"), _nq_answers(row, tokens), {})


def nq_hub(row: Row, default_id: str | None) -> Question:
    """Parse the hub's copy, `{id, question: {text}, document: {tokens}, annotations}`."""
    tokens = _tokens(_rows(get_field(row, "document", dict), "tokens", ("token", "is_html")), "is_html")
    return Question(get_id(row, "id"), get_text(get_field(row, "question", dict), "text"), _nq_answers(row, tokens), {})


def _tokens(rows: Iterable[Row], is_html: str) -> list[str]:
    """The tokens of a document; each of HTML as "<>"."""
    return ["<>" if row[is_html] else str(row["token"]) for row in rows]


def _nq_answers(row: Row, tokens: Sequence[str]) -> tuple[str, ...]:
    """The short answers of `row["annotations"]`; tokens of HTML, such as <P>, are left out."""
    texts = []
    for annotation in _rows(row, "annotations", ("short_answers", "yes_no_answer")):
        for span in _rows(annotation, "short_answers", ("start_token", "end_token")):
            start, end = (get_field(span, name, int) for name in ("start_token", "end_token"))
            if not 0 <= start < end <= len(tokens):
                raise FieldError(f"a short answer must be among {len(tokens)} tokens; got those from {start} to {end}")
            words = [token for token in tokens[start:end] if not (token.startswith("<") and token.endswith(">"))]
            texts.append(" ".join(words))
        texts.append(YES_NO.get(str(annotation["yes_no_answer"]), ""))
    return _answers(texts)


def _rows(row: Row, name: str, names: Sequence[str]) -> list[Row]:
    """`row[name]`, a list of objects with the fields `names`, or one object with a list a field; empty for null."""
    value = as_rows(row.get(name), names)
    rows = [] if value is None else value
    if not isinstance(rows, list) or not all(isinstance(item, Mapping) and item.keys() >= set(names) for item in rows):
        raise FieldError(f"{name} must be a list of objects with the fields {', '.join(names)}; got {show(value)}")
    return rows


def dpr(row: Row, default_id: str | None) -> Question:
    """Parse DPR's `{question, answers, positive_ctxs, …}`, also of TriviaQA; the passages are left out."""
    return Question(str(default_id), get_text(row, "question"), golden_answers(row), {})


# ----------------------------------------------------------------------------------------- TriviaQA


def trivia_released(row: Row, default_id: str | None) -> Question:
    """Parse `{QuestionId, Question, Answer: {Value, Aliases, HumanAnswers?, Type?}}`."""
    answer = get_field(row, "Answer", dict)
    texts = [get_text(answer, "Value"), *get_texts(answer, "Aliases"), *get_texts(answer, "HumanAnswers")]
    return _trivia(get_id(row, "QuestionId"), get_text(row, "Question"), texts, answer.get("Type"))


def trivia_hub(row: Row, default_id: str | None) -> Question:
    """Parse the hub's copy, `{question_id, question, answer: {value, aliases, type}}`."""
    answer = get_field(row, "answer", dict)
    texts = [get_field(answer, "value", str, default="") or "", *get_texts(answer, "aliases")]
    return _trivia(get_id(row, "question_id"), get_text(row, "question"), texts, answer.get("type"))


def _trivia(id: str, question: str, texts: list[str], kind: Any) -> Question:
    return Question(id, question, _answers(texts), {"type": kind} if isinstance(kind, str) and kind else {})


# ---------------------------------------------------------------------------------- PopQA, Bamboogle


def popqa(row: Row, default_id: str | None) -> Question:
    """Parse `{id, question, possible_answers, prop, s_wiki_title, s_pop}`; the type is the relation asked for.

    `possible_answers` is a list, or its JSON text, as in the TSV.
    """
    possible = parsed(row.get("possible_answers"))
    metadata: dict[str, Any] = {}
    if relation := get_field(row, "prop", str, default=""):
        metadata["type"] = relation
    if title := get_field(row, "s_wiki_title", str, default=""):
        metadata |= {"supporting_titles": [title], "hops": 1}
    if (views := row.get("s_pop")) not in (None, ""):
        metadata["s_pop"] = _whole_number(views)
    answers = _answers(get_texts({"possible_answers": possible}, "possible_answers"))
    return Question(
        get_id(row, "id"), get_text(row, "question"), answers, {k: v for k, v in metadata.items() if v != ""}
    )


def _whole_number(value: Any) -> int:
    """How often a page was viewed, which a table holds as text."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        raise FieldError(f"s_pop must be a number; got {show(value)}") from None


def bamboogle(row: Row, default_id: str | None) -> Question:
    """Parse `{Question, Answer}`."""
    return Question(str(default_id), get_text(row, "Question"), golden_answers({"answer": row["Answer"]}), {"hops": 2})
