"""Process reward `gain`: typed-out surprisals, what is forced after what, and a stand-in for a policy."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.gain import beginnings, forced_answers, gain_rewards, information_gain, reading_contrast
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

INF, NAN = np.inf, np.nan
QUESTION = Question("q", "Where was its author born?", ("Shrewsbury", "Salop"))
SEARCHES = (
    Step("Who wrote it?", query="author", passages=(Passage("a", '"Origin"\nBy Darwin.'),)),
    Step("It is Darwin. Now his birthplace.", query="Darwin born", passages=(Passage("b", '"Darwin"\nOf Salop.'),)),
)
ANSWER = Step("He is of Salop.", answer="Salop")


@pytest.fixture(scope="module", params=["tags", "steps", "search_r1"])
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    tokenizer = tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Codec(tokenizer, make_protocol(request.param), passage_tokens=60)


def test_information_gain_typed_out() -> None:
    surprisal = [
        [8, 6, 7, 2, INF],  # a quarter; worse again; from the least so far, 6, down to 2; not measured
        [4, 0, 3, 0, 0],  # all of it; nothing is left to gain
        [0, 0, 1, 0, 0],  # never surprised
        [INF, INF, INF, INF, INF],  # no step was well formed
        [4, NAN, 2, INF, INF],  # unknown from the first search on
        [NAN, 1, 1, INF, INF],
    ]
    np.testing.assert_array_equal(
        information_gain(np.asarray(surprisal, np.float32)),
        [[0.25, 0, 0.5, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [NAN, NAN, 0, 0], [NAN, NAN, 0, 0]],
    )


def test_the_gains_of_a_trajectory_add_up_to_at_most_1() -> None:
    surprisal = np.random.default_rng(0).gamma(2.0, 5.0, (200, 6)).astype(np.float32)
    gain = np.asarray(information_gain(surprisal))
    assert (gain >= 0).all() and gain.sum(axis=1).max() <= 1 + 1e-6 and gain.sum(axis=1).max() > 0.9


def test_an_answer_is_tried_after_each_sentence_and_after_all_of_them() -> None:
    assert beginnings("It is Darwin. Now his birthplace.") == ["It is Darwin.", "It is Darwin. Now his birthplace."]
    assert beginnings("no end") == ["no end"]
    assert beginnings("a. b? c! d. e. f.") == ["a.", "a. b?", "a. b? c!", "a. b? c! d. e. f."]


def test_what_is_forced_after_what(codec: Codec) -> None:
    trajectory = Trajectory(QUESTION, (*SEARCHES, ANSWER), Status.ANSWERED)
    decode = codec.tokenizer.decode
    shown = [(level, decode(s.ids[~s.loss_mask]), decode(s.ids[s.loss_mask])) for level, s in
             forced_answers(codec, trajectory)]  # fmt: skip
    assert [level for level, *_ in shown] == [0, 0, 1, 1, 1, 1, 2, 2]
    closing = {"tags": " </answer>", "steps": "<|im_end|>", "search_r1": " </answer>"}[codec.protocol.name]
    assert [answer.strip() for *_, answer in shown] == [f"{a}{closing}".strip() for a in QUESTION.golden_answers] * 4
    before = [context for _, context, _ in shown[::2]]
    assert "Origin" not in before[0] and before[0].count("Who wrote it?") == 1
    assert "By Darwin." in before[1] and "It is Darwin." in before[1] and "birthplace" not in before[1]
    assert "Now his birthplace." in before[2] and "Of Salop." not in before[2]
    assert "Of Salop." in before[3] and "He is of Salop." in before[3]


def test_what_no_well_formed_step_reads_was_not_measured(codec: Codec) -> None:
    for end in ((), (Step("?", is_well_formed=False),)):
        trajectory = Trajectory(QUESTION, (*SEARCHES, *end), Status.NO_ANSWER)
        assert {level for level, _ in forced_answers(codec, trajectory)} == {0, 1}
    assert not list(forced_answers(codec, Trajectory(QUESTION, (Step("?", is_well_formed=False),), Status.NO_ANSWER)))


class Reader:
    """Stands in for a policy: two nats a token of what is forced, or half a nat where the context holds "Of Salop"."""

    def __init__(self, codec: Codec):
        self.codec = codec

    def __call__(self, groups):
        def logprobs(sample):
            knows = "Of Salop" in self.codec.tokenizer.decode(sample.ids[~sample.loss_mask])
            return np.full(sample.loss_mask.sum(), -0.5 if knows else -2.0, np.float32)

        return [[logprobs(sample) for sample in group] for group in groups]


def test_the_search_that_brings_the_answer_is_rewarded_and_the_best_alias_counts(codec: Codec) -> None:
    trajectories = [
        Trajectory(QUESTION, (*SEARCHES, ANSWER), Status.ANSWERED),
        Trajectory(QUESTION, (*SEARCHES, SEARCHES[1], ANSWER), Status.ANSWERED),
        Trajectory(QUESTION, SEARCHES, Status.NO_ANSWER),
    ]
    rewards = gain_rewards(trajectories, Resources(max_steps=4, likelihood=Reader(codec)))
    # The second search tells 3/4, the samples are worth 7/8, 7/8 and 0. All read passage a, the first two read b.
    first, second = (0 + 7 / 12) / 2, (3 / 4 + 7 / 8) / 2
    np.testing.assert_allclose(rewards, [[first, second, 0, 0], [first, second, 0, 0], [first, 0, 0, 0]], rtol=1e-6)
    assert rewards.dtype == np.float32


def sample(ids: str, question: str = "q", is_read: bool = True) -> Trajectory:
    """A trajectory with a search for each group of letters, which shows a passage for each."""
    steps = [Step("x", query=group, passages=tuple(Passage(id, id) for id in group)) for group in ids.split()]
    end = Step("x", answer="?") if is_read else Step("?", is_well_formed=False)
    return Trajectory(Question(question, "?", ("!",)), (*steps, end), Status.ANSWERED)


def test_reading_contrast_typed_out() -> None:
    trajectories = [
        sample("a b"), sample("a c"), sample("a c a"), sample("c d", is_read=False), sample("a", question="other")
    ]  # fmt: skip
    value = np.asarray([1.0, 0.5, 0.0, 0.25, 0.7])
    a, b, c = 1.5 / 3 - 0.25, 1.0 - 0.75 / 3, 0.75 / 3 - 1.0  # of four samples; nobody read d
    found = reading_contrast(trajectories, value, 4)
    np.testing.assert_allclose(
        found, [[a, b, 0, 0], [a, c, 0, 0], [a, c, 0, 0], [c, 0, 0, 0], [0.7, 0, 0, 0]], rtol=1e-6
    )


def test_the_best_new_passage_of_a_search_counts_and_unknown_samples_do_not() -> None:
    trajectories = [sample("ab"), sample("a"), sample("b"), sample("c")]
    found = reading_contrast(trajectories, np.asarray([1.0, 0.5, NAN, NAN]), 2)
    np.testing.assert_allclose(found, [[0.75, 0], [0.75, 0], [0.5, 0], [NAN, 0]], rtol=1e-6)


def test_a_passage_without_a_bearing_wins_nothing_on_average() -> None:
    """Every sample reads a; who reads c is drawn, whatever it is worth."""
    rng = np.random.default_rng(0)
    trajectories, value = [], rng.random(1600)
    for row in range(1600):
        trajectories.append(sample("a c" if rng.random() < 0.5 else "a", question=str(row // 8)))
    found = reading_contrast(trajectories, value, 3)
    of_c = found[[row for row, trajectory in enumerate(trajectories) if trajectory.num_retrievals == 2], 1]
    assert abs(of_c.mean()) < 0.03 and found[:, 0].mean() == pytest.approx(value.mean(), abs=1e-6)


def test_without_a_likelihood_it_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a likelihood; got none"):
        gain_rewards([], Resources(max_steps=4))
