"""Process reward `embedding`: how near a query is to the question *and* to what it found, by a text encoder.

    relevance = min(cos(question, query), max_p cos(query, passage_p))        over the new passages of the step

Either cosine alone can be flattered: any query resembles the passages that a retriever ranks by that very cosine, and
any paraphrase resembles the question. Their minimum is high only for a query about the question that found something
about itself. A search that repeats an earlier query of its trajectory earns 0, and so does one that shows no passage
that the earlier steps had not shown (`novelty.py`).

Question and query are both encoded as queries, so encoders with prefixes (E5: `query: `, `passage: `) compare like
with like; passages are encoded as the encoder's `cosine_kind` says.

Shape suffixes: B trajectories, K steps, P passages of one step, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from r3rag_jax.parallel.processes import from_process_0
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.rewards.base import Resources, next_power_of_two, required
from r3rag_jax.rewards.novelty import new_searches
from r3rag_jax.types import Trajectory


def embedding_rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    """`embedding_relevance` of the searches that bring something new, float32 [B, K]; 0 for all other steps.

    Of several processes, process 0 alone has the encoder and computes; all get the same numbers.

    Raises:
        ValueError: there is no encoder.
        UserError: the server that encodes failed.
    """
    # Named by what is scored: asynchronous rollouts may be scored beside an update, in a thread.
    name = digest(text for t in trajectories for text in (t.question.id, *(step.query or "" for step in t.steps)))
    return from_process_0(lambda: _rewards(trajectories, resources), f"embedding rewards {name}")


def _rewards(trajectories: Sequence[Trajectory], resources: Resources) -> np.ndarray:
    encoder = required(resources.encoder, "an encoder")
    searches = list(new_searches(trajectories))
    num, num_passages = len(trajectories), max((len(passages) for *_, passages in searches), default=1)
    shape_BK, P = (next_power_of_two(num), resources.max_steps), next_power_of_two(num_passages)
    # Two calls of the encoder in all, each text once: a batch on a device costs little more than one text.
    query_rows = _rows(
        text
        for i, k, _ in searches
        for text in (trajectories[i].question.question, trajectories[i].steps[k].query or "")
    )
    passage_rows = _rows(passage.contents for *_, passages in searches for passage in passages)
    query_vectors = encoder.encode(list(query_rows))
    passage_vectors = encoder.encode(list(passage_rows), kind=encoder.cosine_kind)
    question_BD = np.zeros((shape_BK[0], encoder.dim), np.float32)
    query_BKD = np.zeros((*shape_BK, encoder.dim), np.float32)
    passages_BKPD = np.zeros((*shape_BK, P, encoder.dim), np.float32)
    passage_mask_BKP = np.zeros((*shape_BK, P), bool)
    for i, k, passages in searches:
        question_BD[i] = query_vectors[query_rows[trajectories[i].question.question]]
        query_BKD[i, k] = query_vectors[query_rows[trajectories[i].steps[k].query or ""]]
        passages_BKPD[i, k, : len(passages)] = passage_vectors[[passage_rows[p.contents] for p in passages]]
        passage_mask_BKP[i, k, : len(passages)] = True
    return np.asarray(embedding_relevance(question_BD, query_BKD, passages_BKPD, passage_mask_BKP))[:num]


def _rows(texts: Iterable[str]) -> dict[str, int]:
    """Text -> its row, each text once."""
    return {text: row for row, text in enumerate(dict.fromkeys(texts))}


@jax.jit
def embedding_relevance(
    question_BD: jax.Array, query_BKD: jax.Array, passages_BKPD: jax.Array, passage_mask_BKP: jax.Array
) -> jax.Array:
    """The smaller of two cosines, question with query and query with its best passage, in [0, 1] and in tenths.

    Tenths as in arXiv 2505.23794. Vectors need not have norm 1.

    Args:
        question_BD: float [B, D], embedded questions.
        query_BKD: float [B, K, D], embedded queries.
        passages_BKPD: float [B, K, P, D], embedded passages.
        passage_mask_BKP: bool [B, K, P], True = the passage counts.

    Returns:
        float32 [B, K]; 0 for a step without a passage that counts.
    """
    question_BD, query_BKD, passages_BKPD = map(_unit, (question_BD, query_BKD, passages_BKPD))
    to_question_BK = jnp.einsum("bd,bkd->bk", question_BD, query_BKD)
    to_passage_BKP = jnp.einsum("bkd,bkpd->bkp", query_BKD, passages_BKPD)
    to_best_BK = jnp.max(jnp.where(passage_mask_BKP, to_passage_BKP, 0.0), axis=-1, initial=0.0)
    return jnp.round(jnp.clip(jnp.minimum(to_question_BK, to_best_BK), 0.0, 1.0) * 10) / 10


def _unit(x: jax.Array) -> jax.Array:
    """Vectors scaled to norm 1, float32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
