"""What the applications of all servers share: refusals, health checks, metrics, and no page from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

import r3rag_jax
from r3rag_jax.serving.bodies import JSON
from r3rag_jax.serving.metrics import RequestMetrics
from r3rag_jax.serving.refusal import Refusal

DETAIL = {"type": "object", "required": ["detail"], "properties": {"detail": {"type": "string"}}}
Refusals = dict[int | str, dict[str, Any]]


def new_api(title: str) -> FastAPI:
    """An application that answers a `Refusal` with its status and rule."""
    # FastAPI's documentation pages load scripts from elsewhere.
    api = FastAPI(title=title, version=r3rag_jax.__version__, docs_url=None, redoc_url=None)
    api.add_exception_handler(Refusal, _answer_refused)
    return api


async def _answer_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return Response(error.body, error.status, error.headers)


def openapi_refusals(texts: Mapping[int, str]) -> Refusals:
    """The refusals of every server and those of this one, status -> description, as `responses` of its routes."""
    texts = _OF_EVERY_SERVER | dict(texts)
    return {status: {"description": text, "content": {JSON: {"schema": DETAIL}}} for status, text in texts.items()}


_OF_EVERY_SERVER = {
    400: "The body is no JSON.",
    401: "The token is missing or another.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is said to be something else than JSON.",
}


def openapi_body(schema: dict[str, Any]) -> dict[str, Any]:
    """What a route adds to the OpenAPI document for a body that it reads itself."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}


def add_health_routes(
    api: FastAPI, check_ready: Callable[[], None], metrics: RequestMetrics, refusals: Refusals
) -> None:
    """Add `/healthz`, `/readyz` and `/metrics`.

    Args:
        check_ready: raises a Refusal unless requests are answered.
        refusals: descriptions of 401 and 503.
    """

    async def health() -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def ready() -> Response:
        """Whether requests are answered."""
        check_ready()
        return JSONResponse({"status": "ready"})

    async def show_metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=metrics.content_type)

    api.get("/healthz", response_model=None)(health)
    api.get("/readyz", response_model=None, responses={503: refusals[503]})(ready)
    api.get(
        "/metrics", response_model=None, response_class=PlainTextResponse,
        responses={401: refusals[401], 503: refusals[503]},
    )(show_metrics)  # fmt: skip
