"""The decoder's parameters by name: logical axes, shapes and shardings."""

from __future__ import annotations

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.parallel.shardings import partition_spec

# Logical axes of every parameter by name; parallel/shardings.py maps logical axes to mesh axes.
PARAM_AXES: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", "embed"),
    "input_norm": ("layers", None),
    "q_proj": ("layers", "embed", "heads"),
    "k_proj": ("layers", "embed", "kv_heads"),
    "v_proj": ("layers", "embed", "kv_heads"),
    "q_bias": ("layers", "heads"),
    "k_bias": ("layers", "kv_heads"),
    "v_bias": ("layers", "kv_heads"),
    "q_norm": ("layers", None),
    "k_norm": ("layers", None),
    "o_proj": ("layers", "heads", "embed"),
    "post_norm": ("layers", None),
    "gate_proj": ("layers", "embed", "mlp"),
    "up_proj": ("layers", "embed", "mlp"),
    "down_proj": ("layers", "mlp", "embed"),
    "final_norm": (None,),
    "lm_head": ("embed", "vocab"),
}
# Adapters of lora.py: *_rows [T, D] are added to the rows of T tokens; *_a [in, rank] and *_b [rank, out] belong to a
# projection [in, out].
PARAM_AXES |= {"embed_rows": (None, "embed"), "head_rows": (None, "embed")}
PARAM_AXES |= {f"{name}_a": (*axes[:2], None) for name, axes in PARAM_AXES.items() if name.endswith("_proj")}
PARAM_AXES |= {f"{name}_b": (axes[0], None, axes[2]) for name, axes in PARAM_AXES.items() if name.endswith("_proj")}


def param_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter; stacked layer parameters have a leading axis Ly."""
    Ly, D, F, H, V = (
        config.num_layers,
        config.hidden_size,
        config.ffn_size,
        config.head_dim,
        config.vocab_size,
    )
    q_width, kv_width = config.num_heads * H, config.num_kv_heads * H
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (V, D),
        "input_norm": (Ly, D),
        "q_proj": (Ly, D, q_width),
        "k_proj": (Ly, D, kv_width),
        "v_proj": (Ly, D, kv_width),
        "o_proj": (Ly, q_width, D),
        "post_norm": (Ly, D),
        "gate_proj": (Ly, D, F),
        "up_proj": (Ly, D, F),
        "down_proj": (Ly, F, D),
        "final_norm": (D,),
    }
    if config.attention_bias:
        shapes |= {"q_bias": (Ly, q_width), "k_bias": (Ly, kv_width), "v_bias": (Ly, kv_width)}
    if config.qk_norm:
        shapes |= {"q_norm": (Ly, H), "k_norm": (Ly, H)}
    if not config.tie_embeddings:
        shapes["lm_head"] = (D, V)
    return shapes


def param_shardings(mesh: Mesh, config: DecoderConfig) -> dict[str, NamedSharding]:
    """Return name -> sharding of every parameter of a decoder."""
    return {
        name: NamedSharding(mesh, partition_spec(mesh, PARAM_AXES[name], shape))
        for name, shape in param_shapes(config).items()
    }


def param_spec(mesh: Mesh | AbstractMesh, config: DecoderConfig, name: str) -> PartitionSpec:
    """The PartitionSpec of a parameter of a decoder or of its adapters: that of `tree_shardings` with PARAM_AXES."""
    return partition_spec(mesh, PARAM_AXES[name], _shape(config, name))


def _shape(config: DecoderConfig, name: str) -> tuple[int, ...]:
    """Shape of a parameter; of an adapter with 1 for its rank or its number of tokens, which are never sharded."""
    shapes = param_shapes(config)
    if name in shapes:
        return shapes[name]
    if name in ("embed_rows", "head_rows"):
        return (1, config.hidden_size)
    layers, width, out = shapes[name[: -len("_a")]]
    return (layers, width, 1) if name.endswith("_a") else (layers, 1, out)
