"""Reading replies of `/v1/completions`: which ids were sampled, and which token ended them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from openai_server import completion

from r3rag_jax.clients.completion_reply import CompletionReader, MalformedReplyError
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Completion

THOUGHT = "<think> I know. </think>"


@pytest.fixture
def reader(tokenizer: Tokenizer) -> CompletionReader:
    """Of the `tags` protocol: a query or an answer ends a completion."""
    stop_ids = [tokenizer.token_id(tag) for tag in ("</query>", "</answer>")]
    return CompletionReader(tokenizer, stop_ids)


def test_a_text_alone_is_encoded_and_its_end_restored(reader: CompletionReader, tokenizer: Tokenizer) -> None:
    for tag in ("query", "answer"):
        text = f"{THOUGHT}<{tag}> Darwin "
        written = Completion(tokenizer.encode(f"{text}</{tag}>"), None)
        assert reader.read(completion(text)) == written
        assert reader.read(completion(f"{text}</{tag}>")) == written  # a server that keeps the end
    assert np.isnan(reader.read(completion("x")).behaviour_logprobs).tolist() == [True, True]


def test_a_text_without_an_open_tag_ended_by_itself(reader: CompletionReader, tokenizer: Tokenizer) -> None:
    for text in ("", "Darwin", f"{THOUGHT}<answer> Darwin </answer> and"):
        assert reader.read(completion(text)).ids == [*tokenizer.encode(text), tokenizer.eos_id]


def test_the_last_of_several_open_tags_is_closed(reader: CompletionReader, tokenizer: Tokenizer) -> None:
    assert reader.read(completion("<answer> a <query> b")).ids[-1] == tokenizer.token_id("</query>")
    assert reader.read(completion("<query> a <answer> b")).ids[-1] == tokenizer.token_id("</answer>")


def test_without_closing_tags_among_the_stops_an_open_tag_means_nothing(tokenizer: Tokenizer) -> None:
    newline = tokenizer.encode("\n")[0]
    reader = CompletionReader(tokenizer, [newline])
    assert reader.read(completion("<answer> Darwin")).ids[-1] == tokenizer.eos_id
    assert reader.read(completion("<answer> Darwin", stop_reason="\n")).ids[-1] == newline


def test_an_end_of_sequence_in_a_tag_differs_from_its_closing_where_the_server_names_it(
    reader: CompletionReader, tokenizer: Tokenizer
) -> None:
    cut = f"{THOUGHT}<answer> Darwin"
    closing = tokenizer.token_id("</answer>")
    for fields, end in (
        ({"stop_reason": "</answer>"}, closing),
        ({"matched_stop": closing}, closing),
        ({}, closing),  # nothing said: the open tag is taken for closed
        ({"stop_reason": None}, closing),
        ({"matched_stop": tokenizer.eos_id}, tokenizer.eos_id),
        ({"stop_reason": "something else"}, tokenizer.eos_id),
        ({"token_ids": [*tokenizer.encode(cut), tokenizer.eos_id]}, tokenizer.eos_id),
    ):
        assert reader.read(completion(cut, **fields)).ids == [*tokenizer.encode(cut), end], fields


def test_a_completion_cut_off_by_its_budget_gets_no_end(reader: CompletionReader, tokenizer: Tokenizer) -> None:
    cut = f"{THOUGHT}<answer> Darwin"
    assert reader.read(completion(cut, "length")).ids == tokenizer.encode(cut)


def test_a_tag_spelled_out_in_letters_is_kept_and_is_no_stop_token(
    reader: CompletionReader, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(f"{THOUGHT}<answer> Darwin ")
    ids += tokenizer.encode("</answer>", allow_special=False)
    reply = completion(tokenizer.decode(ids), token_ids=ids, stop_reason="</answer>")
    assert reader.read(reply).ids == ids and ids[-1] not in reader.stop_texts


@pytest.mark.parametrize("dialect", ["token_ids", "content", "token_id", "texts"])
def test_ids_and_logprobs_in_the_form_of_each_server(
    reader: CompletionReader, tokenizer: Tokenizer, dialect: str
) -> None:
    """A split that the tokenizer would not choose is kept: `<`, `d`, … are not the tag that they spell."""
    ids = [*tokenizer.encode("<think> a "), *tokenizer.encode("<doc>", allow_special=False), tokenizer.eos_id]
    values = [-float(i) for i in range(len(ids))]
    tokens = [tokenizer.decode([id]) for id in ids]
    fields: dict[str, Any] = {
        "token_ids": {"token_ids": ids, "logprobs": {"tokens": tokens, "token_logprobs": values}},
        "content": {
            "logprobs": {"content": [{"id": i, "token": "?", "logprob": v} for i, v in zip(ids, values, strict=True)]}
        },
        "token_id": {"logprobs": {"tokens": [f"token_id:{id}" for id in ids], "token_logprobs": values}},
        "texts": {"logprobs": {"tokens": tokens, "token_logprobs": values}},
    }[dialect]
    for text in (tokenizer.decode(ids), tokenizer.decode(ids[:-1])):
        read = reader.read(completion(text, **fields))
        assert read.ids == ids != tokenizer.encode(text)
        assert read.logprobs is not None and read.logprobs.dtype == np.float32
        assert read.behaviour_logprobs.tolist() == values


def test_tokens_that_are_parts_of_characters_have_no_text(reader: CompletionReader, tokenizer: Tokenizer) -> None:
    cafe = tokenizer.encode("é")
    logprobs = {"tokens": [tokenizer.decode([id]) for id in cafe], "token_logprobs": [-1.0] * len(cafe)}
    assert reader.read(completion("é", logprobs=logprobs)) == Completion([*cafe, tokenizer.eos_id], None)


def test_tokens_that_do_not_make_up_the_text_are_not_taken(reader: CompletionReader, tokenizer: Tokenizer) -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -1.0]}
    assert reader.read(completion("abc", logprobs=logprobs)).ids == [*tokenizer.encode("abc"), tokenizer.eos_id]


def test_a_content_without_ids_is_encoded_again(reader: CompletionReader, tokenizer: Tokenizer) -> None:
    content = [{"id": 5, "logprob": -1.0}, {"logprob": -1.0}]
    reply = completion("ab", logprobs={"content": content})
    assert reader.read(reply).ids == [*tokenizer.encode("ab"), tokenizer.eos_id]


def test_a_stop_that_a_server_left_out_has_no_logprob(reader: CompletionReader, tokenizer: Tokenizer) -> None:
    read = reader.read(completion("a", token_ids=[70, 71], logprobs={"token_logprobs": [-0.5, -0.25]}))
    assert read.ids == [70, 71, tokenizer.eos_id] and read.logprobs is not None
    assert read.logprobs[:2].tolist() == [-0.5, -0.25] and np.isnan(read.logprobs[2])
    unknown = completion("a", token_ids=[70, 71], logprobs={"token_logprobs": [-0.5, None]})
    assert reader.read(unknown) == Completion([70, 71, tokenizer.eos_id], None)


@pytest.mark.parametrize(
    "values", [[-1.0], [-1.0, None], [-1.0, "x"], [-1.0, float("nan")], [-1.0, float("-inf")], [-1.0, -(10**400)]]
)
def test_logprobs_count_only_where_every_token_has_one(reader: CompletionReader, values: list[Any]) -> None:
    reply = completion("a", "length", token_ids=[70, 71], logprobs={"token_logprobs": values})
    assert reader.read(reply) == Completion([70, 71], None)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ([], "choices with text and finish_reason"),
        ({"choices": []}, "choices with text and finish_reason"),
        ({"choices": ["x"]}, "choices with text and finish_reason"),
        (completion(None), "a text with finish_reason stop or length"),  # type: ignore[arg-type]
        (completion("", "abort"), "a text with finish_reason stop or length"),
        (completion("", "length"), "at least one sampled token"),
        (completion("") | {"usage": {"completion_tokens": 0}}, "at least one sampled token"),
        (completion("x", token_ids=[5, 100_000]), "ids below 267, the tokenizer's"),
        (completion("x", token_ids=["5"]), "ids below 267, the tokenizer's"),
        (completion("x", token_ids=5), "ids below 267, the tokenizer's"),
        (completion("x", logprobs={"tokens": ["token_id:x"]}), "logprobs of OpenAI's form"),
        (completion("x", logprobs={"tokens": [["x"]]}), "logprobs of OpenAI's form"),
        (completion("x", logprobs={"token_logprobs": 5}), "logprobs of OpenAI's form"),
        (completion("x", logprobs=[1]), "logprobs of OpenAI's form"),
    ],
    ids=range(14),
)
def test_a_malformed_reply_is_an_error(reader: CompletionReader, value: Any, rule: str) -> None:
    with pytest.raises(MalformedReplyError) as caught:
        reader.read(value)
    assert str(caught.value) == rule
