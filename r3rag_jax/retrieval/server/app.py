"""The routes of the server.

POST /v1/search   this package's format            GET /healthz   the process answers
POST /retrieve    Search-R1's                      GET /readyz    it searches: 200, else 503
POST /search      R3-RAG's, both                   GET /metrics   Prometheus
GET /v1/index     what is searched                 GET /openapi.json
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

import r3rag_jax
from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.batching import Batcher
from r3rag_jax.retrieval.server.bodies import Bodies, Name
from r3rag_jax.retrieval.server.metrics import ServerMetrics
from r3rag_jax.retrieval.wire import flat_row, search_r1_row
from r3rag_jax.serving.api import add_health_routes, new_api, openapi_refusals
from r3rag_jax.serving.gate import Gate
from r3rag_jax.serving.refusal import Refusal, busy


@dataclasses.dataclass(frozen=True)
class IndexInfo:
    """What `/v1/index` tells besides the retriever's fingerprint."""

    kind: str  # `retrieval.kind`
    num_passages: int


class Application:
    """The server as an ASGI application; `gate` is what uvicorn runs."""

    def __init__(self, batcher: Batcher, info: IndexInfo, config: ServeConfig, token: str, metrics: ServerMetrics):
        self._batcher, self._info, self._config = batcher, info, config
        self._bodies, self._metrics = Bodies(config), metrics
        self.app = new_api("r3rag_jax retrieval")
        self._add_routes()
        paths = [str(getattr(route, "path", "")) for route in self.app.routes]
        self.gate = Gate(self.app, config, token, metrics, paths)
        metrics.watch("in_flight_requests", "Requests without a reply", lambda: self.gate.num_in_flight)
        metrics.watch("waiting_queries", "Queries that wait for their search", lambda: batcher.num_waiting)
        metrics.watch("ready", "1 while the server searches", lambda: self.is_ready)

    @property
    def is_ready(self) -> bool:
        """Whether the retriever is open and requests are taken."""
        opened = self._batcher.opened
        return opened.done() and opened.exception() is None and not self.gate.is_draining

    # ---- routes

    def _add_routes(self) -> None:
        refusals = openapi_refusals(_REFUSALS)
        for path, name, answer in (
            ("/v1/search", "native", self._search),
            ("/retrieve", "search_r1", self._retrieve),
            ("/search", "r3rag", self._r3rag),
        ):
            self.app.add_api_route(
                path, answer, methods=["POST"], response_model=None, responses=refusals, name=name,
                openapi_extra=self._bodies.openapi(name),  # type: ignore[arg-type]
            )  # fmt: skip
        self.app.get("/v1/index", response_model=None, responses={401: refusals[401], 503: refusals[503]})(self._index)
        add_health_routes(self.app, self._check_ready, self._metrics, refusals)

    async def _search(self, request: Request) -> Response:
        """The `k` best passages for each query, with scores."""
        body = await self._read(request, "native")
        rows = await self._find(body.queries, body.k)
        return JSONResponse({"fingerprint": self._fingerprint, "results": [flat_row(row) for row in rows]})

    async def _retrieve(self, request: Request) -> Response:
        """Search-R1's format; without `topk` the server's number of passages."""
        body = await self._read(request, "search_r1")
        rows = await self._find(body.queries, body.topk or self._config.k)
        return JSONResponse({"result": [search_r1_row(row, with_scores=body.return_scores) for row in rows]})

    async def _r3rag(self, request: Request) -> Response:
        """R3-RAG's formats: a list of documents for `query`, a list of lists for `querys`."""
        body = await self._read(request, "r3rag")
        if (body.query is None) == (body.querys is None):
            raise Refusal(422, "the body must have either query, a text, or querys, a list of texts")
        rows = await self._find([body.query] if body.querys is None else body.querys, self._config.k)
        return JSONResponse([flat_row(row) for row in rows] if body.query is None else flat_row(rows[0]))

    async def _index(self) -> Response:
        """Kind, size and fingerprint of what is searched, and the limits of a request."""
        self._check_ready()
        limits = ("k", "max_k", "max_queries", "max_hits", "max_query_chars", "max_body_bytes")
        return JSONResponse({
            "fingerprint": self._fingerprint, **dataclasses.asdict(self._info), "version": r3rag_jax.__version__,
            "limits": {name: getattr(self._config, name) for name in limits},
        })  # fmt: skip

    # ---- what routes share

    @property
    def _fingerprint(self) -> str:
        return self._batcher.opened.result().fingerprint

    async def _read(self, request: Request, name: Name) -> Any:
        self._check_ready()
        return self._bodies.read(name, request.headers.get("content-type", ""), await request.body())

    def _check_ready(self) -> None:
        if not self.is_ready:
            raise busy("the server is shutting down" if self.gate.is_draining else "the index is being opened")

    async def _find(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self._bodies.check_hits(len(queries), k)
        try:
            return await asyncio.wrap_future(self._batcher.search(queries, k))
        except Refusal:
            raise
        except Exception as error:
            raise Refusal(500, f"the search failed: {type(error).__name__}: {str(error)[:300]}") from error


_REFUSALS = {
    422: "The body breaks a rule.",
    500: "The search failed.",
    503: "The server opens its index, has too many queries waiting, or shuts down.",
}
