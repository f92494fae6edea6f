"""The distribution that a policy's logits stand for: one definition for the sampler and for the trainer."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from r3rag_jax.config import RolloutConfig

CANDIDATES = 128  # most likely tokens among which a nucleus is looked for before all of the vocabulary is


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Which tokens are never sampled; a static argument. What all three of the rules keep is kept.

    A small policy, or a warm one, has thousands of tokens that are never right and together are sampled all the time;
    each of them ends a trajectory, and a policy gradient is mostly about them.
    """

    min_p: float = 0.0  # keep what has at least this share of the largest probability (arXiv 2407.01082)
    top_k: int = 0  # keep so many of the most likely; 0 = all
    top_p: float = 1.0  # keep the fewest of these, most likely first, that hold this share (arXiv 1904.09751)

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
    """Logits [..., V] over the temperature, with those of tokens that `how` leaves out at -inf.

    The share of `top_p` is of what `top_k` keeps, as in transformers and vLLM. Every rule keeps the logits above some
    cut, so tokens of equal logits (rows of new tokens may be the same) are kept or left out together, in any order.
    Costs a maximum for min-p, the CANDIDATES (or k) largest for the others, nothing where all is kept.

    Cuts are values of the logits as they came. A quotient by the temperature is computed anew wherever XLA fuses it,
    in other roundings: a cut among those lost the k-th token at a temperature of 1.4, in the sampler alone.

    Args:
        temperature: float [...], > 0.
        target: int [...], kept in any case: a token sampled before an update may have fallen below since.
        can_branch: whether the devices may branch, see `Target.can_branch`; if not, top-p sorts the vocabulary.
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
    """The smallest logit that top-k and top-p keep, [..., 1], as `largest` and `temperature` are."""

    def weights_of(some: jax.Array) -> jax.Array:
        return jnp.where(some >= cut, jnp.exp((some - largest) / temperature), 0.0)

    V = logits.shape[-1]
    num_candidates = min(V, max(CANDIDATES, top_k)) if can_branch else V
    candidates = lax.top_k(logits, num_candidates)[0]
    cut = jnp.full_like(largest, -jnp.inf)
    if top_k:  # a minimum, not a slice: XLA joins slices, and does not see a top-k any more but a sort (30 x the time)
        is_kept = jnp.arange(num_candidates) < top_k
        cut = jnp.min(jnp.where(is_kept, candidates, jnp.inf), axis=-1, keepdims=True)
    if top_p == 1:
        return cut
    weights = weights_of(logits)
    wanted = top_p * jnp.sum(weights, axis=-1, keepdims=True)
    sums = jnp.cumsum(weights_of(candidates), axis=-1)
    found = jnp.take_along_axis(candidates, jnp.argmax(sums >= wanted, axis=-1, keepdims=True), axis=-1)
    has_found = sums[..., -1:] >= wanted
    if top_k or num_candidates == V:  # behind the candidates come at most tokens that are as likely as the last
        return jnp.where(has_found, found, cut)
    return lax.cond(
        jnp.all(has_found), lambda: found, lambda: jnp.where(has_found, found, _search(logits, weights, wanted))
    )


def _search(logits: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest cut above which there is the wanted weight, by bisection over float32's bits: exact, without a sort.

    32 passes over the vocabulary; a sort of 49,152 logits takes 16 x as long on a CPU.
    """
    places = _place(logits)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough weight from `low` on, too little from `high` on
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        is_enough = jnp.sum(jnp.where(places >= middle, weights, 0.0), axis=-1, keepdims=True) >= wanted
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    bounds = jnp.min(places, axis=-1, keepdims=True), jnp.max(places, axis=-1, keepdims=True) + 1
    low, _ = lax.fori_loop(0, 32, halve, bounds)
    return lax.bitcast_convert_type(_flip(low), jnp.float32)


def _place(x: jax.Array) -> jax.Array:
    """int32 in the order of the float32 it comes from."""
    return _flip(lax.bitcast_convert_type(x, jnp.int32))


def _flip(bits: jax.Array) -> jax.Array:
    """Reverse the order of negative floats, which that of their bits is not; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
