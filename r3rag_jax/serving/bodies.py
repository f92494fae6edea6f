"""JSON bodies of requests: read by a pydantic model, or refused with the rule that they break."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from r3rag_jax.data.fields import show
from r3rag_jax.serving.refusal import Refusal

JSON = "application/json"
SELF_EXPLAINING = ("json_invalid", "missing", "too_long")  # pydantic's errors that need not repeat the input
Body = TypeVar("Body", bound=BaseModel)


def whole(value: Any) -> Any:
    """3 for 3.0, which JSON does not tell from 3; anything else as it is. For a `BeforeValidator`."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_body(model: type[Body], content_type: str, body: bytes) -> Body:
    """The parsed body of a request.

    Raises:
        Refusal: 415 for another content type, 400 for what is no JSON, 422 for JSON that breaks a rule.
    """
    if content_type.partition(";")[0].strip().lower() != JSON:
        raise Refusal(415, f"the header Content-Type must be {JSON}; got {content_type[:100]!r}")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, found["loc"])) or "the body"
        got = f"; got {show(found['input'])}" if found["type"] not in SELF_EXPLAINING else ""
        raise Refusal(400 if found["type"] == "json_invalid" else 422, f"{where[:100]}: {found['msg']}{got}") from None
