"""Process reward `embedding`: typed-out numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.embedding import embedding_rewards, embedding_similarity
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory


def test_embedding_similarity():
    query_BKD = jnp.array([[[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    passages_BKPD = jnp.array(
        [
            [
                [[3.0, 4.0], [0.0, 1.0]],  # cosines 0.6 and 0
                [[-1.0, 0.0], [-1.0, 1.0]],  # both negative: clipped to 0
                [[1.0, 0.0], [0.8, 0.6]],  # the best is masked: 0.8
                [[1.0, 0.0], [1.0, 1.0]],  # a zero query
            ]
        ]
    )
    passage_mask_BKP = jnp.ones((1, 4, 2), bool).at[0, 2, 0].set(False)
    process_BK = embedding_similarity(query_BKD, passages_BKPD, passage_mask_BKP)
    np.testing.assert_allclose(process_BK, [[0.6, 0.0, 0.8, 0.0]], rtol=1e-6)
    no_docs = embedding_similarity(query_BKD, passages_BKPD, jnp.zeros((1, 4, 2), bool))
    np.testing.assert_array_equal(no_docs, np.zeros((1, 4)))


def test_embedding_similarity_is_in_tenths():
    angles = jnp.linspace(0, np.pi / 2, 50)
    passages_BKPD = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)[None, :, None, :]
    query_BKD = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 50, 2))
    process_BK = embedding_similarity(query_BKD, passages_BKPD, jnp.ones((1, 50, 1), bool))
    np.testing.assert_allclose(np.unique(process_BK), np.arange(11) / 10, rtol=1e-6)


class FakeEncoder:
    """Embeds a text "x y" as the vector (x, y) and counts the texts of each call."""

    dim, fingerprint, cosine_kind = 2, "fake", "passage"

    def __init__(self):
        self.calls = []

    def encode(self, texts, *, kind="query"):
        self.calls.append((kind, len(texts)))
        return np.asarray([text.split() for text in texts], np.float32).reshape(-1, 2)


def test_embedding_rewards_of_trajectories():
    near, far = Passage("a", "4 3"), Passage("b", "0 1")
    question, search = Question("q", "?", ("x",)), Step("", query="2 0", passages=(far, near))
    trajectories = [
        Trajectory(question, (search, search, Step("", answer="x")), Status.ANSWERED),
        Trajectory(question, (Step("", query="1 0"), Step("", query="0 9", passages=(near,))), Status.NO_ANSWER),
    ]
    encoder = FakeEncoder()
    rewards = embedding_rewards(trajectories, Resources(max_steps=4, encoder=encoder))
    np.testing.assert_allclose(rewards, [[0.8, 0.8, 0, 0], [0, 0.6, 0, 0]], rtol=1e-6)
    assert rewards.dtype == np.float32
    assert encoder.calls == [("query", 2), ("passage", 2)]  # each text once; a query without passages is not embedded
    with pytest.raises(ValueError, match="this reward term needs an encoder; got none"):
        embedding_rewards(trajectories, Resources(max_steps=4))
