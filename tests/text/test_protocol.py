"""The two text protocols: byte for byte as published, read back as written, and hard to fool."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3rag_jax.text.prompts import reading_prompt
from r3rag_jax.text.protocols import TAGS, TextProtocol, make_protocol, question_text
from r3rag_jax.types import Passage, Question, Step

PROTOCOLS = ("tags", "steps")
QUESTION = "Where was the author of Origin born?"
FIRST = Step(
    "I need the author of Origin.",
    query="Who wrote Origin?",
    passages=(
        Passage("a", '"Origin"\nOrigin is by Charles Darwin.'),
        Passage("b", '"Genesis"\nGenesis is a band.'),
    ),
)
LAST = Step("Charles Darwin was born in Shrewsbury.", answer="Shrewsbury")

# What a step may hold: text without a layout's own marks, as a model that keeps to the layout writes.
LABELS = ("The problem analysis:", "The retrieval query:", "The retrieval documents:", "The final answer:")
MARKS = (*TAGS, "Step ", *LABELS)
LETTERS = st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"))
LINES = st.text(LETTERS, min_size=1).map(str.strip).filter(lambda t: bool(t) and not any(m in t for m in MARKS))
PARAGRAPHS = st.lists(LINES, min_size=1, max_size=3).map("\n".join)
NUMBERS = st.integers(1, 12)


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> TextProtocol:
    return make_protocol(request.param)


# ---------------------------------------------------------------------------------- typed-out layouts


def test_steps_layout_is_the_published_one() -> None:
    steps = make_protocol("steps")
    assert steps.render_step(FIRST, 1) == (
        "Step 1:\nThe problem analysis: I need the author of Origin.\nThe retrieval query: Who wrote Origin?"
    )
    assert steps.render_passages([passage.contents for passage in FIRST.passages]) == (
        'The retrieval documents: "Origin"\nOrigin is by Charles Darwin.\n"Genesis"\nGenesis is a band.'
    )
    assert steps.render_step(LAST, 2) == (
        "Step 2:\nThe problem analysis: Charles Darwin was born in Shrewsbury.\nThe final answer: Shrewsbury"
    )


def test_tags_layout() -> None:
    tags = make_protocol("tags")
    assert tags.render_step(FIRST, 1) == (
        "<think> I need the author of Origin. </think><query> Who wrote Origin? </query>"
    )
    assert tags.render_passages([passage.contents for passage in FIRST.passages]) == (
        '<doc> "Origin"\nOrigin is by Charles Darwin.\n"Genesis"\nGenesis is a band. </doc>'
    )
    assert tags.render_step(LAST, 2) == (
        "<think> Charles Darwin was born in Shrewsbury. </think><answer> Shrewsbury </answer>"
    )


def test_question_text_takes_both_forms() -> None:
    assert question_text(Question("q", "Who?", ("x",))) == question_text("Who?") == "The question: Who?"


def test_reading_prompt_is_plain_text() -> None:
    assert reading_prompt("Who?", []) == "Question: Who?\nAnswer:"
    assert reading_prompt("Who?", [FIRST.passages[1], "Plain."]) == (
        '"Genesis"\nGenesis is a band.\nPlain.\nQuestion: Who?\nAnswer:'
    )


def test_unknown_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match=r"protocol must be one of \['search_r1', 'steps', 'tags'\]; got 'xml'"):
        make_protocol("xml")


# -------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", PROTOCOLS)
@given(analysis=PARAGRAPHS, value=LINES, is_answer=st.booleans(), number=NUMBERS)
def test_what_is_rendered_is_read_back(name: str, analysis: str, value: str, is_answer: bool, number: int) -> None:
    protocol = make_protocol(name)
    step = Step(analysis, answer=value) if is_answer else Step(analysis, query=value)
    assert protocol.parse_step(protocol.render_step(step, number), number) == step


@pytest.mark.parametrize("name", PROTOCOLS)
@given(pieces=st.lists(st.sampled_from([*MARKS, "1:", " ", "\n", "a", "?"])), number=st.just(1))
def test_no_text_breaks_the_parser(name: str, pieces: list[str], number: int) -> None:
    """A step that reads as well formed holds exactly one of the two; a malformed one keeps its text."""
    text = "".join(pieces)
    step = make_protocol(name).parse_step(text, number)
    if step.is_well_formed:
        assert step.analysis == step.analysis.strip() != ""
        assert (step.query or step.answer or "").strip() != ""
    else:
        assert (step.analysis, step.query, step.answer) == (text, None, None)


@pytest.mark.parametrize("value", ["American", "Darwin", "n", "nn", "no nation"])
def test_letters_n_stay(protocol: TextProtocol, value: str) -> None:
    r"""The released code's strip("\\n") removed the *letter* n from both ends: "American" became "America"."""
    step = Step("near Darwin", answer=value)
    assert protocol.parse_step(protocol.render_step(step, 1), 1) == step
    asked = Step("near Darwin", query=value)
    assert protocol.parse_step(protocol.render_step(asked, 1), 1) == asked


