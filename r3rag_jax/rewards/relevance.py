"""Rule-based process rewards: how much the passages of each retrieval step help, without a judge.

Shape suffixes: B trajectories, K steps, P passages of one step, G gold passages, D embedding width.
"""

import jax
import jax.numpy as jnp


@jax.jit
def gold_recall(retrieved_BKP: jax.Array, gold_BG: jax.Array, step_mask_BK: jax.Array) -> jax.Array:
    """1 for each step that brought a gold passage which no earlier step had brought, else 0.

    Repeating a fruitful query therefore earns nothing.

    Args:
        retrieved_BKP: int [B, K, P], passage ids, padded with a negative id.
        gold_BG: int [B, G], ids of the passages that support the answer, padded with a negative id.
        step_mask_BK: bool [B, K], True = the step was taken.

    Returns:
        float32 [B, K].
    """
    found_BKG = jnp.any(retrieved_BKP[:, :, :, None] == gold_BG[:, None, None, :], axis=2)
    found_BKG &= (gold_BG >= 0)[:, None, :] & step_mask_BK[:, :, None]
    # A gold passage is new where the running count of its finds first becomes one.
    new_BKG = found_BKG & (jnp.cumsum(found_BKG, axis=1) == 1)
    return jnp.any(new_BKG, axis=2).astype(jnp.float32)


@jax.jit
def embedding_similarity(query_BKD: jax.Array, docs_BKPD: jax.Array, doc_mask_BKP: jax.Array) -> jax.Array:
    """Cosine of the query and its best passage, clipped to [0, 1] and in tenths like the paper's.

    Args:
        query_BKD: float [B, K, D], embedded queries; need not be unit vectors.
        docs_BKPD: float [B, K, P, D], embedded passages.
        doc_mask_BKP: bool [B, K, P], True = keep.

    Returns:
        float32 [B, K]; 0 for a step without passages.
    """
    query_BKD, docs_BKPD = query_BKD.astype(jnp.float32), docs_BKPD.astype(jnp.float32)
    dot_BKP = jnp.sum(query_BKD[:, :, None, :] * docs_BKPD, axis=-1)
    norms_BKP = jnp.linalg.norm(query_BKD, axis=-1)[:, :, None] * jnp.linalg.norm(docs_BKPD, axis=-1)
    cosine_BKP = jnp.where(doc_mask_BKP, dot_BKP / jnp.maximum(norms_BKP, 1e-12), 0.0)
    return jnp.round(jnp.clip(jnp.max(cosine_BKP, axis=-1, initial=0.0), 0.0, 1.0) * 10) / 10
