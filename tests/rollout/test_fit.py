"""A question whose prompt does not fit the context is named before anything is rolled out, or left out."""

from __future__ import annotations

import pytest
import tiny

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.config import BaselinesConfig, Config, EvalConfig, RolloutConfig
from r3rag_jax.data.records import OnError, Records
from r3rag_jax.errors import UserError
from r3rag_jax.rollout.env import Done, EnvFactory, Search, StopRule
from r3rag_jax.rollout.fit import fitting_questions, misfit
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.search_env import search_env_factory
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Completion, Context, Question, Status

MAX_ANSWER_TOKENS = BaselinesConfig().max_answer_tokens
MAX_SENTENCE_TOKENS = BaselinesConfig().ircot.sentence_tokens
SHORT, LONG = Question("short", "Who?", ("x",)), Question("long", "Who was it? " * 40, ("x",))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def search_env(tokenizer: Tokenizer, **settings: int) -> EnvFactory:
    codec = Codec(tokenizer, make_protocol("tags"), passage_tokens=8)
    return search_env_factory(codec, RolloutConfig(**settings), top_k=1, max_passages=2)


def baseline(tokenizer: Tokenizer, name: str, *, prompt: str = "reading") -> EnvFactory:
    config = Config(phases=("index",), rollout=RolloutConfig(max_length=4000), eval=EvalConfig(prompt=prompt))
    return BASELINES[name](config, tokenizer)


def opening(factory: EnvFactory, question: Question) -> Context:
    """The first context of a question for which nothing is found."""
    env = factory(RolloutRequest(question))
    first = env.start()
    found = first if isinstance(first, Context) else env.observe([])
    assert isinstance(found, Context)
    return found


@pytest.mark.parametrize("question", [SHORT, LONG])
def test_what_a_question_needs_is_its_first_prompt_and_a_completion(tokenizer: Tokenizer, question: Question) -> None:
    factory = search_env(tokenizer, max_new_tokens=20, max_length=4000)
    assert factory.num_tokens(question) == len(opening(factory, question).ids) + 20
    for name in ("closed_book", "naive_rag"):
        for prompt in ("reading", "chat"):
            factory = baseline(tokenizer, name, prompt=prompt)
            assert factory.num_tokens(question) == len(opening(factory, question).ids) + MAX_ANSWER_TOKENS
    chat = baseline(tokenizer, "ircot", prompt="chat")
    assert chat.num_tokens(question) == len(opening(chat, question).ids) + MAX_SENTENCE_TOKENS
    # The examples before the question of a plain text may be cut off.
    frame = f"Question: {question.question}\nReasoning:"
    assert baseline(tokenizer, "ircot").num_tokens(question) == len(tokenizer.encode(frame)) + MAX_SENTENCE_TOKENS


def test_questions_that_do_not_fit_are_named_with_their_lines(tokenizer: Tokenizer) -> None:
    questions = Records("dev.jsonl", [(1, SHORT), (4, LONG), (5, SHORT)])
    needed = len(tokenizer.encode(LONG.question)) + len(opening(search_env(tokenizer, max_length=4000), SHORT).ids)
    needed += 20 - len(SHORT.question)
    said: list[str] = []
    skip = OnError("skip", said.append)
    factories = {"r3rag": search_env(tokenizer, max_new_tokens=20)}
    assert fitting_questions(questions, factories, needed, OnError("stop")) == questions
    kept = fitting_questions(questions, factories, needed - 1, skip)
    assert kept.lines == [1, 5] and said[0].splitlines()[1].strip() == (
        f"dev.jsonl:4: prompt and completion of r3rag must fit rollout.max_length={needed - 1}; got {needed} tokens "
        "with question 'long'"
    )
    with pytest.raises(
        UserError, match=r"^dev\.jsonl:4: .* got \d+ tokens with question 'long'; .*data\.on_error=skip"
    ):
        fitting_questions(questions, factories, needed - 1, OnError("stop"))


def test_all_systems_are_asked_the_same_questions(tokenizer: Tokenizer) -> None:
    factories = {name: baseline(tokenizer, name, prompt="chat") for name in ("closed_book", "naive_rag")}
    one, other = (factory.num_tokens(SHORT) for factory in factories.values())
    assert one < other  # the examples show documents
    assert misfit(SHORT, factories, other) is None
    assert "of naive_rag must fit" in str(misfit(SHORT, factories, one))


def test_an_env_that_does_not_say_what_it_needs_is_not_checked() -> None:
    assert misfit(LONG, {"mine": EnvFactory(lambda request: None, StopRule())}, 1) is None


def test_a_chain_that_fills_the_context_never_loses_its_question(tokenizer: Tokenizer) -> None:
    config = Config(phases=("index",), rollout=RolloutConfig(max_length=120, max_new_tokens=8))
    env = BASELINES["ircot"](config, tokenizer)(RolloutRequest(Question("q", "Who wrote Origin?", ("x",))))
    env.start()
    context = env.observe([])
    assert isinstance(context, Context) and "Question: Who wrote Origin?" in tokenizer.decode(context.ids)
    ids = tokenizer.encode(" It was written by someone who was born in England long ago.")
    assert isinstance(env.step(Completion(ids, None)), Search)
    done = env.observe([])
    assert isinstance(done, Done) and done.trajectory.status == Status.NO_ANSWER
