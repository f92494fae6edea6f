"""Sections `model` and `lora`: the policy and its adapters."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator

from r3rag_jax.config.section import Section, check_names, key

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ModelConfig(Section):
    """The policy."""

    dotted: ClassVar[str] = "model"

    path: str = key(
        "bundled",
        "a Hugging Face directory, `package:NAME` for one in an installed package, or `bundled`: a small Qwen2 base",
        "path",
    )
    chat_template: str = key(
        "",
        "a Jinja file, or `chatml` or `llama3`, the templates that the published checkpoints were trained with; "
        "empty: the model's own",
        "path",
    )
    init: Literal["pretrained", "random"] = key(
        "pretrained", "`random`: new weights; only architecture and tokenizer are read"
    )
    dtype: Literal["float32", "bfloat16"] = key("float32", "compute dtype; trainable parameters are kept in float32")
    moment_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "dtype of Adam's first moment; the second moment is kept in float32"
    )
    remat: Literal["none", "full", "dots"] = key(
        "none", "rematerialisation: the backward pass recomputes nothing, everything, or all but matrix products"
    )
    attention: Literal["xla", "blocks", "cudnn", "splash"] = key(
        "xla",
        "attention kernel of training: `xla` anywhere, `blocks` on CPUs for rows with several trajectories, `cudnn` on "
        "NVIDIA in bfloat16, `splash` on TPU",
    )
    micro_tokens: int = key(
        0,
        "gradient accumulation: tokens per device in one forward and backward pass; 0: the whole batch at once",
        "tokens",
        ge=0,
    )

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        if path == "":
            raise ValueError("must be a directory or bundled; got none")
        return path


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) of the policy and of a separate critic."""

    dotted: ClassVar[str] = "lora"

    rank: int = key(0, "rank of the adapters; 0: no adapters, all parameters are trained", ge=0)
    alpha: float = key(32.0, "adapters are scaled by alpha / rank", gt=0)
    targets: tuple[str, ...] = key(PROJECTIONS, "projections that get an adapter, in every layer")

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(targets, PROJECTIONS)
