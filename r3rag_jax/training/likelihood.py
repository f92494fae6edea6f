"""How probable given texts are to a policy: log-probabilities of written tokens, many samples in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from r3rag_jax.models.lora import join
from r3rag_jax.parallel.collectives import per_device
from r3rag_jax.parallel.shardings import batch_ways, device_put_batch, replicated
from r3rag_jax.parallel.target import Target
from r3rag_jax.sampler.distribution import WHOLE
from r3rag_jax.text.transcript import Codec
from r3rag_jax.training.batch import pack
from r3rag_jax.training.losses import policy_logprobs
from r3rag_jax.training.micro_batches import ROWS, param_specs
from r3rag_jax.training.prefix_tree import share_prefixes
from r3rag_jax.types import Sample, TrainBatch


class Likelihood:
    """The log-probabilities of samples under fixed parameters; samples that begin alike share their prefixes."""

    def __init__(self, codec: Codec, mesh: Mesh, graphdef: Any, params: Any, *, row_length: int, batch_rows: int):
        """
        Args:
            codec: what the samples are written with.
            graphdef, params: of the policy, without adapters.
            row_length, batch_rows: shape of a batch, in tokens and rows; rows are longer where a sample is.
        """
        self.codec, self._mesh, self._params = codec, mesh, params
        ways = batch_ways(mesh, 0)
        self._row_length, self._batch_rows = row_length, -(-batch_rows // ways) * ways
        target = Target.of(mesh).shard()

        def on_device(params: Any, batch: TrainBatch) -> jax.Array:
            return policy_logprobs(join(graphdef, params, None), batch, "none", WHOLE, target)[0]

        def logprobs(params: Any, batch: TrainBatch) -> jax.Array:
            return per_device(mesh, on_device, (param_specs(mesh, params), ROWS), ROWS)(params, batch)

        self._logprobs = jax.jit(logprobs, out_shardings=replicated(mesh))

    def __call__(self, groups: Sequence[Sequence[Sample]]) -> list[list[np.ndarray]]:
        """The log-probabilities of the tokens in each sample's loss_mask, at temperature 1.

        Args:
            groups: samples, of which those of a group may share prefixes, such as the contexts of a trajectory in
                their order.

        Returns:
            For each sample of each group float32 [number of tokens in its loss_mask].
        """
        longest = max((len(sample) for group in groups for sample in group), default=0)
        row_length = max(self._row_length, -(-longest // 128) * 128)
        trees = [tree for group in groups for tree in share_prefixes(group, row_length)]
        flat = self._of_trees(trees, row_length)
        found, start = [], 0
        for group in groups:
            sizes = [int(sample.loss_mask.sum()) for sample in group]
            ends = start + np.cumsum(sizes)
            found.append(np.split(flat[start : start + sum(sizes)], ends[:-1] - start) if sizes else [])
            start += sum(sizes)
        return found

    def _of_trees(self, trees: Sequence[Sample], row_length: int) -> np.ndarray:
        """Those of all written tokens, tree by tree, float32 [tokens]."""
        packed, starts = pack(trees, row_length=row_length, has_branches=True)
        rows = []
        for first in range(0, len(packed.tokens), self._batch_rows):
            part = jax.tree.map(lambda x, first=first: x[first : first + self._batch_rows], packed)
            missing = self._batch_rows - len(part.tokens)
            empty, _ = pack([], row_length=row_length, num_rows=missing, has_branches=True)
            batch = device_put_batch(self._mesh, jax.tree.map(lambda x, y: np.concatenate([x, y]), part, empty))
            rows.append(self._logprobs(self._params, batch))
        flat = np.concatenate([np.asarray(x) for x in rows]).ravel() if rows else np.zeros(0, np.float32)
        where = [start + np.flatnonzero(tree.loss_mask) for tree, start in zip(trees, starts, strict=True)]
        return flat[np.concatenate(where)] if where else flat[:0]
