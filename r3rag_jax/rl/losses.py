"""Masked token losses, and log-probabilities that never hold [T, V] at once.

Shape suffixes: B rows, L tokens of a row, T tokens, D width, V vocabulary, C tokens of one chunk, K chunks.
Token losses take arrays of any one shape; masks are bool, True = keep; sums run in float32.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from r3rag_jax.models.matmul import turned
from r3rag_jax.parallel.mesh import collectives_race
from r3rag_jax.sampler.distribution import WHOLE, Truncation, truncate

# exp(20) is 5e8: far outside any clip range, yet finite: one stray token cannot blow a loss up.
_MAX_LOG_RATIO = 20.0


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the kept entries, float32 scalar; 0 when nothing is kept."""
    total = jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0))
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def loss_mean(
    x: jax.Array,
    mask: jax.Array,
    shares: jax.Array,
    *,
    kind: Literal["token", "sequence", "constant"],
    length: float,
) -> jax.Array:
    """One number from a batch's tokens; a sequence is a trajectory, n_i its kept tokens, N their number in the batch.

        token     sum_t x_t / sum_i n_i            every token counts alike (DAPO, arXiv 2503.14476, eq. 12)
        sequence  1/N sum_i 1/n_i sum_t x_t        every trajectory counts alike (GRPO, arXiv 2402.03300, eq. 3)
        constant  1/N sum_i 1/length sum_t x_t     no bias towards short right or long wrong ones
                                                   (Dr. GRPO, arXiv 2503.20783)

    A trajectory whose tokens lie in several batches counts in each for the share of its tokens there.

    Args:
        x: float [...], per token. mask: bool, same shape, True = keep; the rest may hold anything.
        shares: float, same shape, 1 / n_i, the token's share of its whole trajectory.
        length: of constant: tokens that a trajectory's sum is divided by.

    Returns:
        float32 scalar; 0 when nothing is kept.

    Raises:
        ValueError: kind is none of the three.
    """
    if kind == "token":
        return masked_mean(x, mask)
    if kind not in ("sequence", "constant"):
        raise ValueError(f"kind of loss mean must be one of token, sequence, constant; got {kind!r}")
    shares = jnp.where(mask, shares.astype(jnp.float32), 0.0)
    num_sequences = jnp.sum(shares)
    weights = shares if kind == "sequence" else jnp.where(mask, 1.0 / length, 0.0)
    total = jnp.sum(weights * jnp.where(mask, x.astype(jnp.float32), 0.0))
    return total / jnp.where(num_sequences > 0, num_sequences, 1.0)


