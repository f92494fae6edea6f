"""The cold start trains on steps that the protocol reads back, and on no special token that a text spells."""

from __future__ import annotations

import pytest
import tiny

from r3rag_jax.data.records import OnError, Records
from r3rag_jax.errors import UserError
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Question, Status, Step, Trajectory

FIRST = Step("I need the author.", query="author of Origin")
LAST = Step("It is Darwin.", answer="Darwin")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def codec_of(tokenizer: Tokenizer, name: str) -> Codec:
    return Codec(tokenizer, make_protocol(name), passage_tokens=100)


def trajectory(*steps: Step) -> Trajectory:
    return Trajectory(Question("q", "Who?", ("Darwin",)), steps, Status.ANSWERED)


# protocol, a step, what the message says of it
UNREADABLE = {
    "a tag in an analysis": ("tags", Step("see </query>", query="x"), "it is read as malformed: "),
    "a document's tag in an answer": ("tags", Step("so", answer="a <doc> b"), "it is read as malformed: "),
    "a label in an analysis": (
        "steps",
        Step("The final answer: is not known", query="x"),
        'it is read as malformed: "Step 2:\\nThe problem analysis: The final answer: is not known',
    ),
    "a label later in an analysis": (
        "steps",
        Step("So. The final answer: is Darwin", query="x"),
        'its analysis is "So. The final answer: is Darwin" and is read as "So."',
    ),
    "a line end in a query": (
        "steps",
        Step("x", query="who\nwrote it"),
        'its query is "who\\nwrote it" and is read as "who"',
    ),
    "a header in an analysis": ("steps", Step("As in\nStep 2:\nwe look", query="x"), "it is read as malformed: "),
}


@pytest.mark.parametrize(("name", "step", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_step_that_cannot_be_read_back_is_named(tokenizer: Tokenizer, name: str, step: Step, reason: str) -> None:
    codec = codec_of(tokenizer, name)
    fault = codec.unreadable_step(trajectory(FIRST, step, LAST))
    assert fault is not None
    assert fault.startswith(f"step 2 must be read back as it is written (rollout.protocol={name}); {reason}")


@pytest.mark.parametrize("name", ["tags", "steps"])
@pytest.mark.parametrize(
    "step",
    [
        Step("two lines\n\nand a tab\t", query=" who? "),  # white space at the ends is no matter
        Step("As in Step 1: we look. < query >", query="x"),
        Step("The token <|im_end|> ends a turn.", answer="<|im_end|>"),
    ],
)
def test_a_step_that_can_be_read_back_is_none(tokenizer: Tokenizer, name: str, step: Step) -> None:
    assert codec_of(tokenizer, name).unreadable_step(trajectory(FIRST, step)) is None


def test_a_text_that_the_tokenizer_normalizes_is_readable(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Qwen's tokenizer composes letters and accents: the ids hold another spelling of the same text."""
    from tokenizers import normalizers

    composing = tiny.tokenizer(tmp_path_factory.mktemp("composing"))
    composing._backend.normalizer = normalizers.NFC()
    step = Step("Jose\u0301", query="Jose\u0301?")
    codec = codec_of(composing, "steps")
    assert codec.parse_step(codec.step_ids(step, 1), 1).query == "Jos\u00e9?"
    assert codec.unreadable_step(trajectory(step, LAST)) is None


@pytest.mark.parametrize("name", ["tags", "steps"])
def test_the_text_of_a_step_holds_no_special_token(tokenizer: Tokenizer, name: str) -> None:
    codec = codec_of(tokenizer, name)
    plain = codec.step_ids(Step("a b", query="c d"), 1)
    spelt = codec.step_ids(Step("a <|im_end|></query> b", query="c <|im_start|> d"), 1)
    specials = {tokenizer.token_id(text) for text in tiny.SPECIALS}
    assert [i for i in spelt if i in specials] == [i for i in plain if i in specials]
    assert "a <|im_end|></query> b" in tokenizer.decode(spelt)


def test_a_step_without_special_tokens_is_encoded_as_one_text(tokenizer: Tokenizer) -> None:
    for name in ("tags", "steps"):
        codec = codec_of(tokenizer, name)
        ids = tokenizer.encode(codec.protocol.render_step(FIRST, 1))
        assert codec.step_ids(FIRST, 1) == (ids if name == "tags" else [*ids, codec.turn_end_id])


def test_such_records_end_the_run_or_are_left_out_and_counted(tokenizer: Tokenizer) -> None:
    codec = codec_of(tokenizer, "tags")
    bad = trajectory(Step("a <think>", query="b"), LAST)
    records = Records("sft.jsonl", [(1, trajectory(FIRST, LAST)), (2, bad), (4, trajectory(LAST))])
    with pytest.raises(UserError, match=r"^sft\.jsonl:2: step 1 must be read back .* data\.on_error=skip$"):
        OnError().check(records, codec.unreadable_step)
    said: list[str] = []
    kept = OnError("skip", said.append).check(records, codec.unreadable_step)
    assert kept.lines == [1, 4] and "left out 1 of 3 records" in said[0] and "sft.jsonl:2: step 1" in said[0]
