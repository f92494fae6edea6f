"""The bodies of the server's requests: their schemas, with the server's limits, and how one is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, create_model

from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.serving.api import openapi_body
from r3rag_jax.serving.bodies import read_body, whole
from r3rag_jax.serving.refusal import Refusal

Name = Literal["native", "search_r1", "r3rag"]


class Bodies:
    """A pydantic model of the body of each route, which OpenAPI shows and requests must match."""

    def __init__(self, config: ServeConfig):
        self._config = config
        query = Annotated[str, StringConstraints(max_length=config.max_query_chars)]
        some = Annotated[list[query], Field(max_length=config.max_queries, fail_fast=True)]
        at_most = Annotated[int, Field(ge=1, le=config.max_k), BeforeValidator(whole)]
        # Other servers of these formats pass over fields that they do not know; the native one is ours to hold strict.
        loose, strict = ConfigDict(strict=True, extra="ignore"), ConfigDict(strict=True, extra="forbid")
        self._models: dict[str, type[BaseModel]] = {
            "native": create_model("Search", __config__=strict, queries=(some, ...), k=(at_most, config.k)),
            "search_r1": create_model(
                "SearchR1",
                __config__=loose,
                queries=(some, ...),
                topk=(at_most | None, None),
                return_scores=(bool, False),
            ),
            "r3rag": create_model("R3RAG", __config__=loose, query=(query | None, None), querys=(some | None, None)),
        }

    def openapi(self, name: Name) -> dict[str, Any]:
        """What a route adds to the OpenAPI document."""
        schema = self._models[name].model_json_schema()
        if name == "r3rag":  # exactly one of the two
            schema["oneOf"] = [{"required": [one], "properties": {one: {"not": {"type": "null"}}}} for one in
                               ("query", "querys")]  # fmt: skip
        return openapi_body(schema)

    def read(self, name: Name, content_type: str, body: bytes) -> Any:
        """The parsed body.

        Raises:
            Refusal: as `read_body`.
        """
        return read_body(self._models[name], content_type, body)

    def check_hits(self, num_queries: int, k: int) -> None:
        """Raises a Refusal for a request of too many passages."""
        if num_queries * k > self._config.max_hits:
            rule = f"a request asks for at most {self._config.max_hits} passages, queries times k"
            raise Refusal(422, f"{rule}; got {num_queries} queries of {k}")
