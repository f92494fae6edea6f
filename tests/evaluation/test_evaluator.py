"""Evaluation: typed-out numbers, what makes two evaluations comparable, the baselines' reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny

from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.evaluator import (
    MAX_ANSWER_TOKENS,
    fingerprint,
    measure,
    read_answers,
    reading_stops,
    summarise,
)
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.sampler.state import Rows, RowStatus
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Passage, Question, Sample, Status, Step, Trajectory

DARWIN = Passage("a", '"Origin"\nOrigin was written by Charles Darwin.')
BORN = Passage("b", '"Charles Darwin"\nCharles Darwin was born in Shrewsbury.')


def question(id: str, *golds: str, **metadata: object) -> Question:
    return Question(id, f"Question {id}?", golds, metadata)


def attempt(asked: Question, answer: str | None, *passages: Passage, num_tokens: int = 10) -> Trajectory:
    """One retrieval per passage, then an answer or a malformed step."""
    steps = [Step("x", query="q", passages=(passage,)) for passage in passages]
    steps.append(Step("x", answer=answer) if answer is not None else Step("?", is_well_formed=False))
    status = Status.ANSWERED if answer is not None else Status.FORMAT_ERROR
    return Trajectory(asked, tuple(steps), status, num_tokens=num_tokens)


def attempts() -> list[Trajectory]:
    """Right (of two supporting passages one), right without supports, half right, none."""
    return [
        attempt(
            question("1", "The Shrewsbury", type="bridge", unseen=True, supporting_ids=["a", "b"]),
            "shrewsbury.",
            DARWIN,
        ),
        attempt(question("2", "x", "Charles Darwin", type="single", unseen=False), "Charles Darwin", num_tokens=20),
        attempt(
            question("3", "Darwin", type="bridge", unseen=False, supporting_ids=["b"]), "Charles Darwin", BORN, DARWIN
        ),
        attempt(question("4", "1809", type="bridge", unseen=True), None, num_tokens=33),
    ]


def test_measure_is_arithmetic() -> None:
    assert measure(attempts()) == {
        "num": 4,
        "em": 50.0,
        "f1": pytest.approx(100 * (1 + 1 + 2 / 3 + 0) / 4),
        "cover_em": 75.0,
        "retrievals": 0.75,
        "support_found": 75.0,  # 1/2 and 1/1, of the two questions that say
        "tokens_per_correct": pytest.approx((10 + 20 + 10 + 33) / 2),
        "no_answer": 25.0,
    }


def test_what_nothing_is_known_of_is_none() -> None:
    row = measure([attempt(question("4", "1809"), "1859")])
    assert row["tokens_per_correct"] is None
    assert row["support_found"] is None
    assert (row["em"], row["retrievals"], row["no_answer"]) == (0.0, 0.0, 0.0)


def test_tokens_are_counted_in_the_samples_where_no_number_is_given() -> None:
    mask = np.array([False, True, True])
    sample = Sample(np.arange(3, dtype=np.int32), mask, np.zeros(3, np.float32), np.where(mask, 0, -1).astype(np.int32))
    trajectory = dataclasses.replace(attempt(question("2", "x"), "x"), num_tokens=None, samples=(sample, sample))
    assert measure([trajectory])["tokens_per_correct"] == 4.0


def test_groups_by_type_and_by_seen() -> None:
    summary = summarise("r3rag", attempts(), {"questions": "abc"})
    assert (summary["system"], summary["title"], summary["num_questions"]) == ("r3rag", "R3-RAG", 4)
    assert summary["fingerprint"] == {"questions": "abc"}
    assert {name: group["num"] for name, group in summary["groups"].items()} == {
        "all": 4, "bridge": 3, "single": 1, "unseen": 2, "seen": 2,
    }  # fmt: skip
    assert {name: group["em"] for name, group in summary["groups"].items()} == {
        "all": 50.0, "bridge": pytest.approx(100 / 3), "single": 100.0, "unseen": 50.0, "seen": 50.0,
    }  # fmt: skip
    assert summary["groups"]["all"] == measure(attempts())
    assert summarise("mine", attempts()[:1], {})["title"] == "mine"


def test_judged_accuracy_is_of_what_was_judged() -> None:
    row = measure(attempts(), np.asarray([1, 1, np.nan, 0], np.float32))
    assert (row["acc"], row["judge_failures"]) == (pytest.approx(200 / 3), 1)
    assert {name: value for name, value in row.items() if name not in ("acc", "judge_failures")} == measure(attempts())
    assert measure(attempts()[:1], np.asarray([np.nan], np.float32))["acc"] is None


def test_a_judge_is_asked_about_answers_that_do_not_match(tmp_path: Path) -> None:
    class Agreeing:
        """Says yes to whatever it is asked, and remembers it."""

        is_collective, model, identity, place = False, "m", "m", "here"

        def __init__(self) -> None:
            self.prompts: list[str] = []

        def reply_all(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | UserError]]:
            self.prompts += prompts
            yield from enumerate(["Correct: yes"] * len(prompts))

        def give_up(self) -> None: ...

    chat = Agreeing()
    summary = summarise("r3rag", attempts(), {}, Judge(chat, tmp_path / "judgements.jsonl"))
    assert len(chat.prompts) == 1 and "Question 3?" in chat.prompts[0]
    assert {name: group["acc"] for name, group in summary["groups"].items()} == {
        "all": 75.0, "bridge": pytest.approx(200 / 3), "single": 100.0, "unseen": 50.0, "seen": 100.0,
    }  # fmt: skip
    assert all(group["judge_failures"] == 0 for group in summary["groups"].values())


def test_fingerprints_tell_questions_index_and_top_k_apart() -> None:
    asked = [question("1", "x"), question("2", "y")]
    mark = fingerprint(asked, index="i", top_k=2)
    assert mark == fingerprint(iter(asked), index="i", top_k=2)
    assert (mark["index"], mark["top_k"], len(mark["questions"])) == ("i", 2, 16)
    others = [
        fingerprint(asked, index="j", top_k=2),
        fingerprint(asked, index="i", top_k=5),
        fingerprint(asked[::-1], index="i", top_k=2),
        fingerprint(asked[:1], index="i", top_k=2),
        fingerprint([asked[0], question("2", "z")], index="i", top_k=2),
        fingerprint([asked[0], question("3", "y")], index="i", top_k=2),
    ]
    assert len({tuple(other.items()) for other in [mark, *others]}) == 7


# ------------------------------------------------------------------------------------- baselines


class Reader:
    """Stands for `Engine`: answers each prompt by a function of its text; keeps the prompts."""

    def __init__(self, tokenizer: Tokenizer, answer: dict[str, list[int]], slots: int = 2, max_length: int = 400):
        self.tokenizer, self.answer, self.slots, self.max_length = tokenizer, answer, slots, max_length
        self.prompts: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.rows = Rows.empty(self.slots, self.max_length)

    def find(self, *status: RowStatus) -> list[int]:
        return np.flatnonzero(np.isin(self.rows.status, status)).tolist()

    def release(self, slot: int) -> None:
        self.rows.status[slot] = RowStatus.EMPTY

    def set_context(self, policy, contexts) -> None:
        for slot, context in contexts.items():
            assert (context.budget, context.temperature) == (MAX_ANSWER_TOKENS, 0.0)
            self.prompts.append(self.tokenizer.decode(context.ids))
            self.rows.tokens[slot, : len(context.ids)] = context.ids
            self.rows.lengths[slot] = len(context.ids)
            self.rows.status[slot] = RowStatus.ACTIVE

    def decode(self, policy, max_tokens: int, leave_at: int) -> None:
        for slot in self.find(RowStatus.ACTIVE):
            start = self.rows.lengths[slot]
            text = self.tokenizer.decode(self.rows.tokens[slot, :start])
            ids = next((ids for part, ids in self.answer.items() if part in text), [])
            self.rows.tokens[slot, start : start + len(ids)] = ids
            self.rows.lengths[slot] += len(ids)
            self.rows.status[slot] = RowStatus.DONE


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


QUESTIONS = [
    Question("1", "Who wrote Origin then?", ("Charles Darwin",)),
    Question("2", "Where was Charles Darwin born?", ("Shrewsbury",)),
    Question("3", "Nothing at all?", ("x",)),
]


def read(
    tokenizer: Tokenizer, retriever: object = None, *, chat: bool = False, **options: int
) -> tuple[list[Trajectory], Reader]:
    answers = {
        "Question: Who wrote": [*tokenizer.encode(" Charles Darwin"), *tokenizer.encode("\n")],
        "Question: Where was": tokenizer.encode(" Shrewsbury"),  # cut off by its budget
        "Question: Nothing": [tokenizer.eos_id],
    }
    engine = Reader(tokenizer, answers, **options)
    heard: list[Trajectory] = []
    done = read_answers(engine, tokenizer, None, QUESTIONS, retriever, 2, heard.append, chat=chat)
    assert sorted(t.question.id for t in heard) == ["1", "2", "3"]
    return done, engine


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_closed_book_reads_no_passage(tokenizer: Tokenizer, slots: int) -> None:
    done, engine = read(tokenizer, slots=slots)
    assert sorted(engine.prompts) == sorted(f"Question: {q.question}\nAnswer:" for q in QUESTIONS)
    assert [t.answer for t in done] == ["Charles Darwin", "Shrewsbury", None]
    assert [t.status for t in done] == [Status.ANSWERED, Status.ANSWERED, Status.NO_ANSWER]
    assert [t.num_retrievals for t in done] == [0, 0, 0]
    assert [t.num_policy_tokens for t in done[:2]] == [15 + 1, 11]  # bytes: " Charles Darwin\n", " Shrewsbury"


def test_oneshot_rag_reads_what_one_search_brings(tokenizer: Tokenizer) -> None:
    done, engine = read(tokenizer, tiny.DictRetriever([DARWIN, BORN]))
    assert (
        '"Charles Darwin"\nCharles Darwin was born in Shrewsbury.\n"Origin"\nOrigin was written by Charles Darwin.\n'
        "Question: Where was Charles Darwin born?\nAnswer:"
    ) in engine.prompts
    assert done[1].retrieved_ids == ("b", "a")
    assert [t.num_retrievals for t in done] == [1, 1, 0]  # nothing is found for the last question
    assert done[1].steps[0].query == QUESTIONS[1].question


def test_a_prompt_that_outgrows_the_context_loses_its_last_passages(tokenizer: Tokenizer) -> None:
    whole = f"{BORN.contents}\nQuestion: Where was Charles Darwin born?\nAnswer:"
    _, engine = read(tokenizer, tiny.DictRetriever([DARWIN, BORN]), max_length=len(whole) + MAX_ANSWER_TOKENS)
    assert whole in engine.prompts
    _, engine = read(tokenizer, tiny.DictRetriever([DARWIN, BORN]), max_length=len(whole) + MAX_ANSWER_TOKENS - 1)
    assert "Question: Where was Charles Darwin born?\nAnswer:" in engine.prompts
    _, engine = read(tokenizer, None, max_length=len("born?\nAnswer:") + MAX_ANSWER_TOKENS)
    assert "born?\nAnswer:" in engine.prompts


def test_a_chat_model_is_shown_how_short_an_answer_is(tokenizer: Tokenizer) -> None:
    _, engine = read(tokenizer, chat=True, max_length=1500)
    assert all("Documents:" not in prompt and prompt.count("<|im_start|>user") == 4 for prompt in engine.prompts)
    done, engine = read(tokenizer, tiny.DictRetriever([DARWIN, BORN]), chat=True, max_length=1500)
    instruction = "Answer the question with a name, a number or a few words only."
    [prompt] = [prompt for prompt in engine.prompts if "Where was" in prompt]
    assert prompt.startswith(
        '<|im_start|>user\nDocuments:\n"Eiffel Tower"\nTower in Paris, France, built from 1887 to 1889.\n\n'
        f"{instruction}\nQuestion: In which country is the Eiffel Tower?<|im_end|>\n"
        "<|im_start|>assistant\nFrance<|im_end|>\n<|im_start|>user\n"
    )
    assert prompt.endswith(
        f"<|im_start|>user\nDocuments:\n{BORN.contents}\n{DARWIN.contents}\n\n{instruction}\n"
        "Question: Where was Charles Darwin born?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert done[1].answer == "Shrewsbury"
    length = len(tokenizer.encode(prompt)) + MAX_ANSWER_TOKENS - 1
    cut, engine = read(tokenizer, tiny.DictRetriever([DARWIN, BORN]), chat=True, max_length=length)
    [prompt] = [prompt for prompt in engine.prompts if "Where was" in prompt]
    assert BORN.contents in prompt and DARWIN.contents not in prompt and prompt.endswith("assistant\n")
    assert cut[1].answer == "Shrewsbury"


def test_a_line_of_answer_ends_at_a_newline_or_the_end_of_text(tokenizer: Tokenizer) -> None:
    [newline] = tokenizer.encode("\n")
    assert set(reading_stops(tokenizer)) == {newline, tokenizer.eos_id, tokenizer.pad_id}
