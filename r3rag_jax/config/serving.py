"""The settings of servers, which are their flags: `--max-k` of `python -m r3rag_jax.serve` is the key `max_k`."""

from __future__ import annotations

import argparse
import typing
from typing import ClassVar, TypeVar

from pydantic import field_validator

from r3rag_jax.config.endpoint import check_variable
from r3rag_jax.config.section import Section, key

Settings = TypeVar("Settings", bound=Section)


def add_flags(parser: argparse.ArgumentParser, settings: type[Section]) -> None:
    """A flag for each key of a section."""
    for name, field in settings.model_fields.items():
        unit = (field.json_schema_extra or {}).get("unit")  # type: ignore[union-attr]
        text = f"{field.description}{f' ({unit})' if unit else ''}; default: {field.default or 'none'}"
        kind = typing.cast(type, field.annotation)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=text)


def read_flags(args: argparse.Namespace, settings: type[Settings]) -> Settings:
    """The section that the flags of `add_flags` describe."""
    return settings(**{name: getattr(args, name) for name in settings.model_fields})


class ListenConfig(Section):
    """What every server asks: where it listens, who may ask, and how much at once."""

    host: str = key("127.0.0.1", "address to listen at; 0.0.0.0: all of the machine's, for which a token is advised")
    port: int = key(8000, "TCP port; 0: a free one, which is printed", ge=0, le=65535)
    token_env: str = key("", "environment variable that holds the bearer token of all requests; empty: none is asked")
    max_body_bytes: int = key(8 << 20, "largest body of a request", "bytes", ge=1)
    max_in_flight: int = key(512, "requests at the same time, bodies in memory included", "requests", ge=1)
    body_timeout_s: float = key(30.0, "a request's whole body must have come after this time", "seconds", gt=0)
    drain_s: float = key(30.0, "after SIGTERM requests in flight have this time to finish", "seconds", ge=0)

    @field_validator("token_env")
    @classmethod
    def _check_token_env(cls, name: str) -> str:
        return check_variable(name)


class ServeConfig(ListenConfig):
    """A retrieval server: where it listens, who may ask, and how much."""

    dotted: ClassVar[str] = "serve"

    k: int = key(5, "passages of a query in formats whose request names no number", "passages", ge=1)
    max_k: int = key(1000, "largest number of passages of a query", "passages", ge=1)
    max_queries: int = key(1024, "most queries of a request", "queries", ge=1)
    max_hits: int = key(100_000, "most passages of a request, queries times k", "passages", ge=1)
    max_query_chars: int = key(32_768, "longest query", "characters", ge=1)
    max_batch: int = key(256, "queries of several requests that are searched together", "queries", ge=1)
    batch_wait_ms: float = key(2.0, "how long a query waits for others to be searched with", "milliseconds", ge=0)
    max_waiting: int = key(8192, "queries that wait; a request that finds more is answered 503", "queries", ge=1)


class DemoConfig(ListenConfig):
    """The demo: where it listens, who may ask, and how much."""

    dotted: ClassVar[str] = "demo"

    max_body_bytes: int = key(64 << 10, "largest body of a request", "bytes", ge=1)
    max_in_flight: int = key(64, "requests at the same time; a question is one until it is finished", "requests", ge=1)
    slots: int = key(8, "questions that are answered at the same time; others wait for their turn", "questions", ge=1)
    max_question_chars: int = key(2000, "longest question", "characters", ge=1)
    max_k: int = key(20, "largest number of passages of a search", "passages", ge=1)
    max_steps: int = key(10, "largest budget of steps", "steps", ge=1)
    idle_s: float = key(600.0, "a question that is paused for so long is stopped", "seconds", gt=0)
