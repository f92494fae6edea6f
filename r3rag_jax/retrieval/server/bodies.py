"""The bodies of the server's requests: their schemas, with the server's limits, and how one is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, create_model

from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.data.fields import show
from r3rag_jax.retrieval.server.refusal import Refusal

JSON = "application/json"
SELF_EXPLAINING = ("json_invalid", "missing", "too_long")  # pydantic's errors that need not repeat the input
Name = Literal["native", "search_r1", "r3rag"]


def whole(value: Any) -> Any:
    """3 for 3.0, which JSON does not tell from 3; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
        return {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}

    def read(self, name: Name, content_type: str, body: bytes) -> Any:
        """The parsed body.

        Raises:
            Refusal: 415 for another content type, 400 for what is no JSON, 422 for JSON that breaks a rule.
        """
        if content_type.partition(";")[0].strip().lower() != JSON:
            raise Refusal(415, f"the header Content-Type must be {JSON}; got {content_type[:100]!r}")
        try:
            return self._models[name].model_validate_json(body)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, found["loc"])) or "the body"
            got = f"; got {show(found['input'])}" if found["type"] not in SELF_EXPLAINING else ""
            raise Refusal(
                400 if found["type"] == "json_invalid" else 422, f"{where[:100]}: {found['msg']}{got}"
            ) from None

    def check_hits(self, num_queries: int, k: int) -> None:
        """Raises a Refusal for a request of too many passages."""
        if num_queries * k > self._config.max_hits:
            rule = f"a request asks for at most {self._config.max_hits} passages, queries times k"
            raise Refusal(422, f"{rule}; got {num_queries} queries of {k}")