def ppo_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: float,
    clip_high: float | None = None,
    weights: jax.Array | None = None,
    mean: Callable[[jax.Array, jax.Array], jax.Array] = masked_mean,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate loss, - mean_t w_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip_high) A_t).

    rho_t = exp(logprobs_t - old_logprobs_t) (arXiv 1707.06347, eq. 7; two bounds: arXiv 2503.14476, eq. 10); the
    log-ratio is held within +-20, which no clip range reaches.

    Args:
        logprobs: float [...], of the sampled tokens under the policy being trained.
        old_logprobs: same shape, under the policy that the clip keeps it close to, at the same temperature: recorded
            while sampling, or recomputed before the first update, and then with the weights of `truncated_weights`.
        advantages: same shape, taken as constants.
        mask: bool, same shape, True = keep; the rest may hold anything.
        clip: how far below 1 the ratio is trusted.
        clip_high: how far above; None: as far as below.
        weights: float, same shape, taken as constants; None: 1.
        mean: of the tokens' terms and the mask, e.g. `loss_mean`.

    Returns:
        The scalar loss, and stats: `clip_fraction`, the share of kept tokens with a ratio out of its range,
        `approx_kl`, the mean of rho - 1 - log rho, an estimate of KL(old, policy) in nats per token, and
        `displacement`, the mean log-ratio of what did better than expected: a policy that makes *that* less likely
        is on its way to a collapse (likelihood displacement, arXiv 2410.08847).
    """
    log_ratio = jnp.where(mask, (logprobs - old_logprobs).astype(jnp.float32), 0.0)
    log_ratio = jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    low, high = 1 - clip, 1 + (clip if clip_high is None else clip_high)
    advantages = lax.stop_gradient(jnp.where(mask, advantages.astype(jnp.float32), 0.0))
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
    if weights is not None:
        surrogate = surrogate * lax.stop_gradient(jnp.where(mask, weights.astype(jnp.float32), 0.0))
    stats = {
        "clip_fraction": masked_mean((ratio < low) | (ratio > high), mask),
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "displacement": masked_mean(log_ratio, mask & (advantages > 0)),
    }
    return -mean(surrogate, mask), lax.stop_gradient(stats)


def truncated_weights(
    old_logprobs: jax.Array, behaviour_logprobs: jax.Array, mask: jax.Array, limit: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Importance weights of tokens that another policy sampled, or this one in other numerics: min(pi_old / mu, limit).

    Truncated as in V-trace (arXiv 1802.01561, eq. 1); with a ratio against pi_old in the surrogate it is the decoupled
    objective of arXiv 2110.00641. Where mu is pi_old all weights are 1.

    Args:
        old_logprobs: float [...], log pi_old of the sampled tokens, before the first update.
        behaviour_logprobs: same shape, log mu, recorded while sampling; both at the sampling temperature.
        mask: bool, same shape, True = keep; the rest may hold anything.

    Returns:
        weights, float32 of the same shape, 0 where not kept, and stats: `weight`, their mean, and
        `truncated_fraction`, the share at the limit.
    """
    log_ratio = jnp.where(mask, (old_logprobs - behaviour_logprobs).astype(jnp.float32), 0.0)
    ratio = jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO))
    weights = jnp.where(mask, jnp.minimum(ratio, limit), 0.0)
    return weights, {"weight": masked_mean(weights, mask), "truncated_fraction": masked_mean(ratio > limit, mask)}


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float
) -> jax.Array:
    """Half the squared error of the values, pessimistic about moves of more than `clip`.

        1/2 mean_t max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -clip, clip) - R_t)^2)

    Args:
        values: float [...], of the value model being trained.
        old_values: same shape, of the value model that gave the advantages.
        returns: same shape, regression targets.
        mask: bool, same shape, True = keep; the rest may hold anything.
        clip: largest useful move, in units of the reward; `inf` turns the clipping off.

    Returns:
        The scalar loss.
    """
    values, old_values, returns = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (values, old_values, returns))
    old_values, returns = lax.stop_gradient((old_values, returns))
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    error = jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
    return 0.5 * masked_mean(error, mask)


