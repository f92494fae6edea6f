"""How much of what the devices could do is used: MFU of updates, and the share of memory bandwidth in decoding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from r3rag_jax.config import Config
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.params import param_shapes
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.types import SFTBatch


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What a data sheet says of one device."""

    flops: float  # bfloat16 operations per second
    hbm_rate: float  # bytes per second


@dataclasses.dataclass(frozen=True)
class Work:
    """Tokens of batches, padding left out."""

    tokens: int
    attended: int  # positions that they attend to, over all tokens

    @classmethod
    def of(cls, batches: Iterable[SFTBatch]) -> Work:
        """The work of host batches; a token attends to all positions up to its own."""
        tokens = attended = 0
        for batch in batches:
            is_token = np.asarray(batch.segment_ids) > 0
            tokens += int(is_token.sum())
            attended += int((np.asarray(batch.positions)[is_token].astype(int) + 1).sum())
        return cls(tokens, attended)


class Utilization:
    """Shares of the peak rates of a mesh's devices.

    Model FLOPs as in PaLM (arXiv 2204.02311, appendix B), with the positions that are attended to: 2 N + 4 Ly H Q T for
    a token's forward pass, N the weights of matrices, and twice that for the backward pass; with frozen weights (LoRA)
    their gradients are not computed. What is recomputed (remat) does not count.
    """

    def __init__(self, peaks: Peaks, config: Config, decoder: DecoderConfig, *, devices: int):
        self._peaks, self._config, self._decoder = peaks, config, decoder
        self._devices = devices  # of training
        shapes = param_shapes(decoder)
        self._weights = sum(
            math.prod(shape)
            for name, shape in shapes.items()
            if name.endswith("_proj") or name == "lm_head" or (name == "embed" and decoder.tie_embeddings)
        )

    def forward_flops(self, work: Work) -> float:
        """Model FLOPs of one forward pass."""
        heads = self._decoder.num_layers * self._decoder.num_heads * self._decoder.head_dim
        return 2.0 * self._weights * work.tokens + 4.0 * heads * work.attended

    def update_flops(self, work: Work) -> float:
        """Model FLOPs of one forward and backward pass over the work."""
        frozen = 2.0 * self._weights * work.tokens if self._config.lora.rank > 0 else 0.0
        return 3 * self.forward_flops(work) - frozen

    def sft(self, work: Work, seconds: float) -> dict[str, float]:
        """The metric `mfu` of a step of the cold start."""
        return {"mfu": self._share(self.update_flops(work), seconds)}

    def rl(self, work: Work, seconds: float) -> dict[str, float]:
        """The metric `mfu` of an iteration's forward passes and updates."""
        rl = self._config.rl
        has_critic = ALGORITHMS[rl.algorithm].needs_critic
        is_separate = has_critic and rl.critic.kind == "separate"
        num_forward = (rl.max_importance_weight > 0 or has_critic) + (rl.kl.coef > 0) + is_separate
        updates = rl.epochs * (1 + is_separate) * self.update_flops(work)
        return {"mfu": self._share(num_forward * self.forward_flops(work) + updates, seconds)}

    def decoding(self, bytes_read: float, seconds: float) -> dict[str, float]:
        """The metric `memory_bandwidth` of an iteration's decoding, of bytes that each device read."""
        return {"memory_bandwidth": bytes_read / (seconds * self._peaks.hbm_rate)} if seconds > 0 else {}

    def _share(self, flops: float, seconds: float) -> float:
        return flops / (seconds * self._devices * self._peaks.flops)
