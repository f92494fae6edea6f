"""The programs of a recipe with the shapes of their arguments, for devices that are not here; nothing is allocated."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r3rag_jax.config import Config
from r3rag_jax.models import lora
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import PARAM_AXES, param_shapes
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.shardings import batch_shardings, replicated, tree_shardings
from r3rag_jax.rl.algorithms import ALGORITHMS
from r3rag_jax.sampler.distribution import Truncation
from r3rag_jax.sampler.memory import bytes_per_device
from r3rag_jax.sampler.programs import Program, SamplerPrograms
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.training import optimizer
from r3rag_jax.training.batch import pack
from r3rag_jax.training.state import Targets, TrainState, new_critic
from r3rag_jax.training.steps import make_rl_step, make_sft_step
from r3rag_jax.training.targets import make_pre_update
from r3rag_jax.types import SFTBatch

# Name -> what it is, in the order of the report.
PROGRAMS = {
    "sft": "an update of SFT",
    "rl": "an update of RL",
    "score": "values and reference log-probabilities of a batch, before an iteration's first update",
    "load": "the policy's weights in the layout of the sampler, once an iteration",
    "prefill": "the largest chunk of contexts",
    "decode": "a call of rollout.decode_chunk tokens in the largest window",
}
PHASES = {"sft": ("sft",), "rl": ("rl", "score", "load", "prefill", "decode"), "eval": ("load", "prefill", "decode")}
NUM_STEPS = 1000  # of the learning-rate schedule, which changes no shape


class Architecture(Policy):
    """A policy of which only the architecture is known: no tokenizer, no weights."""

    def __init__(self, config: Config, mesh: Mesh, decoder_config: DecoderConfig):
        super().__init__(config.model, config.lora, mesh, seed=config.seed)
        self._known_config = decoder_config

    @functools.cached_property
    def decoder_config(self) -> DecoderConfig:
        """The architecture that was given."""
        return self._known_config

    @property
    def base_path(self) -> Path:
        """There is none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("an Architecture has no files")