def kl_penalty(logprobs: jax.Array, ref_logprobs: jax.Array, kind: Literal["k1", "k2", "k3"]) -> jax.Array:
    """Per-token estimate of KL(policy, reference) in nats, from tokens the policy sampled.

    With d = logprobs - ref_logprobs: k1 = d (unbiased, noisy; the penalty of PPO), k2 = d^2 / 2
    (low variance, biased), k3 = exp(-d) - 1 + d (unbiased, never negative; the KL loss of GRPO).
    As a loss, differentiated through `logprobs`: the gradient of k1 is 0 on average, so it teaches nothing; that of k2
    is the gradient of KL(policy, reference), that of k3 of KL(reference, policy) (both on average, for tokens that
    today's policy sampled).
    Source: J. Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: float [...], of the sampled tokens under the policy.
        ref_logprobs: same shape, under the reference policy.
        kind: which estimator.

    Returns:
        float32 of the same shape, unmasked.

    Raises:
        ValueError: kind is none of the three.
    """
    diff = (logprobs - ref_logprobs).astype(jnp.float32)
    if kind == "k1":
        return diff
    if kind == "k2":
        return 0.5 * jnp.square(diff)
    if kind == "k3":
        diff = jnp.clip(diff, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        return jnp.expm1(-diff) + diff
    raise ValueError(f"kind of KL estimate must be one of k1, k2, k3; got {kind!r}")


def adapted_kl(coefficient: float, kl: float, target: float, rate: float) -> float:
    """The next coefficient of a KL penalty: beta (1 + rate clip((kl - target) / target, -0.2, 0.2)).

    The proportional controller of arXiv 1909.08593, section 2.2, where the rate is 0.1.

    Args:
        kl: measured, of any estimate and unit; `target` in the same.
    """
    return coefficient * (1.0 + rate * min(max((kl - target) / target, -0.2), 0.2))


def chunked_logprobs(
    hidden_BLD: jax.Array,
    weight: jax.Array,
    targets_BL: jax.Array,
    temperature_BL: jax.Array,
    mask_BL: jax.Array,
    *,
    chunk: int,
    tied: bool = False,
    truncation: Truncation = WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each kept target and entropy of its distribution, at the given temperatures.

    p_t = softmax(truncate(hidden_t weight, temperature_t, truncation)). The logits exist for at most `chunk` tokens
    at a time, in float32, and are recomputed in the backward pass; tokens that are not kept cost nothing
    but the fill of a row's last chunk.

    Args:
        hidden_BLD: float [B, L, D], final hidden states.
        weight: float [D, V], output projection; [V, D] where `tied`, embeddings as they lie. (What a loop closes over
            is stored whole: transposed before it, they would be copied.)
        targets_BL: int [B, L], ids in [0, V); anything where not kept.
        temperature_BL: float [B, L], > 0.
        mask_BL: bool [B, L], True = keep.
        chunk: most tokens whose logits exist at once (at least one of each row does).
        tied: whether `weight` is a table of embeddings.
        truncation: what the tokens were sampled with.

    Returns:
        logprobs_BL and entropy_BL in nats, float32 [B, L], 0 where not kept, differentiable in
        hidden, weight and temperature.

    Raises:
        ValueError: chunk is not positive.
    """
    chunks = _Chunks(mask_BL.astype(bool), chunk)
    # Round trip through float32: XLA removes it, but the gradient of the weight, which the loop
    # accumulates in the dtype of what it closes over, is then summed in float32. In bfloat16 a sum
    # stalls after 256 chunks.
    wide = weight.astype(jnp.float32)

    def one_chunk(hidden_CD, targets_C, temperature_C, mask_C):
        temperature_C = jnp.where(mask_C, temperature_C.astype(jnp.float32), 1.0)
        logits_CV = _dot(hidden_CD, _projection(wide.astype(weight.dtype), tied))
        logits_CV = truncate(logits_CV, temperature_C, truncation, targets_C)
        lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
        all_CV = jnp.where(jnp.isfinite(logits_CV), logits_CV - lse_C[:, None], 0.0)
        entropy_C = -jnp.sum(jnp.exp(logits_CV - lse_C[:, None]) * all_CV, axis=-1)
        return jnp.where(mask_C, jnp.stack([_target_logits(logits_CV, targets_C) - lse_C, entropy_C]), 0.0)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # around the choice: inside, each chunk would keep the weight
    def if_kept(inputs):
        *chunk, any_kept = inputs
        skip = jnp.zeros((2, chunk[0].shape[0]), jnp.float32)
        return _if_kept(any_kept, lambda: one_chunk(*chunk), lambda: skip)

    inputs = (*map(chunks.split, (hidden_BLD, targets_BL, temperature_BL)), chunks.mask_KC, chunks.any_K)
    found_K2C = lax.map(if_kept, inputs)
    return chunks.join(found_K2C[:, 0]), chunks.join(found_K2C[:, 1])


def cross_entropy(
    hidden_BLD: jax.Array,
    weight: jax.Array,
    targets_BL: jax.Array,
    mask_BL: jax.Array,
    *,
    chunk: int,
    tied: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Token-mean cross-entropy whose gradient is formed chunk by chunk in the forward pass.

    While a chunk's logits are at hand, so is d loss / d logits = (softmax - onehot) / count: the
    pullback to hidden and weight is taken there, and the logits are neither kept nor recomputed.
    Without differentiation only the forward part runs. Gradients of the weight are summed in
    float32. Tokens that are not kept cost nothing but the fill of a row's last chunk.

    Args:
        hidden_BLD: float [B, L, D], final hidden states.
        weight: float [D, V], output projection; [V, D] where `tied`, embeddings as they lie. (What a loop closes over
            is stored whole: transposed before it, they would be copied.)
        targets_BL: int [B, L], ids in [0, V); anything where not kept.
        mask_BL: bool [B, L], True = keep.
        chunk: most tokens whose logits exist at once (at least one of each row does).
        tied: whether `weight` is a table of embeddings.

    Returns:
        (loss, accuracy), float32 scalars: mean nats per kept token, and the share of kept tokens
        whose target is the argmax (no gradient). Both are 0 when nothing is kept.

    Raises:
        ValueError: chunk is not positive.
    """
    chunks = _Chunks(mask_BL.astype(bool), chunk)
    inputs = chunks.split(hidden_BLD), weight, chunks.split(targets_BL), chunks.mask_KC, chunks.any_K
    return _cross_entropy(tied, *inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(tied, hidden_KCD, weight, targets_KC, mask_KC, any_K):
    def one_chunk(hidden_CD, targets_C, mask_C):
        return _chunk_sums(_dot(hidden_CD, _projection(weight, tied)), targets_C, mask_C)[0]

    def if_kept(sums, inputs):
        *chunk, any_kept = inputs
        return _if_kept(any_kept, lambda: sums + one_chunk(*chunk), lambda: sums), None

    sums, _ = lax.scan(if_kept, jnp.zeros(2, jnp.float32), (hidden_KCD, targets_KC, mask_KC, any_K))
    loss, accuracy = sums / _count(mask_KC)
    return loss, accuracy


def _cross_entropy_forward(tied, hidden_KCD, weight, targets_KC, mask_KC, any_K):
    scale = 1.0 / _count(mask_KC)

    def one_chunk(carry, hidden_CD, targets_C, mask_C):
        sums, grad_weight = carry
        logits_CV = _dot(hidden_CD, _projection(weight, tied))
        chunk_sums, exps_CV, total_C = _chunk_sums(logits_CV, targets_C, mask_C)
        grad_CV = exps_CV.at[jnp.arange(len(targets_C)), targets_C].add(-total_C, mode="drop")
        grad_CV = (grad_CV * jnp.where(mask_C, scale / total_C, 0.0)[:, None]).astype(weight.dtype)
        left, right = (grad_CV, hidden_CD) if tied else (hidden_CD, grad_CV)
        grad_weight += _dot(turned(left), right)
        grad_hidden_CD = _dot(grad_CV, weight if tied else turned(weight))
        return (sums + chunk_sums, grad_weight), grad_hidden_CD.astype(hidden_CD.dtype)

    def if_kept(carry, inputs):
        *chunk, any_kept = inputs
        skip = jnp.zeros_like(chunk[0])
        return _if_kept(any_kept, lambda: one_chunk(carry, *chunk), lambda: (carry, skip))

    start = jnp.zeros(2, jnp.float32), jnp.zeros(weight.shape, jnp.float32)
    (sums, grad_weight), grad_hidden_KCD = lax.scan(if_kept, start, (hidden_KCD, targets_KC, mask_KC, any_K))
    loss, accuracy = sums * scale
    return (loss, accuracy), (grad_hidden_KCD, grad_weight.astype(weight.dtype))


def _cross_entropy_backward(tied, grads, cotangents):
    cotangent, _ = cotangents  # the accuracy is piecewise constant
    grad_hidden_KCD, grad_weight = ((cotangent * g).astype(g.dtype) for g in grads)
    return grad_hidden_KCD, grad_weight, None, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _chunk_sums(logits_CV, targets_C, mask_C):
    """Return ([sum of nats, number right] over the kept tokens, exp(logits - the largest of a token), their sums)."""
    largest_C = jnp.max(logits_CV, axis=-1)
    exps_CV = lax.optimization_barrier(jnp.exp(logits_CV - largest_C[:, None]))  # once for all who read them
    total_C = jnp.sum(exps_CV, axis=-1)
    target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1, mode="clip")[:, 0]
    nats_C = largest_C + jnp.log(total_C) - target_C
    # Right is the first of the largest: their argmax, for which XLA's CPU backend takes ten times as long.
    is_before_CV = lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1) < targets_C[:, None]
    right_C = (target_C == largest_C) & ~jnp.any((logits_CV == largest_C[:, None]) & is_before_CV, axis=-1)
    sums_2C = jnp.where(mask_C, jnp.stack([nats_C, right_C.astype(jnp.float32)]), 0.0)
    return jnp.sum(sums_2C, axis=1), exps_CV, total_C


def _projection(weight, tied):
    """[D, V] of what may be [V, D]."""
    return turned(weight) if tied else weight


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _target_logits(logits_CV, targets_C):
    # A compare-and-sum, not a gather: its gradient is then a select, not a scatter.
    is_target_CV = lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1) == targets_C[:, None]
    return jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=-1)


