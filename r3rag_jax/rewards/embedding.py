"""Process reward `embedding`: similarity of a query and the best of its passages, by a text encoder.

Shape suffixes: B trajectories, K steps, P passages of one step, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from r3rag_jax.rewards.base import Resources, next_power_of_two, required
from r3rag_jax.types import Trajectory


def embedding_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """`embedding_similarity` of the trajectories, float32 [B, K]; 0 for steps without a query or without passages.

    Raises:
        ValueError: there is no encoder.
    """
    encoder = required(resources.encoder, "an encoder")
    num, num_passages = len(trajectories), max((len(s.passages) for t in trajectories for s in t.steps), default=1)
    shape_BK, P = (next_power_of_two(num), resources.max_steps), next_power_of_two(num_passages)
    searches = [
        (row, k, step.query, [passage.contents for passage in step.passages])
        for row, trajectory in enumerate(trajectories)
        for k, step in enumerate(trajectory.steps)
        if step.query is not None and step.passages
    ]
    # Two calls of the encoder in all, each text once: a batch on a device costs little more than one text.
    query_rows = {text: i for i, text in enumerate(dict.fromkeys(query for _, _, query, _ in searches))}
    passage_rows = {text: i for i, text in enumerate(dict.fromkeys(text for *_, texts in searches for text in texts))}
    query_vectors = encoder.encode(list(query_rows))
    passage_vectors = encoder.encode(list(passage_rows), kind=encoder.cosine_kind)
    query_BKD = np.zeros((*shape_BK, encoder.dim), np.float32)
    passages_BKPD = np.zeros((*shape_BK, P, encoder.dim), np.float32)
    passage_mask_BKP = np.zeros((*shape_BK, P), bool)
    for row, k, query, texts in searches:
        query_BKD[row, k] = query_vectors[query_rows[query]]
        passages_BKPD[row, k, : len(texts)] = passage_vectors[[passage_rows[text] for text in texts]]
        passage_mask_BKP[row, k, : len(texts)] = True
    return np.asarray(embedding_similarity(query_BKD, passages_BKPD, passage_mask_BKP))[:num]


@jax.jit
def embedding_similarity(query_BKD: jax.Array, passages_BKPD: jax.Array, passage_mask_BKP: jax.Array) -> jax.Array:
    """Cosine of a query and its most similar passage, clipped to [0, 1] and rounded to tenths as in arXiv 2505.23794.

    Args:
        query_BKD: float [B, K, D], embedded queries; need not be unit vectors.
        passages_BKPD: float [B, K, P, D], embedded passages; need not be unit vectors.
        passage_mask_BKP: bool [B, K, P], True = keep.

    Returns:
        float32 [B, K]; 0 for a step without passages.
    """
    query_BKD, passages_BKPD = query_BKD.astype(jnp.float32), passages_BKPD.astype(jnp.float32)
    dot_BKP = jnp.sum(query_BKD[:, :, None, :] * passages_BKPD, axis=-1)
    norms_BKP = jnp.linalg.norm(query_BKD, axis=-1)[:, :, None] * jnp.linalg.norm(passages_BKPD, axis=-1)
    cosine_BKP = jnp.where(passage_mask_BKP, dot_BKP / jnp.maximum(norms_BKP, 1e-12), 0.0)
    return jnp.round(jnp.clip(jnp.max(cosine_BKP, axis=-1, initial=0.0), 0.0, 1.0) * 10) / 10