class RunPrograms:
    """The programs of a configuration on a mesh."""

    def __init__(self, config: Config, policy: Policy, mesh: Mesh, sampler_mesh: Mesh, kv_dtype: Any):
        self.config, self.policy, self.mesh, self._kv_dtype = config, policy, mesh, kv_dtype
        self.sampler_mesh = sampler_mesh
        self._weights = _shaped(mesh, policy.param_shapes())

    def make(self, name: str) -> Program:
        """A program of PROGRAMS by name."""
        return {
            "sft": self._sft, "rl": self._rl, "score": self._score,
            "load": self._load, "prefill": self._prefill, "decode": self._decode,
        }[name]()  # fmt: skip

    @property
    def cache_bytes(self) -> int:
        """Of the sampler's KV cache on one device."""
        cache = self._sampler.cache
        return bytes_per_device(cache, jax.tree.map(lambda x: x.sharding, cache))

    def looked_up_bytes(self, name: str) -> int:
        """Of the sampler's embedding table on one device, where a program reads only rows of it."""
        if name not in ("prefill", "decode") or self.policy.decoder_config.tie_embeddings:
            return 0
        return bytes_per_device([self._decoder.embed], [self._decoder.embed.sharding])

    def model_flops(self, name: str) -> float:
        """Operations that a model of these sizes needs for one run of a program, on one device.

        2 per weight and token forward, 4 more backward (2 with adapters, whose frozen weights have no gradient).
        Rematerialisation and attention's products of activations do not count.
        """
        config, decoder = self.config, self.policy.decoder_config
        shapes = param_shapes(decoder)
        total = sum(map(math.prod, shapes.values()))
        output = math.prod(shapes["embed"])
        hidden = total - output * (1 if decoder.tie_embeddings else 2)  # products up to the hidden states
        whole, backward = hidden + output, 4 if config.lora.rank else 6
        rl_tokens, has_value_model = config.rl.batch_rows * config.rl.row_length, self._critic_kind == "separate"
        if name == "sft":
            return backward * whole * config.sft.batch_rows * config.sft.row_length / self.mesh.size
        if name == "rl":
            return backward * (whole + has_value_model * hidden) * rl_tokens / self.mesh.size
        if name == "score":
            of_policy = whole if config.rl.max_importance_weight > 0 else hidden * (self._critic_kind == "head")
            weights = of_policy + whole * (config.rl.kl.coef > 0) + hidden * has_value_model
            return 2 * weights * rl_tokens / self.mesh.size
        tokens = self.make(name).num_tokens * (self.config.rollout.decode_chunk if name == "decode" else 1)
        return 2 * (whole if name == "decode" else hidden) * tokens / self.sampler_mesh.size

    @property
    def _critic_kind(self) -> str:
        return self.config.rl.critic.kind if ALGORITHMS[self.config.rl.algorithm].needs_critic else ""

    @functools.cached_property
    def _sampler(self) -> SamplerPrograms:
        rollout = self.config.rollout
        return SamplerPrograms(
            self.policy.decoder_config, self.sampler_mesh, slots=rollout.slots, max_length=rollout.max_length,
            decode_chunk=rollout.decode_chunk, truncation=Truncation.of(rollout), dtype=self._kv_dtype,
            shard_weights=rollout.shard_weights,
        )  # fmt: skip

    @functools.cached_property
    def _decoder(self) -> Any:
        return self._sampler.abstract_decoder(jnp.dtype(self.config.model.dtype))

    def _load(self) -> Program:
        weights = _shaped(self.sampler_mesh, self.policy.param_shapes())
        return Program("load", self._sampler.load(self.policy.graphdef), (weights,), {}, 0)

    def _prefill(self) -> Program:
        shapes = [chunk.tokens.shape for chunk in self._sampler.plan.empty_chunks()]
        _, rows, length = max(shapes, key=math.prod)
        return self._sampler.prefill_program(self._decoder, rows, length)

    def _decode(self) -> Program:
        return self._sampler.decode_program(self._decoder)

    def _sft(self) -> Program:
        config, split = self.config, self._split()["policy"]
        tx = optimizer.sft_optimizer(config.sft, NUM_STEPS, config.model.moment_dtype)
        state = self._state(split.params, tx)
        rows = self._batch(config.sft.batch_rows, config.sft.row_length)
        batch = SFTBatch(rows.tokens, rows.positions, rows.segment_ids, rows.branch_ids, rows.loss_mask)
        step = make_sft_step(self.mesh, split.graphdef, tx, config.model, state)
        return Program("sft", step, (state, batch, split.frozen), {}, math.prod(rows.tokens.shape))

    def _rl(self) -> Program:
        config, splits = self.config, self._split()
        tx = optimizer.rl_optimizer(config.rl, config.model.moment_dtype)
        graphdefs = {name: split.graphdef for name, split in splits.items()}
        frozen = {name: split.frozen for name, split in splits.items()}
        state = self._state({name: split.params for name, split in splits.items()}, tx)
        batch = self._batch(config.rl.batch_rows, config.rl.row_length)
        score, arguments = self._score_function(splits, batch)
        found, _ = jax.eval_shape(score, *arguments)
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(self.mesh))
        targets = self._targets(found, batch)
        step = make_rl_step(self.mesh, graphdefs, tx, config.model, config.rl, state, Truncation.of(config.rollout))
        arguments = (state, batch, targets, number, frozen, number)
        return Program("rl", step, arguments, {}, math.prod(batch.tokens.shape))

    def _score(self) -> Program:
        batch = self._batch(self.config.rl.batch_rows, self.config.rl.row_length)
        score, arguments = self._score_function(self._split(), batch)
        return Program("score", score, arguments, {}, math.prod(batch.tokens.shape))

    def _score_function(self, splits: dict[str, lora.TrainableSplit], batch: Any) -> tuple[Any, tuple[Any, ...]]:
        config = self.config
        graphdefs = {name: split.graphdef for name, split in splits.items()}
        score = make_pre_update(
            self.mesh, graphdefs, self.policy.graphdef, config.model, config.rl, Truncation.of(config.rollout),
            records_entropy=config.log.entropy,
        )  # fmt: skip
        params = {name: split.params for name, split in splits.items()}
        frozen = {name: split.frozen for name, split in splits.items()}
        return score, (params, self._weights, batch, frozen)

    def _targets(self, found: Any, batch: Any) -> Targets:
        """What `training.targets.make_targets` hands to an update, of the shapes of a batch."""
        config = self.config.rl
        like: Any = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32, sharding=batch.tokens.sharding)
        has_critic, constants = bool(self._critic_kind), ("ref_logprobs", "old_logprobs", "weights")
        return Targets(
            like,
            returns=like if has_critic else None,
            old_values=like if has_critic else None,
            shares=None if config.loss_aggregation == "token" else like,
            **{name: None if getattr(found, name) is None else like for name in constants},
        )

    def _split(self) -> dict[str, lora.TrainableSplit]:
        """Policy and critic as `RLTrainer` makes them, of shapes on the mesh."""
        graphdefs: dict[str, Any] = {}

        def build(weights: Any) -> dict[str, tuple[Any, Any]]:
            splits = {"policy": self.policy.trainable(weights)}
            if self._critic_kind:
                policy = splits["policy"]
                decoder = lora.join(policy.graphdef, policy.params, policy.frozen)
                splits["critic"] = lora.split_trainable(new_critic(decoder, self._critic_kind), self.config.lora)
            graphdefs.update({name: split.graphdef for name, split in splits.items()})
            return {name: (split.params, split.frozen) for name, split in splits.items()}

        arrays = jax.eval_shape(build, self._weights)
        return {
            name: lora.TrainableSplit(graphdefs[name], _shaped(self.mesh, params), _shaped(self.mesh, frozen))
            for name, (params, frozen) in arrays.items()
        }

    def _state(self, params: Any, tx: Any) -> TrainState:
        def build(params: Any) -> TrainState:
            return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

        return _shaped(self.mesh, jax.eval_shape(build, params))

    def _batch(self, rows: int, length: int) -> Any:
        """A `TrainBatch`; with branches where samples of a step each share their prompts."""
        config = self.config
        has_branches = not make_protocol(config.rollout.protocol).is_one_sequence
        batch, _ = pack([], row_length=length, num_rows=rows, has_branches=has_branches)
        shardings = batch_shardings(self.mesh, batch)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, shardings)


def _shaped(mesh: Mesh, tree: Any) -> Any:
    """Shapes of parameters, or of what is laid out like them, with their shardings."""
    shardings = tree_shardings(mesh, tree, PARAM_AXES)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
