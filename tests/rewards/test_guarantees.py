"""What the default shaping guarantees (`rewards/shaping.py`), by enumeration of trajectories.

Up to four searches, each of which finds something or nothing, then an answer or a malformed step; or up to five
searches and no answer. (Four and five are taken from the first three kinds of SEARCHES.) Evidence is the sum of the
process rewards before shaping.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from r3rag_jax.config import RewardConfig, load_config
from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.judge.judge import Verdicts
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.types import OUT_OF_BUDGET, Passage, Question, Status, Step, Trajectory

MAX_STEPS = 5
QUESTION = Question("q", "1 0", ("x",), {"supporting_ids": ["a", "b"]})
A, B, C = Passage("a", "4 3"), Passage("b", "3 4"), Passage("c", "1 0")
SEARCHES = (
    Step("", query="1 0", passages=(A,)),  # one supporting passage
    Step("", query="2 0", passages=(A, B)),  # both, or the other one and one again
    Step("", query="1  0 ?", passages=(C,)),  # perhaps the first query again, with a deeper hit; it supports nothing
    Step("", query="0 1", passages=(C,)),  # the same passage by another query
    Step("", query="3 1"),  # nothing found
)
ENDS = {
    "right": (Step("", answer="x"), Status.ANSWERED),
    "wrong": (Step("", answer="y"), Status.ANSWERED),
    "malformed": (Step("", is_well_formed=False), Status.FORMAT_ERROR),
}


class CosineEncoder:
    """Embeds a text "x y" as the vector (x, y)."""

    dim, fingerprint, cosine_kind = 2, "cosine", "passage"

    def encode(self, texts, *, kind="query"):
        vectors = [[float(word) for word in text.replace("?", "").split()] for text in texts]
        return np.asarray(vectors, np.float32).reshape(-1, 2)


class GenerousJudge:
    """Finds every passage relevant, to a number of tenths that depends on the query, and no other answer correct."""

    def __init__(self):
        self.num_asked = 0

    def relevance(self, question, step):
        return (7 + float(step.query.split()[0])) / 10

    def correctness(self, question, answer):
        return 0.0  # it is asked about answers that are no exact match

    def ask(self, inquiries):
        self.num_asked += len(inquiries)
        return Verdicts(np.asarray(inquiries, np.float32), num=len(inquiries))


def trajectories(*names):
    """The trajectories that end so."""
    found = []
    for num in range(MAX_STEPS + 1):
        for steps in itertools.product(SEARCHES if num <= 3 else SEARCHES[:3], repeat=num):
            ends = [ENDS[name] for name in names if name in ENDS] if num < MAX_STEPS else []
            found += [Trajectory(QUESTION, (*steps, step), status) for step, status in ends]
            found += [Trajectory(QUESTION, steps, status) for status in OUT_OF_BUDGET if "none" in names and num]
    return found


BY_END = {name: trajectories(name) for name in (*ENDS, "none")}
SHORT = [t for found in BY_END.values() for t in found if len(t.steps) <= 3]


def score(config, found):
    return Scorer(config, Resources(MAX_STEPS, encoder=CosineEncoder(), judge=GenerousJudge())).score(found)


def totals_by_evidence(config, found):
    """Evidence, in hundredths -> the totals that trajectories with it earn."""
    scores = score(config, found)
    totals = {}
    for evidence, rewards in zip(scores.process.sum(axis=1), scores.rewards, strict=True):
        totals.setdefault(round(100 * float(evidence)), []).append(float(rewards.sum()))
    return totals


def new_steps(trajectory):
    """For each step, whether it shows a passage that is in no earlier step."""
    shown = [{passage.id for passage in step.passages} for step in trajectory.steps]
    return [bool(ids.difference(*shown[:k])) for k, ids in enumerate(shown)]


def recipes():
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        if (config := load_config(path).rewards).compat == "r3":
            yield pytest.param(config, id=path.stem)


PROCESS = pytest.mark.parametrize("process", ["gold", "embedding", "judge"])
USED = pytest.mark.parametrize("used", [{}, {"use_process": False}, {"use_outcome": False}], ids=str)


def test_the_enumeration_is_what_it_says():
    assert {len(t.steps) for found in BY_END.values() for t in found} == {1, 2, 3, 4, 5}
    assert {t.status for found in BY_END.values() for t in found} == set(Status)
    assert {name: len(found) for name, found in BY_END.items()} == dict.fromkeys(ENDS, 156 + 81) | {
        "none": 2 * (155 + 81 + 243)
    }


@PROCESS
@USED
def test_a_search_that_brings_nothing_new_earns_nothing(process, used):
    found = BY_END["right"] + BY_END["wrong"] + BY_END["none"]
    scores, num_fruitless = score(RewardConfig(process=process, **used), found), 0
    for trajectory, rewards in zip(found, scores.rewards, strict=True):
        for step, is_new, reward in zip(trajectory.steps, new_steps(trajectory), rewards, strict=True):
            if step.query is not None and not is_new:
                num_fruitless += 1
                assert reward <= 0  # or the penalty of a missing answer
    assert num_fruitless > 2000


@pytest.mark.parametrize("process", ["embedding", "judge"])
def test_a_repeated_query_earns_nothing_where_relevance_is_a_matter_of_opinion(process):
    first, again = SEARCHES[0], SEARCHES[2]
    trajectory = Trajectory(QUESTION, (first, again, ENDS["right"][0]), Status.ANSWERED)
    assert all(new_steps(trajectory)[:2])
    [rewards] = score(RewardConfig(process=process), [trajectory]).rewards
    np.testing.assert_allclose(rewards, [1.6 * 0.8, 0, 2], rtol=1e-6)


def test_the_judge_is_not_asked_about_searches_that_earn_nothing():
    judge = GenerousJudge()
    found = [Trajectory(QUESTION, (*SEARCHES, *SEARCHES), Status.NO_ANSWER)]
    scores = Scorer(RewardConfig(process="judge"), Resources(10, judge=judge)).score(found)
    assert judge.num_asked == 2 == np.count_nonzero(scores.process)


@PROCESS
@USED
@pytest.mark.parametrize("bound", [0.0, 0.5, 2.0, 6.4])
def test_the_process_rewards_of_a_trajectory_are_bounded(process, used, bound):
    scores = score(RewardConfig(process=process, max_process=bound, **used), SHORT)
    assert scores.parts["process"].max() <= bound + 1e-6
    assert bound > 1 or "use_process" in used or scores.parts["process"].max() == pytest.approx(bound)


@PROCESS
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(RewardConfig(), id="default"),
        pytest.param(RewardConfig(use_process=False), id="outcome only"),
        pytest.param(RewardConfig(max_process=1.0), id="bounded"),
        pytest.param(RewardConfig(factor_wrong=1.5, factor_no_answer=3.0, no_answer=0.0, malformed=-0.1), id="tight"),
        *recipes(),
    ],
)
def test_with_the_same_evidence_right_beats_wrong_beats_none_beats_malformed(process, config):
    config = config.replace(process=process)
    right, wrong, none, malformed = (
        totals_by_evidence(config, BY_END[name]) for name in ("right", "wrong", "none", "malformed")
    )
    assert right.keys() == wrong.keys() == malformed.keys() <= none.keys()
    assert len(right) >= (3 if config.use_process or process != "judge" else 1)  # nobody judges what counts for nothing
    for evidence in right:
        assert min(right[evidence]) > max(wrong[evidence]), evidence
        assert min(wrong[evidence]) >= max(none[evidence]), evidence
        assert min(none[evidence]) > max(malformed[evidence]), evidence


@PROCESS
def test_without_the_outcome_only_a_malformed_step_totals_less(process):
    config = RewardConfig(process=process, use_outcome=False)
    right, wrong, none, malformed = (
        totals_by_evidence(config, BY_END[name]) for name in ("right", "wrong", "none", "malformed")
    )
    for evidence in right:
        assert np.ptp(right[evidence] + wrong[evidence] + none[evidence]) < 1e-5, evidence
        assert min(none[evidence]) > max(malformed[evidence]), evidence


@PROCESS
def test_never_answering_totals_no_more_than_a_wrong_answer_after_the_same_steps(process):
    """Whatever the last search found: at the last step, searching on must not pay more than answering wrongly."""
    wrong = BY_END["wrong"]
    for search in SEARCHES:
        never = [Trajectory(QUESTION, (*t.steps[:-1], search), Status.NO_ANSWER) for t in wrong]
        totals = [[r.sum() for r in score(RewardConfig(process=process), found).rewards] for found in (never, wrong)]
        assert np.all(np.asarray(totals[0]) < np.asarray(totals[1]))


@PROCESS
def test_a_full_context_is_rewarded_as_a_missing_answer(process):
    kinds = [[t for t in BY_END["none"] if t.status == status] for status in OUT_OF_BUDGET]
    for config in (RewardConfig(process=process), RewardConfig(process=process, compat="paper")):
        first, second = (score(config, found).rewards for found in kinds)
        np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))
