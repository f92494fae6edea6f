"""Sections `judge`, `judge.endpoint`, `judge.local`: an LLM as judge."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from r3rag_jax.config.endpoint import EndpointConfig
from r3rag_jax.config.section import Section, key, require, section


class LocalJudgeConfig(Section):
    """The model of `judge.kind: local`."""

    dotted: ClassVar[str] = "judge.local"

    path: str = key("", "its Hugging Face directory, or `package:NAME`", "path")
    slots: int = key(16, "prompts that are decoded in parallel", "rows", ge=1)
    max_length: int = key(2048, "longest prompt and reply together", "tokens", ge=1)
    dtype: Literal["float32", "bfloat16"] = key("float32", "dtype of weights and computation")


class JudgeConfig(Section):
    """A language model that rates the relevance of passages and the correctness of answers."""

    dotted: ClassVar[str] = "judge"

    kind: Literal["server", "local"] = key(
        "server", "`server`: any OpenAI-compatible server; `local`: a Hugging Face model on the run's own devices"
    )
    max_failure_share: float = key(
        0.2,
        "the run ends if a larger share of a round's judgements fails; samples of failed ones are left out of the loss",
        "fraction",
        ge=0,
        le=1,
    )
    max_tokens: int = key(256, "longest reply; a longer one counts as failed", "tokens", ge=1)
    cache: str = key(
        "", "JSONL file that keeps every judgement and may be shared by runs; empty: in the run directory", "path"
    )
    relevance_prompt: str = key(
        "",
        "a text file with {question}, {query}, {passages} that asks for a line `Relevance: 0.7`; empty: built-in",
        "path",
    )
    correctness_prompt: str = key(
        "",
        "a text file with {question}, {golds}, {answer} that asks for a line `Correct: yes`; empty: built-in",
        "path",
    )
    candidates_prompt: str = key(
        "",
        "a text file with {question}, {answer} that asks for a line `Candidates: Paris | Lyon`, for "
        "`eval.candidate_em`; empty: built-in",
        "path",
    )
    endpoint: EndpointConfig = section(EndpointConfig(), "The server of `judge.kind: server`.")
    local: LocalJudgeConfig = section(LocalJudgeConfig())

    @property
    def is_given(self) -> bool:
        """Whether there is a judge to ask."""
        return self.endpoint.is_given if self.kind == "server" else self.local.path != ""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "server":
            require(
                self.local.path == "",
                f"judge.local.path must be empty unless judge.kind is local; got {self.local.path!r}",
                "judge.local.path",
                "judge.kind",
            )
            return self
        for name in ("url", "model", "key_env"):
            value = getattr(self.endpoint, name)
            shown = "one" if name == "key_env" else repr(value)  # it could be a key
            require(
                value == "",
                f"judge.endpoint.{name} must be empty when judge.kind is local; got {shown}",
                f"judge.endpoint.{name}",
                "judge.kind",
            )
        require(
            self.max_tokens < self.local.max_length,
            f"judge.max_tokens must be less than judge.local.max_length={self.local.max_length}; got {self.max_tokens}",
            "judge.max_tokens",
            "judge.local.max_length",
        )
        return self
