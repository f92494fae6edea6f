"""Low-rank adapters over the stacked layers: y = x W + alpha / rank (x A) B (arXiv 2106.09685).

W is frozen: the optimizer, checkpoints and the reference policy need no copy of it. For rollouts and for export the
adapters are merged into a decoder without adapters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from r3rag_jax.config import PROJECTIONS, LoraConfig
from r3rag_jax.models.decoder import PARAM_AXES, Decoder
from r3rag_jax.parallel.shardings import tree_shardings

ROWS = ("embed_rows", "head_rows")  # adapters of single tokens
ADAPTERS = frozenset(f"{name}_{side}" for name in PROJECTIONS for side in "ab") | {*ROWS}
FROZEN = frozenset(PARAM_AXES) - ADAPTERS  # names of the decoder parameters that are frozen when there are adapters


@dataclasses.dataclass(frozen=True)
class TrainableSplit:
    """A module split by `nnx.split` into its graphdef, its trained parameters and its frozen parameters."""

    graphdef: Any
    params: Any
    frozen: Any = None  # None: all parameters are trained


def split_trainable(module: nnx.Module, config: LoraConfig) -> TrainableSplit:
    """Split a module. With LoRA the decoder's own parameters are frozen; adapters and a value head are trained."""
    if config.rank == 0:
        return TrainableSplit(*nnx.split(module))
    return TrainableSplit(*nnx.split(module, lambda path, _: str(path[-1]) not in FROZEN, ...))


def join(graphdef: Any, params: Any, frozen: Any = None) -> Any:
    """Merge the fields of a `TrainableSplit` into a module."""
    return nnx.merge(graphdef, params) if frozen is None else nnx.merge(graphdef, params, frozen)


def attach(decoder: Decoder, config: LoraConfig, mesh: Mesh, seed: int, token_ids: Sequence[int] = ()) -> Decoder:
    """Add adapters to a decoder if `config.rank` is above 0; before the first update they change no output.

    Parameters "…_a", float32 [layers, in, rank], are drawn with variance 1 / in from `seed`; "…_b", [layers, rank,
    out], are 0. The embeddings of `token_ids`, T of them, and their rows of the output layer are trained: "…_rows",
    float32 [T, D], is added to them. Without it, a new token that starts as the mean of its words' embeddings could not
    move away from those words.
    """
    if config.rank == 0:
        return decoder

    def draw() -> dict[str, jax.Array]:
        rngs, adapters = nnx.Rngs(seed), {}
        for name in config.targets:
            layers, width, out = decoder.param(name).get_value().shape
            adapters[f"{name}_a"] = jax.random.normal(rngs.params(), (layers, width, config.rank)) * width**-0.5
            adapters[f"{name}_b"] = jnp.zeros((layers, config.rank, out))
        return adapters

    def rows() -> dict[str, jax.Array]:
        names = ROWS[:1] if decoder.config.tie_embeddings else ROWS
        return {name: jnp.zeros((len(token_ids), decoder.config.hidden_size)) for name in names if token_ids}

    for build, owner in ((draw, decoder.layers), (rows, decoder)):
        shardings = tree_shardings(mesh, jax.eval_shape(build), PARAM_AXES)
        for name, value in jax.jit(build, out_shardings=shardings)().items():
            setattr(owner, name, nnx.Param(value))
    decoder.adapter_scale, decoder.adapter_tokens = config.alpha / config.rank, tuple(token_ids)
    return decoder


def merge(graphdef: Any, params: Any, frozen: Any = None) -> Any:
    """Parameters of the decoder without adapters that computes the same; to be called under `jit`.

    W + alpha / rank A B is computed in float32 and rounded to the dtype of W; "…_rows" are added as in the decoder.
    Without adapters, `params` are returned.
    """
    decoder = nnx.clone(
        join(graphdef, params, frozen)
    )  # a clone, as `join` may share the variables of `params` and `frozen`
    for name in PROJECTIONS:
        if not hasattr(decoder.layers, f"{name}_a"):
            continue
        a, b = (getattr(decoder.layers, f"{name}_{side}")[...] for side in "ab")
        weight = decoder.param(name).get_value()
        change = decoder.adapter_scale * jnp.matmul(a, b, preferred_element_type=jnp.float32)
        decoder.param(name).set_value((weight.astype(jnp.float32) + change).astype(weight.dtype))
        for side in "ab":
            delattr(decoder.layers, f"{name}_{side}")
    if decoder.adapter_tokens:
        tokens = jnp.asarray(decoder.adapter_tokens)
        table, change = decoder.embed.get_value(), decoder.embed_rows[...]
        decoder.embed.set_value(table.at[tokens].add(change.astype(table.dtype)))
        del decoder.embed_rows
        if not decoder.config.tie_embeddings:
            weight, change = decoder.lm_head.get_value(), decoder.head_rows[...]
            decoder.lm_head.set_value(weight.at[:, tokens].add(change.T.astype(weight.dtype)))
            del decoder.head_rows
    return nnx.split(decoder)[1]
