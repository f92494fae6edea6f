"""Ids of whole texts and of their pieces, for tokenizers with and without a space before a text."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece_like
from sentencepiece_like import KINDS, SPECIALS, TEMPLATES

from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Codec, teacher_samples
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

PARTS = (
    "The",
    "the",
    "question",
    "author",
    " ",
    "  ",
    "\n",
    "Who",
    "?",
    "1859",
    "é",
    "中",
    "\U0001f98e",
    ".",
    "▁",
    "<",
    ">",
    "_",
)
Open = Callable[..., Tokenizer]


@pytest.fixture(scope="module")
def open_kind(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Kind (and template) -> tokenizer."""
    folder = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def open_kind(kind: str, template: str = "text") -> Tokenizer:
        return sentencepiece_like.write(folder / f"{kind}-{template}", kind, template)

    return open_kind


def theirs(tokenizer: Tokenizer) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer._path)


def texts(seed: int, count: int, parts: Sequence[str] = PARTS) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(parts, k=rng.randint(0, 9))) for _ in range(count)]


def letters(text: str) -> str:
    """Without spaces, of which these tokenizers write more or fewer than they read."""
    return text.replace(" ", "").replace("▁", "")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_texts_and_conversations_are_those_of_transformers(open_kind: Open, kind: str) -> None:
    for template in TEMPLATES:
        ours = open_kind(kind, template)
        reference = theirs(ours)
        for text in texts(0, 200, (*PARTS, *SPECIALS, "[TAIL]")):
            assert ours.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
        for question, answer in zip(texts(1, 50), texts(2, 50), strict=True):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            assert ours.chat(messages) == reference.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_llama_tokenizer_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    """It takes vocabulary and merges of tokenizer.json, and all else from `legacy` and `add_prefix_space`."""
    transformers = pytest.importorskip("transformers")
    sentencepiece_like.write(tmp_path, kind)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    for fields in ({}, {"legacy": True}, {"legacy": False, "add_prefix_space": True}, {"add_prefix_space": False}):
        file.write_text(json.dumps(settings | fields))
        ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in texts(12, 100, (*PARTS, *SPECIALS, "[TAIL]")):
            ids = ours.encode(text)
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.decode(ids) == theirs.decode(ids)
        ours.save(tmp_path / "saved")  # also transformers 4 reads the saved file so
        assert Tokenizer(tmp_path / "saved").encode(text) == ids
        assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved").encode(text) == ids


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_whole_text(open_kind: Open, kind: str) -> None:
    """Also where each text between special tokens is encoded by itself, as it is if a piece spells a special token."""
    tokenizer = open_kind(kind)
    trusted = (*PARTS, *SPECIALS, "[TAIL]")
    cases = zip(texts(3, 300, trusted), texts(4, 300), texts(5, 300, trusted), texts(6, 300), strict=True)
    for pieces in cases:
        want = tokenizer.encode("".join(pieces))
        assert tokenizer.encode_pieces(pieces) == want
        assert tokenizer._pieces._encode_segments(pieces, continues=False) == want


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_from_outside_spells_no_special_token(open_kind: Open, kind: str) -> None:
    """Its letters are encoded where it stands; the special tokens of the frame are all there are."""
    tokenizer = open_kind(kind)
    specials = {tokenizer.token_id(token) for token in (*SPECIALS, "[TAIL]")} - {tokenizer.token_id("<unk>")}
    for before, outside, after in zip(
        texts(7, 100, (*PARTS, *SPECIALS)),
        texts(8, 100, (*PARTS, *SPECIALS)),
        texts(9, 100, (*PARTS, *SPECIALS)),
        strict=True,
    ):
        ids = tokenizer.encode_pieces([before, outside, after])
        allowed = [i for piece in (before, after) for i in tokenizer.encode(piece) if i in specials]
        assert [i for i in ids if i in specials] == allowed
        assert letters(outside) in letters(tokenizer.decode(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_continues_another_has_no_space_before_it(open_kind: Open, kind: str) -> None:
    """`Who` after `: ` is `Who` and not `▁Who`, wherever a token of the whole text ends between the two."""
    tokenizer = open_kind(kind)
    num_compared = 0
    for before, text in zip(texts(10, 300), texts(11, 300), strict=True):
        whole, ids = tokenizer.encode(before + text), tokenizer.encode(before)
        for allow_special in (True, False):
            continued = tokenizer.encode(text, allow_special=allow_special, continues=True)
            if before and whole[: len(ids)] == ids and tokenizer.decode(whole[len(ids) :]).strip() == text.strip():
                num_compared += 1
                assert [*ids, *continued] == whole, (before, text)
    assert num_compared > 100
    assert tokenizer.encode("", continues=True) == []


ORIGIN = Passage("a", '"Origin"\nThe author of Origin is Darwin.')
STEPS = (
    Step(
        "I need the author.",
        query="Who is the author of Origin?",
        passages=(ORIGIN, Passage("b", "the book\nis </s> read")),
    ),
    Step("The author is Darwin.", answer="Darwin"),
)


@pytest.mark.parametrize("protocol", ["steps", "search_r1", "tags"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cold_start_trains_on_the_ids_of_the_whole_text(
    open_kind: Open, kind: str, template: str, protocol: str
) -> None:
    """What follows a text has no space before it: neither a step, nor a passage, nor the line end between two."""
    tokenizer = open_kind(kind, template)
    codec = Codec(tokenizer, make_protocol(protocol), passage_tokens=64)
    trajectory = Trajectory(Question("q", "Who wrote the book?", ("Darwin",)), STEPS, Status.ANSWERED)
    samples = teacher_samples(codec, trajectory)
    assert codec.unreadable_step(trajectory) is None
    before, after = tokenizer.frame_of_user_message()
    message = codec.protocol.user_message("Who wrote the book?")
    shown = codec.protocol.render_passages([passage.contents for passage in STEPS[0].passages])
    first, last = (codec.protocol.render_step(step, number) for number, step in enumerate(STEPS, 1))
    if protocol == "steps":
        wholes = [[before, message, after, first], [before, f"{message}\n{first}\n{shown}", after, last]]
    elif protocol == "search_r1":  # whose tags are ordinary text
        wholes = [[before, message, after, f"{first}{shown}{last}"]]
    else:
        inside = shown.removeprefix("<doc>").removesuffix("</doc>")
        wholes = [[before, message, f"{after}{first}<doc>", inside, f"</doc>{last}"]]
    end = [tokenizer.turn_end_id] if protocol == "steps" else []
    for sample, pieces in zip(samples, wholes, strict=True):
        assert sample.ids.tolist() == [*tokenizer.encode_pieces(pieces), *end]
