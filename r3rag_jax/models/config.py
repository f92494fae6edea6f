"""The shape of a decoder, read from and written to a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from r3rag_jax.models.fields import MAX_LAYERS, get_flag, get_number, get_object, get_size

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Defaults of transformers for fields that a config.json omits.
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_MAX_POSITIONS = {"llama": 2048, "qwen2": 32_768, "qwen3": 32_768}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The four numbers of Llama-3.1's rotary scaling, under their Hugging Face names."""

    factor: float  # low frequencies are divided by it
    low_freq_factor: float  # frequencies with fewer rotations over the original context are low
    high_freq_factor: float  # frequencies with more rotations over the original context are high: unchanged
    original_max_position_embeddings: int  # context length before scaling, in tokens


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Hyperparameters of a decoder: its shapes and architecture options."""

    vocab_size: int  # rows of the embedding table (may exceed the tokenizer's entries)
    hidden_size: int  # D, width of the residual stream
    num_layers: int  # Ly
    num_heads: int  # N, query heads
    num_kv_heads: int  # K, key/value heads; divides num_heads
    head_dim: int  # H, even
    ffn_size: int  # F, width of the gated feed-forward layer
    rope_theta: float = _DEFAULT_ROPE_THETA  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # rope_type llama3, or plain RoPE
    norm_eps: float = _DEFAULT_NORM_EPS  # added to the mean square in RMSNorm
    attention_bias: bool = False  # q, k, v projections carry a bias (Qwen2)
    qk_norm: bool = False  # RMSNorm on each q and k head before RoPE (Qwen3)
    tie_embeddings: bool = False  # the output layer is the embedding table
    max_positions: int = 2048  # longest sequence that the model supports, in tokens
    model_type: str = "llama"  # llama, qwen2 or qwen3; the `model_type` of config.json

    def __post_init__(self) -> None:
        """Check the relations between the fields.

        Raises:
            ValueError: a relation does not hold.
        """
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"model_type must be one of {sorted(ARCHITECTURES)}; got {self.model_type!r}")
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be divisible by num_kv_heads {self.num_kv_heads}; got {self.num_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and positive for RoPE; got {self.head_dim}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """Read the dictionary of a Hugging Face `config.json`.

        RoPE may be given as `rope_theta` and `rope_scaling`, or as the `rope_parameters` of transformers 5.

        Raises:
            ValueError: a size is missing, or a value is not supported by this decoder (the message names the field).
        """
        model_type = hf.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise ValueError(f"model_type must be one of {sorted(ARCHITECTURES)}; got {model_type!r}")
        _refuse_unsupported(hf, model_type)
        theta, scaling = _rope_from_hf(hf)
        hidden_size, num_heads = get_size(hf, "hidden_size"), get_size(hf, "num_attention_heads")
        return cls(
            vocab_size=get_size(hf, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=get_size(hf, "num_hidden_layers", at_most=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=get_size(hf, "num_key_value_heads", num_heads),
            head_dim=get_size(hf, "head_dim", 128 if model_type == "qwen3" else hidden_size // num_heads),
            ffn_size=get_size(hf, "intermediate_size"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=get_number(hf, "rms_norm_eps", _DEFAULT_NORM_EPS),
            attention_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            tie_embeddings=get_flag(hf, "tie_word_embeddings"),
            max_positions=get_size(hf, "max_position_embeddings", _DEFAULT_MAX_POSITIONS[model_type]),
            model_type=model_type,
        )

    def to_hf(self, torch_dtype: str = "float32") -> dict[str, Any]:
        """Return the `config.json` dictionary from which transformers 4 and 5 build the same model."""
        scaling = None
        if self.rope_scaling is not None:
            scaling = {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        hf: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_size,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_embeddings,
            "torch_dtype": torch_dtype,
        }
        if self.model_type != "qwen2":
            hf["attention_bias"] = False
        if self.model_type != "llama":
            hf["use_sliding_window"] = False
        return hf


def _refuse_unsupported(hf: Mapping[str, Any], model_type: str) -> None:
    """Raise a ValueError that names the field if the config uses a feature that the decoder does not support."""
    act = hf.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"hidden_act must be 'silu'; got {act!r}")
    if hf.get("use_sliding_window"):
        raise ValueError("sliding-window attention is not supported; use_sliding_window is true")
    layer_types = hf.get("layer_types") or []
    others = [one for one in layer_types if one != "full_attention"] if isinstance(layer_types, list) else layer_types
    if others:
        raise ValueError(f"layer_types must all be 'full_attention'; got {reprlib.repr(others)}")
    for key in ("mlp_bias", "attention_bias"):
        # In Llama and Qwen3 attention_bias also adds a bias to the output projection, which the decoder lacks.
        if get_flag(hf, key):
            raise ValueError(f"{key} must be false for model_type {model_type!r}; got true")


def _rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return (rope_theta, llama3 scaling or None) from `rope_parameters` or `rope_scaling`."""
    rope = get_object(hf, "rope_parameters") or get_object(hf, "rope_scaling")
    theta = get_number(rope, "rope_theta", get_number(hf, "rope_theta", _DEFAULT_ROPE_THETA))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_type must be 'default' or 'llama3'; got {kind!r}")
    keys = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [key for key in keys if key not in rope]
    if missing:
        raise ValueError(f"llama3 rope scaling must hold {keys}; {missing} missing")
    return theta, RopeScaling(
        factor=get_number(rope, "factor"),
        low_freq_factor=get_number(rope, "low_freq_factor"),
        high_freq_factor=get_number(rope, "high_freq_factor"),
        original_max_position_embeddings=get_size(rope, "original_max_position_embeddings"),
    )
