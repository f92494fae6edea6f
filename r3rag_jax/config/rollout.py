"""Sections `rollout` and `rollout.server`: sampling of trajectories."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from r3rag_jax.config.endpoint import EndpointConfig
from r3rag_jax.config.section import Section, key, require, section


class ServerConfig(EndpointConfig):
    """An OpenAI-compatible inference server that samples in place of the built-in engine, for evaluation."""

    dotted: ClassVar[str] = "rollout.server"

    max_in_flight: int = key(
        0, "requests that wait for their reply at the same time; 0: as many as rollout.slots", "requests", ge=0
    )
    timeout_s: float = key(600.0, "a request fails unless its whole reply has come after this time", "seconds", gt=0)
    prompt_format: Literal["ids", "text"] = key(
        "ids", "prompts as token ids, or as `text` for a server that takes no ids; text may be tokenized differently"
    )
    extra_fields: bool = key(
        True, "also send fields that OpenAI's API lacks, e.g. min_p; false: for a server that refuses unknown fields"
    )


class RolloutConfig(Section):
    """Sampling of trajectories."""

    dotted: ClassVar[str] = "rollout"

    protocol: Literal["tags", "steps", "search_r1"] = key(
        "tags", "text format of a trajectory; `steps`: of published R3-RAG checkpoints, `search_r1`: of Search-R1's"
    )
    max_steps: int = key(5, "budget of reasoning steps of a trajectory", "steps", ge=1)
    max_new_tokens: int = key(64, "budget of sampled tokens of a step", "tokens", ge=1)
    max_trajectory_tokens: int = key(
        0, "budget of sampled tokens over all steps of a trajectory; 0: no limit", "tokens", ge=0
    )
    max_length: int = key(512, "longest context; cache slots per row", "tokens", ge=1)
    slots: int = key(64, "rows that are decoded in parallel", "rows", ge=1)
    shard_weights: bool = key(
        False, "mesh.fsdp shards the sampler's copy of the weights too: less memory; decode adds partial sums over it"
    )
    kv_dtype: Literal["auto", "int8", "bfloat16", "float32"] = key(
        "auto",
        "KV-cache dtype; `auto`: model.dtype, or float32 on a CPU without a C++ compiler; `int8`: quantized, inexact",
    )
    decode_chunk: int = key(32, "maximum number of tokens per row in one call on the device", "tokens", ge=1)
    search_overlap: int = key(
        0,
        "decode calls that run while a search runs in a thread, for slow retrievers; 0: decoding waits for searches",
        "calls",
        ge=0,
    )
    samples: int = key(4, "trajectories per question in RL", "trajectories", ge=1)
    temperatures: tuple[float, ...] = key((1.0,), "sampling temperature of each sample, cycled; 0: greedy")
    stop_strings: tuple[str, ...] = key((), "strings that end a step like a stop token, also inside a token")
    min_p: float = key(
        0.0, "tokens with less than this share of the largest probability are not sampled", "fraction", ge=0, le=1
    )
    top_k_tokens: int = key(0, "only this many most likely tokens are sampled; 0: all", "tokens", ge=0)
    top_p: float = key(
        1.0, "nucleus sampling: only the most likely tokens of this total probability; 1: all", "fraction", gt=0, le=1
    )
    server: ServerConfig = section(ServerConfig())

    @property
    def max_sampled_tokens(self) -> int:
        """The most tokens that a trajectory may sample over all its steps."""
        return self.max_trajectory_tokens or self.max_steps * self.max_new_tokens

    @property
    def truncates(self) -> bool:
        """Whether sampling leaves out unlikely tokens (`min_p`, `top_k_tokens`, `top_p`)."""
        return self.min_p > 0 or self.top_k_tokens > 0 or self.top_p < 1

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if not temperatures or any(t < 0 for t in temperatures):
            shown = ", ".join(map(str, temperatures)) or "none"
            raise ValueError(f"must be one or more numbers of at least 0; got {shown}")
        return temperatures

    @field_validator("stop_strings")
    @classmethod
    def _check_stop_strings(cls, stop_strings: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop_strings:
            raise ValueError("must not be empty; got ''")
        return stop_strings

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        require(
            not self.server.is_given or self.stop_strings == (),
            f"rollout.stop_strings must be none when rollout.server.url is given; got {', '.join(self.stop_strings)}",
            "rollout.stop_strings",
            "rollout.server.url",
        )
        require(
            not self.server.is_given or self.server.extra_fields or self.min_p == self.top_k_tokens == 0,
            "rollout.min_p and rollout.top_k_tokens must be 0 when rollout.server.extra_fields is false;"
            f" got {self.min_p} and {self.top_k_tokens}",
            "rollout.min_p",
            "rollout.top_k_tokens",
            "rollout.server.extra_fields",
        )
        require(
            self.max_new_tokens < self.max_length,
            f"rollout.max_new_tokens must be less than rollout.max_length={self.max_length}; got {self.max_new_tokens}",
            "rollout.max_new_tokens",
            "rollout.max_length",
        )
        return self
