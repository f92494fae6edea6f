"""Which questions an iteration rolls out."""

from __future__ import annotations

import jax
import pytest

from r3rag_jax.config import Config, RLConfig, RolloutConfig
from r3rag_jax.data.records import Records
from r3rag_jax.errors import UserError
from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.training.experience import score_experience
from r3rag_jax.training.requests import QuestionDraws
from r3rag_jax.types import Question, Status, Step, Trajectory

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


def numbered(num: int) -> Records[Question]:
    return Records(
        "rl.jsonl", ((i + 1, Question(str(i), f"q{i}", ("x",), {"hops": 1 + i % 5 // 4})) for i in range(num))
    )


def test_every_question_comes_once_before_any_comes_again() -> None:
    questions = numbered(10)
    config = Config(rl=RLConfig(questions=4), rollout=RolloutConfig(samples=3, temperatures=(0.4, 1.0)))
    draws = QuestionDraws(config, questions)
    requests = [draws.requests(iteration) for iteration in range(5)]
    ids = [request.question.id for iteration in requests for request in iteration[::3]]
    assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(str(i) for i in range(10))
    assert ids[:10] != ids[10:] and ids[:10] != sorted(ids[:10])
    assert [(request.sample_index, request.temperature) for request in requests[0][:3]] == [
        (0, 0.4),
        (1, 1.0),
        (2, 0.4),
    ]
    assert requests[2] == QuestionDraws(config, questions).requests(2)
    assert len({request.seed for iteration in requests for request in iteration}) == 5
    reseeded = QuestionDraws(config.replace(seed=1), questions).requests(0)
    assert {request.seed for request in requests[0]}.isdisjoint({request.seed for request in reseeded})


def test_a_question_that_comes_again_in_an_iteration_gives_other_samples() -> None:
    questions = numbered(3)
    config = Config(rl=RLConfig(questions=8), rollout=RolloutConfig(samples=2, temperatures=(0.4, 1.0, 0.7)))
    requests = QuestionDraws(config, questions).requests(0)
    by_question = {q.id: [r for r in requests if r.question is q] for q in questions}
    assert sorted(map(len, by_question.values())) == [4, 6, 6]  # eight draws of three questions
    for found in by_question.values():
        assert [request.sample_index for request in found] == list(range(len(found)))
        assert [request.temperature for request in found] == [0.4, 1.0] * (len(found) // 2)
    keys = {tuple(request.key(step)) for request in requests for step in range(3)}
    assert len(keys) == 3 * len(requests)


def test_the_first_draw_keeps_its_samples_whatever_else_is_drawn() -> None:
    questions = numbered(3)
    rollout = RolloutConfig(samples=2)
    configs = (Config(rl=RLConfig(questions=num), rollout=rollout) for num in (3, 8))
    once, often = (QuestionDraws(config, questions).requests(0) for config in configs)
    assert often[:6] == once
    assert once[0].key(1).tolist() == [2191378004, 2139645870]


def test_balanced_iterations_have_as_many_of_each_kind_while_there_are_any() -> None:
    questions = numbered(20)  # sixteen of one hop, four of two
    config = Config(rl=RLConfig(questions=4, balance=("hops",)), rollout=RolloutConfig(samples=1))
    draws = QuestionDraws(config, questions)
    hops = [[request.question.metadata["hops"] for request in draws.requests(i)] for i in range(10)]
    one_pass = [[1, 1, 2, 2]] * 2 + [[1] * 4] * 3
    assert [sorted(found) for found in hops] == one_pass * 2
    drawn = [request.question.id for i in range(5) for request in draws.requests(i)]
    assert sorted(drawn) == sorted(questions.ids)
    others = draws.replacements(0, 1, 4, set(drawn[:4]))
    assert sorted(request.question.metadata["hops"] for request in others) == [1, 1, 2, 2]
    with pytest.raises(UserError, match=r"rl\.balance must be fields .*, which are hops in rl\.jsonl:1; got type"):
        QuestionDraws(config.replace(rl=config.rl.replace(balance=("hops", "type"))), questions)


def test_a_question_that_comes_again_counts_as_often_as_it_was_drawn() -> None:
    answers = {"q": "xyyy", "r": "xx"}  # by question, of its samples; x is right
    trajectories = [
        Trajectory(Question(id, "Who?", ("x",)), (Step("a", answer=answer),), Status.ANSWERED, sample_index=index)
        for id, texts in answers.items()
        for index, answer in enumerate(texts)
    ]
    config = Config()
    scorer = Scorer(config.rewards, Resources(config.rollout.max_steps))
    found = score_experience(trajectories, scorer, totals=True)
    assert found.zero_variance.tolist() == [False] * 4 + [True] * 2  # one group of four, of two draws
    assert found.num_useful_draws(2) == 2
