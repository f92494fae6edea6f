"""The distribution that tokens are sampled from, as a function of the logits; shared by the sampler and the trainer."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from r3rag_jax.config import RolloutConfig

CANDIDATES = 128  # top-p searches this many of the most likely tokens before it searches the whole vocabulary


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Rules that exclude unlikely tokens from sampling; a token must pass all three. Static in jitted functions.

    Without truncation a small policy, or one at a high temperature, often samples from the long tail of unlikely
    tokens. Each of these tokens spoils its trajectory, and they would dominate the policy gradient.
    """

    min_p: float = 0.0  # keep tokens with at least min_p times the largest probability (arXiv 2407.01082)
    top_k: int = 0  # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # of these keep the smallest set with this probability mass (arXiv 1904.09751)

    @classmethod
    def of(cls, config: RolloutConfig) -> Truncation:
        return cls(config.min_p, config.top_k_tokens, config.top_p)


WHOLE = Truncation()


def truncate(
    logits: jax.Array,
    temperature: jax.Array,
    how: Truncation,
    target: jax.Array | None = None,
    *,
    can_branch: bool = True,
) -> jax.Array:
    """Return logits / temperature, [..., V], with -inf for the tokens that `how` excludes.

    The mass of `top_p` is relative to the tokens that `top_k` keeps, as in transformers and vLLM. Every rule keeps the
    logits from a threshold on, so tokens with equal logits are kept or excluded together.

    Thresholds are compared with the logits before the division by the temperature. XLA recomputes the quotient in each
    fusion with different rounding, so that a threshold on quotients could exclude the k-th token.

    Args:
        logits: float32 [..., V].
        temperature: float [...], > 0.
        target: int [...], a token that is always kept: after an update of the policy, a token that was sampled before
            it may lie below the threshold.
        can_branch: see `Target.can_branch`; if False, top-p sorts the whole vocabulary.
    """
    temperature = temperature[..., None]
    top_k = how.top_k if how.top_k < logits.shape[-1] else 0
    if how.min_p == 0 and top_k == 0 and how.top_p == 1:
        return logits / temperature
    raw, scale = lax.stop_gradient((logits, temperature))
    largest = jnp.max(raw, axis=-1, keepdims=True)
    keep = jnp.ones(raw.shape, bool)
    if how.min_p:
        keep = raw >= largest + scale * math.log(how.min_p)
    if top_k or how.top_p < 1:
        keep &= raw >= _cut(raw, largest, scale, top_k, how.top_p, can_branch)
    if target is not None:
        keep |= jnp.arange(logits.shape[-1]) == target[..., None]
    return jnp.where(keep, logits / temperature, -jnp.inf)


def _cut(
    logits: jax.Array, largest: jax.Array, temperature: jax.Array, top_k: int, top_p: float, can_branch: bool
) -> jax.Array:
    """The smallest logit that top-k and top-p keep, [..., 1]; `largest` and `temperature` are [..., 1] too."""

    def weights_of(logits: jax.Array) -> jax.Array:
        return jnp.where(logits >= cut, jnp.exp((logits - largest) / temperature), 0.0)

    V = logits.shape[-1]
    num_candidates = min(V, max(CANDIDATES, top_k)) if can_branch else V
    candidates = lax.top_k(logits, num_candidates)[0]
    cut = jnp.full_like(largest, -jnp.inf)
    if top_k:  # a masked minimum: with a slice XLA turns the top-k into a full sort (30 x the time)
        is_kept = jnp.arange(num_candidates) < top_k
        cut = jnp.min(jnp.where(is_kept, candidates, jnp.inf), axis=-1, keepdims=True)
    if top_p == 1:
        return cut
    weights = weights_of(logits)
    wanted = top_p * jnp.sum(weights, axis=-1, keepdims=True)
    sums = jnp.cumsum(weights_of(candidates), axis=-1)
    found = jnp.take_along_axis(candidates, jnp.argmax(sums >= wanted, axis=-1, keepdims=True), axis=-1)
    has_found = sums[..., -1:] >= wanted
    if top_k or num_candidates == V:  # all kept tokens are among the candidates, or tie with the last
        return jnp.where(has_found, found, cut)
    return lax.cond(
        jnp.all(has_found), lambda: found, lambda: jnp.where(has_found, found, _search(logits, weights, wanted))
    )


def _search(logits: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """Largest threshold [..., 1] such that the weights of the logits >= it sum to at least `wanted` [..., 1].

    Bisection over the bits of float32 makes the result exact without a sort. It takes 32 passes over the vocabulary; on
    a CPU a sort of 49,152 logits takes 16 x as long.
    """
    ordered = _ordered_int(logits)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # logits >= low have enough weight, logits >= high do not
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        is_enough = jnp.sum(jnp.where(ordered >= middle, weights, 0.0), axis=-1, keepdims=True) >= wanted
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    bounds = jnp.min(ordered, axis=-1, keepdims=True), jnp.max(ordered, axis=-1, keepdims=True) + 1
    low, _ = lax.fori_loop(0, 32, halve, bounds)
    return lax.bitcast_convert_type(_flip(low), jnp.float32)


def _ordered_int(x: jax.Array) -> jax.Array:
    """Map float32 to int32 such that integers compare like the floats."""
    return _flip(lax.bitcast_convert_type(x, jnp.int32))


def _flip(bits: jax.Array) -> jax.Array:
    """Invert the low 31 bits of negative numbers: their bit patterns then ascend with the float. Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
