"""Process reward `embedding`: typed-out numbers, and what earns nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.embedding import embedding_relevance, embedding_rewards
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

#                      of the question   (2, 0)
QUERIES_KD = [[5.0, 0.0], [3.0, 4.0], [4.0, 3.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]  # cosines 1 0.6 0.8 0 1 0
PASSAGES_KPD = [
    [[3.0, 4.0], [0.0, 1.0]],  # cosines 0.6 and 0 with the query: the query is the question, the passages decide
    [[3.0, 4.0], [0.0, 1.0]],  # 1 and 0.8: the passage is copied as query, the question decides
    [[24.0, 7.0], [1.0, 0.0]],  # 0.936 (masked), 0.8
    [[0.0, 1.0], [0.0, 1.0]],  # 1, but nothing to do with the question
    [[-1.0, 0.0], [-1.0, 1.0]],  # both negative: 0
    [[1.0, 0.0], [1.0, 1.0]],  # a query without features
]
MASK_KP = [[True, True], [True, True], [False, True], [True, True], [True, True], [True, True]]


def test_embedding_relevance_typed_out_jitted_and_eager():
    arrays = [jnp.array([x]) for x in ([2.0, 0.0], QUERIES_KD, PASSAGES_KPD, MASK_KP)]
    expected = [[0.6, 0.6, 0.8, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(embedding_relevance(*arrays), expected, rtol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(embedding_relevance(*arrays), expected, rtol=1e-6)
    nothing_counts = embedding_relevance(*arrays[:3], jnp.zeros((1, 6, 2), bool))
    np.testing.assert_array_equal(nothing_counts, np.zeros((1, 6)))


def test_embedding_relevance_is_in_tenths():
    angles = jnp.linspace(0, np.pi / 2, 50)
    queries_KD = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    relevance = embedding_relevance(
        jnp.array([[1.0, 0.0]]), queries_KD[None], queries_KD[None, :, None], jnp.ones((1, 50, 1), bool)
    )
    np.testing.assert_allclose(np.unique(relevance), np.arange(11) / 10, rtol=1e-6)


class FakeEncoder:
    """Embeds a text "x y" as the vector (x, y) and counts the texts of each call."""

    dim, fingerprint, cosine_kind = 2, "fake", "passage"

    def __init__(self):
        self.calls = []

    def encode(self, texts, *, kind="query"):
        self.calls.append((kind, len(texts)))
        return np.asarray([text.split() for text in texts], np.float32).reshape(-1, 2)


def search(query, *contents):
    return Step("", query=query, passages=tuple(Passage(f"id of {text}", text) for text in contents))


def relevance(question, *steps, encoder=None):
    trajectory = Trajectory(Question("q", question, ("x",)), (*steps, Step("", answer="x")), Status.ANSWERED)
    return embedding_rewards([trajectory], Resources(max_steps=5, encoder=encoder or FakeEncoder()))[0]


def test_embedding_rewards_of_trajectories():
    trajectories = [
        Trajectory(Question("q", "5 0", ("x",)), (search("4 3", "0 1", "1 0"), Step("", answer="x")), Status.ANSWERED),
        Trajectory(Question("r", "0 1", ("x",)), (search("1 0"), search("3 4", "4 3")), Status.NO_ANSWER),
    ]
    encoder = FakeEncoder()
    rewards = embedding_rewards(trajectories, Resources(max_steps=3, encoder=encoder))
    np.testing.assert_allclose(rewards, [[0.8, 0, 0], [0, 0.8, 0]], rtol=1e-6)
    assert rewards.dtype == np.float32
    # Each text once: both questions and the two queries that found something; the passages.
    assert encoder.calls == [("query", 4), ("passage", 3)]
    with pytest.raises(ValueError, match="this reward term needs an encoder; got none"):
        embedding_rewards(trajectories, Resources(max_steps=3))
    nothing = embedding_rewards([], Resources(max_steps=3, encoder=encoder))
    assert nothing.shape == (0, 3)


def test_what_flattered_the_cosine_of_query_and_passage_earns_nothing():
    # The question as query four times, each time with deeper hits, once earned more than the right answer.
    copied = [search(query, f"1 {n}") for n, query in enumerate(["1 0", " 1  0?", "1 0.", "(1 0)"])]
    np.testing.assert_allclose(relevance("1 0", *copied), [1, 0, 0, 0, 0], rtol=1e-6)
    # Queries about something else are near to what they find, and to nothing that was asked.
    np.testing.assert_array_equal(relevance("1 0", search("0 1", "0 1"), search("0 2", "0 3")), np.zeros(5))


def test_passages_that_were_shown_do_not_count():
    near, far = "4 3", "3 4"
    again = relevance("1 0", search("1 0", near), search("2 0", near), search("3 0", near, far))
    np.testing.assert_allclose(again, [0.8, 0, 0.6, 0, 0], rtol=1e-6)
    # The same text under another id is the same passage, and so is another text under the same id.
    copy, edited = Passage("copy", near), Passage(f"id of {near}", "1 0")
    steps = [search("1 0", near), Step("", query="2 0", passages=(copy,)), Step("", query="3 0", passages=(edited,))]
    np.testing.assert_allclose(relevance("1 0", *steps), [0.8, 0, 0, 0, 0], rtol=1e-6)