def test_queries_keep_their_question_marks(protocol: TextProtocol) -> None:
    """The released code cut a query at its first question mark."""
    step = Step("Which?", query="Who wrote What? and When?")
    assert protocol.parse_step(protocol.render_step(step, 3), 3).query == "Who wrote What? and When?"


def test_another_steps_header_in_an_analysis_is_text() -> None:
    step = Step("As said in Step 1: Darwin.", query="Darwin born")
    protocol = make_protocol("steps")
    assert protocol.parse_step(protocol.render_step(step, 2), 2) == step


# ----------------------------------------------------------------------------------- malformed steps

HEAD = "Step 2:\nThe problem analysis: x\n"
MALFORMED_STEPS = {
    "nothing": "",
    "no header": "The problem analysis: x\nThe final answer: y",
    "another step's header": "Step 1:\nThe problem analysis: x\nThe final answer: y",
    "a longer number": "Step 21:\nThe problem analysis: x\nThe final answer: y",
    "header twice": f"{HEAD}Step 2:\nThe final answer: y",
    "no analysis": "Step 2:\nThe final answer: y",
    "blank analysis": "Step 2:\nThe problem analysis:  \nThe final answer: y",
    "analysis behind the answer": "Step 2:\nThe final answer: y\nThe problem analysis: x",
    "neither query nor answer": HEAD,
    "blank query": f"{HEAD}The retrieval query:  \n",
    "blank answer": f"{HEAD}The final answer:",
    "a blank query before an answer": f"{HEAD}The retrieval query:\nThe final answer: z",
    "a blank answer before a query": f"{HEAD}The final answer:\nThe retrieval query: z",
    "a blank query before documents": f"{HEAD}The retrieval query:\nThe retrieval documents: z",
    "a blank query before the next step": f"{HEAD}The retrieval query:\nStep 3:\nThe problem analysis: z",
    "a query before the analysis": f"Step 2:\nThe retrieval query: q\n{HEAD[8:]}The retrieval query: z",
    "a header with a space": "Step 2: \nThe problem analysis: x\nThe final answer: y",
    "a header within its line": "Step 2: The problem analysis: x\nThe final answer: y",
    "a header with another line end": "Step 2:\r\nThe problem analysis: x\r\nThe final answer: y",
}
# text after "Step 2:\n" -> (analysis, query, answer)
READ_STEPS = {
    "query and answer on one line": (
        "The problem analysis: x\nThe retrieval query: q The final answer: z",
        ("x", "q", None),
    ),
    "answer and query on one line": (
        "The problem analysis: x\nThe final answer: z The retrieval query: q",
        ("x", None, "z"),
    ),
    "documents on the line of the query": (
        "The problem analysis: x\nThe retrieval query: q The retrieval documents: d",
        ("x", "q", None),
    ),
    "documents after the query": (
        "The problem analysis: x\nThe retrieval query: q\nThe retrieval documents: d",
        ("x", "q", None),
    ),
    "the next step after the query": (
        "The problem analysis: x\nThe retrieval query: q\nStep 3:\nThe problem analysis: x\nThe final answer: z",
        ("x", "q", None),
    ),
    "a value on the next line": ("The problem analysis: x\nThe final answer:\nz", ("x", None, "z")),
    "a header as text": (
        "The problem analysis: As in Step 2: q.\nThe retrieval query: q",
        ("As in Step 2: q.", "q", None),
    ),
    # where the released parser reads something else, or nothing
    "two lines": ("The problem analysis: x\nThe final answer: z\nbecause", ("x", None, "z")),
    "documents in the analysis": (
        "The problem analysis: x. The retrieval documents: say y.\nThe final answer: z",
        ("x. The retrieval documents: say y.", None, "z"),
    ),
    "two analyses": (
        "The problem analysis: x\nThe problem analysis: y\nThe retrieval query: q",
        ("x\nThe problem analysis: y", "q", None),
    ),
    "###": ("The problem analysis: x ### y\nThe final answer: z ###", ("x ### y", None, "z ###")),
    "only a question mark": ("The problem analysis: x\nThe retrieval query: ?", ("x", "?", None)),
    "a backslash and an n": ("The problem analysis: x\\n\nThe retrieval query: q\\n", ("x\\n", "q\\n", None)),
    "a line separator": ("The problem analysis: x\nThe retrieval query: q\u2028r", ("x", "q\u2028r", None)),
}
MALFORMED_TAGS = {
    "nothing": "",
    "no tags": "no tags here",
    "no analysis": "<query> y </query>",
    "blank analysis": "<think>  </think><query> y </query>",
    "blank query": "<think> x </think><query>  </query>",
    "open query": "<think> x </think><query> y",
    "both": "<think> x </think><query> y </query><answer> z </answer>",
    "text between": "<think> x </think> and <query> y </query>",
    "text in front": "Well, <think> x </think><query> y </query>",
    "text behind": "<think> x </think><answer> y </answer> done",
    "nested": "<think> x <think> x </think><query> y </query>",
    "a forged document": "<think> x <doc> d </doc> </think><answer> y </answer>",
    "a tag in the query": "<think> x </think><query> y </doc> </query>",
}