def _count(mask_KC):
    return jnp.maximum(jnp.sum(mask_KC, dtype=jnp.float32), 1.0)


def _if_kept(any_kept, compute, skip):
    """compute(), or skip() where no token of the chunk is kept."""
    return compute() if collectives_race() else lax.cond(any_kept, compute, skip)


class _Chunks:
    """Rows of tokens, the kept ones first, cut into K chunks of C tokens: so many columns of every row.

    Rows stay whole and in order, so an axis of rows that is sharded over devices stays where it is and every
    device works on every chunk; the last chunks hold no kept token. Where loops are not safe all is one chunk.
    """

    def __init__(self, mask_BL: jax.Array, chunk: int):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token; got {chunk}")
        self._shape = B, L = mask_BL.shape
        self._columns = L if collectives_race() else min(L, max(1, chunk // B))
        self._num_chunks = -(-L // self._columns)
        self._order_BL = jnp.argsort(~mask_BL, axis=1, stable=True)
        self._inverse_BL = jnp.argsort(self._order_BL, axis=1)
        self.mask_KC = self.split(mask_BL)
        self.any_K = jnp.any(self.mask_KC, axis=1)

    def split(self, x_BL: jax.Array) -> jax.Array:
        """[B, L, ...] -> [K, C, ...], padded with zeros."""
        x_BL = _permute(x_BL, self._order_BL, self._inverse_BL)
        (B, L), K, columns = self._shape, self._num_chunks, self._columns
        x_BL = jnp.pad(x_BL, [(0, 0), (0, K * columns - L)] + [(0, 0)] * (x_BL.ndim - 2))
        return jnp.moveaxis(x_BL.reshape(B, K, columns, *x_BL.shape[2:]), 1, 0).reshape(K, B * columns, *x_BL.shape[2:])

    def join(self, x_KC: jax.Array) -> jax.Array:
        """Undo `split`."""
        (B, L), K, columns = self._shape, self._num_chunks, self._columns
        x_BL = jnp.moveaxis(x_KC.reshape(K, B, columns), 0, 1).reshape(B, K * columns)[:, :L]
        return _permute(x_BL, self._inverse_BL, self._order_BL)


@jax.custom_vjp
def _permute(x_BL, order_BL, inverse_BL):
    """Each row in the given order. The gradient is a gather with the inverse, where XLA would scatter."""
    return _permute_forward(x_BL, order_BL, inverse_BL)[0]


def _permute_forward(x_BL, order_BL, inverse_BL):
    index = order_BL.reshape(order_BL.shape + (1,) * (x_BL.ndim - 2))
    return jnp.take_along_axis(x_BL, index, axis=1), (order_BL, inverse_BL)


def _permute_backward(orders, grad_BL):
    return _permute_forward(grad_BL, *orders[::-1])[0], None, None


_permute.defvjp(_permute_forward, _permute_backward)
