"""Closed book and naive RAG: what they are asked, and how their line of answer is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from fake_backend import FakeBackend

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.baselines.prompting import line_stops
from r3rag_jax.config import BaselinesConfig, Config, EvalConfig, NaiveRAGConfig, RolloutConfig
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Context, Passage, Question, Status, Trajectory

MAX_ANSWER_TOKENS = BaselinesConfig().max_answer_tokens
DARWIN = Passage("a", '"Origin"\nOrigin was written by Charles Darwin.')
BORN = Passage("b", '"Charles Darwin"\nCharles Darwin was born in Shrewsbury.')


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


QUESTIONS = [
    Question("1", "Who wrote Origin then?", ("Charles Darwin",)),
    Question("2", "Where was Charles Darwin born?", ("Shrewsbury",)),
    Question("3", "Nothing at all?", ("x",)),
]


def read(
    tokenizer: Tokenizer, baseline: str, *, chat: bool = False, slots: int = 2, max_length: int = 400
) -> tuple[list[Trajectory], list[str]]:
    """Trajectories of the questions, and the prompts in the order in which they came."""
    answers = {
        "Question: Who wrote": [*tokenizer.encode(" Charles Darwin"), *tokenizer.encode("\n")],
        "Question: Where was": tokenizer.encode(" Shrewsbury"),  # cut off by its budget
        "Question: Nothing": [tokenizer.eos_id],
    }
    prompts: list[str] = []

    def complete(slot: int, context: Context) -> Sequence[int]:
        assert (context.budget, context.temperature) == (MAX_ANSWER_TOKENS, 0.0)
        prompts.append(tokenizer.decode(context.ids))
        return next((ids for part, ids in answers.items() if part in prompts[-1]), [tokenizer.eos_id])

    config = Config(
        phases=("index",),
        rollout=RolloutConfig(max_length=max_length, max_new_tokens=8),
        baselines=BaselinesConfig(naive_rag=NaiveRAGConfig(top_k=2)),
        eval=EvalConfig(prompt="chat" if chat else "reading"),
    )
    heard: list[Trajectory] = []
    backend, retriever = FakeBackend(complete, slots), tiny.DictRetriever([DARWIN, BORN])
    requests = [RolloutRequest(question) for question in QUESTIONS]
    done = rollout(backend, BASELINES[baseline](config, tokenizer), retriever, requests, on_done=heard.append)
    assert sorted(t.question.id for t in heard) == ["1", "2", "3"]
    assert backend.stops == [line_stops(tokenizer)]
    return done, prompts


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_closed_book_reads_no_passage(tokenizer: Tokenizer, slots: int) -> None:
    done, prompts = read(tokenizer, "closed_book", slots=slots)
    assert sorted(prompts) == sorted(f"Question: {q.question}\nAnswer:" for q in QUESTIONS)
    assert [t.answer for t in done] == ["Charles Darwin", "Shrewsbury", None]
    assert [t.status for t in done] == [Status.ANSWERED, Status.ANSWERED, Status.NO_ANSWER]
    assert [t.num_retrievals for t in done] == [0, 0, 0]
    assert [t.num_policy_tokens for t in done[:2]] == [15 + 1, 11]  # bytes: " Charles Darwin\n", " Shrewsbury"


def test_naive_rag_reads_what_one_search_brings(tokenizer: Tokenizer) -> None:
    done, prompts = read(tokenizer, "naive_rag")
    assert (
        '"Charles Darwin"\nCharles Darwin was born in Shrewsbury.\n"Origin"\nOrigin was written by Charles Darwin.\n'
        "Question: Where was Charles Darwin born?\nAnswer:"
    ) in prompts
    assert done[1].retrieved_ids == ("b", "a")
    assert [t.num_retrievals for t in done] == [1, 1, 0]  # nothing is found for the last question
    assert done[1].steps[0].query == QUESTIONS[1].question


def test_a_prompt_that_outgrows_the_context_loses_its_last_passages(tokenizer: Tokenizer) -> None:
    whole = f"{BORN.contents}\nQuestion: Where was Charles Darwin born?\nAnswer:"
    _, prompts = read(tokenizer, "naive_rag", max_length=len(whole) + MAX_ANSWER_TOKENS)
    assert whole in prompts
    _, prompts = read(tokenizer, "naive_rag", max_length=len(whole) + MAX_ANSWER_TOKENS - 1)
    assert "Question: Where was Charles Darwin born?\nAnswer:" in prompts
    _, prompts = read(tokenizer, "closed_book", max_length=len("born?\nAnswer:") + MAX_ANSWER_TOKENS)
    assert "born?\nAnswer:" in prompts


def test_a_chat_model_is_shown_how_short_an_answer_is(tokenizer: Tokenizer) -> None:
    _, prompts = read(tokenizer, "closed_book", chat=True, max_length=1500)
    assert all("Documents:" not in prompt and prompt.count("<|im_start|>user") == 4 for prompt in prompts)
    done, prompts = read(tokenizer, "naive_rag", chat=True, max_length=1500)
    instruction = "Answer the question with a name, a number or a few words only."
    [prompt] = [prompt for prompt in prompts if "Where was" in prompt]
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
    cut, prompts = read(tokenizer, "naive_rag", chat=True, max_length=length)
    [prompt] = [prompt for prompt in prompts if "Where was" in prompt]
    assert BORN.contents in prompt and DARWIN.contents not in prompt and prompt.endswith("assistant\n")
    assert cut[1].answer == "Shrewsbury"


def test_a_line_of_answer_ends_at_a_newline_or_any_end_of_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    [newline] = tokenizer.encode("\n")
    assert set(line_stops(tokenizer).stop_ids) == {newline, tokenizer.eos_id, tokenizer.pad_id}
    tokenizer.save(tmp_path / "one")
    several = tiny.with_several_ends(tmp_path / "one", tmp_path / "several")
    assert set(line_stops(several).stop_ids) == {newline, 0, 1, 2}