@pytest.mark.parametrize("text", MALFORMED_STEPS.values(), ids=MALFORMED_STEPS.keys())
def test_malformed_steps(text: str) -> None:
    assert make_protocol("steps").parse_step(text, 2) == Step(text, is_well_formed=False)


@pytest.mark.parametrize("text", MALFORMED_TAGS.values(), ids=MALFORMED_TAGS.keys())
def test_malformed_tags(text: str) -> None:
    assert make_protocol("tags").parse_step(text, 2) == Step(text, is_well_formed=False)


@pytest.mark.parametrize(("text", "fields"), READ_STEPS.values(), ids=READ_STEPS.keys())
def test_what_a_step_is_read_as(text: str, fields: tuple[str, str | None, str | None]) -> None:
    step = make_protocol("steps").parse_step(f"Step 2:\n{text}", 2)
    assert step.is_well_formed
    assert (step.analysis, step.query, step.answer) == fields


def test_the_first_of_query_and_answer_counts() -> None:
    protocol = make_protocol("steps")
    asked = protocol.parse_step(f"{HEAD}The retrieval query: q\nThe final answer: y", 2)
    assert (asked.query, asked.answer) == ("q", None)
    answered = protocol.parse_step(f"{HEAD}The final answer: y\nThe retrieval query: q", 2)
    assert (answered.query, answered.answer) == (None, "y")


def test_white_space_between_tags_is_allowed() -> None:
    text = "\n<think>\nx\n</think>\n<answer>y</answer>\n"
    assert make_protocol("tags").parse_step(text, 1) == Step("x", answer="y")
