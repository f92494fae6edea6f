"""The routes of the demo.

GET  /                          the page           GET /healthz   the process answers
GET  /api                       this API, to read  GET /readyz    questions are answered: 200, else 503
GET  /v1/settings               what can be asked  GET /metrics   Prometheus
POST /v1/ask                    ask a question     GET /openapi.json
POST /v1/questions/{id}/next    go on after a pause
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

import r3rag_jax
from r3rag_jax.config.serving import DemoConfig
from r3rag_jax.errors import UserError
from r3rag_jax.live.bodies import MAX_TEMPERATURE, NextBody, ask_body, settings_of
from r3rag_jax.live.following import Follower
from r3rag_jax.live.page import api_page, demo_page
from r3rag_jax.live.player import Player
from r3rag_jax.live.rows import Row, RowMaker, rows_schema
from r3rag_jax.rollout.live_scheduler import AskedQuestion
from r3rag_jax.serving.api import add_health_routes, new_api, openapi_body, openapi_refusals
from r3rag_jax.serving.bodies import read_body
from r3rag_jax.serving.gate import OPEN_PATHS, Gate
from r3rag_jax.serving.metrics import RequestMetrics
from r3rag_jax.serving.refusal import Refusal, busy
from r3rag_jax.types import Question

NDJSON = "application/x-ndjson"
NUM_EXAMPLES = 6
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class DemoApplication:
    """The demo as an ASGI application; `gate` is what uvicorn runs. Its player is set when it is open."""

    def __init__(self, title: str, config: DemoConfig, token: str, metrics: RequestMetrics):
        """`title`: what is shown, e.g. the name of the run."""
        self._title, self._config = title, config
        self._player: Player | None = None
        self._open_questions: dict[str, AskedQuestion] = {}
        self.app = new_api("r3rag_jax demo")
        self.app.openapi = self._openapi  # type: ignore[method-assign]
        self._add_routes(metrics)
        paths = [str(getattr(route, "path", "")) for route in self.app.routes]
        # The pages hold nothing of the run's; they ask for the token.
        self.gate = Gate(self.app, config, token, metrics, paths, (*OPEN_PATHS, "/", "/api"))
        metrics.watch("in_flight_requests", "Requests without a reply", lambda: self.gate.num_in_flight)
        metrics.watch("busy_slots", "Slots in which a question is answered", lambda: self._count("num_busy"))
        metrics.watch("waiting_questions", "Questions that wait for a slot", lambda: self._count("num_waiting"))

    def set_player(self, player: Player) -> None:
        """Answer questions from now on."""
        self._body = ask_body(self._config, player)
        self._player = player

    def _count(self, name: str) -> int:
        return 0 if self._player is None else getattr(self._player.scheduler, name)

    # ---- routes

    def _add_routes(self, metrics: RequestMetrics) -> None:
        refusals = openapi_refusals(_REFUSALS)
        stream: dict[int | str, dict[str, Any]] = {
            200: {"description": "A line of JSON for each event.", "content": {NDJSON: {"schema": rows_schema()[0]}}}
        }
        app = self.app
        app.post("/v1/ask", response_model=None, responses=stream | refusals)(self._ask)
        app.post(
            "/v1/questions/{id}/next", response_model=None, responses=refusals | openapi_refusals({404: _NOT_OPEN}),
            openapi_extra=openapi_body(NextBody.model_json_schema()),
        )(self._next)  # fmt: skip
        app.get("/v1/settings", response_model=None, responses={401: refusals[401], 503: refusals[503]})(self._settings)
        app.get("/", response_model=None, include_in_schema=False)(self._page)
        app.get("/api", response_model=None, include_in_schema=False)(self._api_page)
        add_health_routes(app, self._check_ready, metrics, refusals)

    async def _page(self) -> Response:
        page = demo_page()
        return HTMLResponse(page.html, headers=page.headers)

    async def _api_page(self) -> Response:
        page = api_page(self._openapi())
        return HTMLResponse(page.html, headers=page.headers)

    def _openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the limits of the player once it is open."""
        found = FastAPI.openapi(self.app)
        found.setdefault("components", {}).setdefault("schemas", {}).update(rows_schema()[1])
        if self._player is not None:
            found["paths"]["/v1/ask"]["post"] |= openapi_body(self._body.model_json_schema())
        return found

    async def _settings(self) -> Response:
        """What can be asked: policies, retrievers, defaults, limits, and questions of the data set."""
        player, config = self._ready(), self._config
        defaults = dataclasses.asdict(player.defaults)
        del defaults["single_steps"]
        return JSONResponse({
            "title": self._title, "version": r3rag_jax.__version__, "defaults": defaults,
            "policies": [{"name": name, "title": title} for name, title in player.policies.items()],
            "retrievers": [{"name": name, "title": title} for name, title in player.retriever_titles.items()],
            "limits": {
                "question_chars": config.max_question_chars, "k": max(config.max_k, player.defaults.k),
                "steps": max(config.max_steps, player.defaults.steps), "temperature": MAX_TEMPERATURE,
                "slots": player.scheduler.num_slots,
            },
            "examples": [question.question for question in examples(list(player.known.values()))],
        })  # fmt: skip

    async def _ask(self, request: Request) -> Response:
        """Answer a question, and tell what happens as it happens; a client that leaves stops it."""
        player = self._ready()
        body: Any = read_body(self._body, request.headers.get("content-type", ""), await request.body())
        settings, follower = settings_of(body), Follower(self._config.idle_s)
        try:
            question = player.question(body.question)
            asked = player.ask(question, settings, follower.tell)
        except UserError as error:
            raise Refusal(422, str(error)) from None
        rows = follower.rows(asked, RowMaker(question, settings), request.receive)
        if not body.stream:
            return await _last(rows)
        id = secrets.token_urlsafe(12)
        self._open_questions[id] = asked
        chosen = dataclasses.asdict(settings)
        first = {"event": "asked", "id": id, "settings": chosen, "golden_answers": question.golden_answers}

        def end() -> None:
            del self._open_questions[id]
            asked.cancel()  # rows that nobody has begun to take do not

        return _Lines(first, rows, end)

    async def _next(self, id: str, request: Request) -> Response:
        """Write the next step of a paused question."""
        body = read_body(NextBody, request.headers.get("content-type", ""), await request.body())
        if (asked := self._open_questions.get(id)) is None:
            raise Refusal(404, _NOT_OPEN)
        asked.go_on(single_steps=body.single_steps)
        return JSONResponse({"status": "ok"})

    def _check_ready(self) -> None:
        self._ready()

    def _ready(self) -> Player:
        if self.gate.is_draining:
            raise busy("the server is shutting down")
        if self._player is None:
            raise busy("the model is being loaded")
        if self._player.scheduler.is_closed:
            raise Refusal(503, "the engine has failed; the server must be started again")
        return self._player


async def _last(rows: AsyncIterator[Row | None]) -> Response:
    """The reply to a client that waits for the end."""
    last = None
    async for row in rows:
        last = row or last
    if last is None or last.event not in ("end", "failed"):
        raise busy("the question was stopped")
    found = last.model_dump()
    if "reason" in found:
        raise Refusal(500, found["reason"])
    return JSONResponse(found["result"])


class _Lines(Response):
    """A line of JSON for each row, sent when it comes; an empty line where none has come for a while."""

    def __init__(self, first: dict[str, Any], rows: AsyncIterator[Row | None], on_end: Callable[[], object]):
        super().__init__(media_type=NDJSON, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rows, self._on_end = first, rows, on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            with contextlib.suppress(OSError):  # the client has left
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send(_chunk(json.dumps(self._first)))
                async for row in self._rows:
                    await send(_chunk("" if row is None else row.model_dump_json()))
                await send({"type": "http.response.body", "body": b""})
        finally:
            self._on_end()
            await self._rows.aclose()  # type: ignore[attr-defined]


def _chunk(line: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"{line}\n".encode(), "more_body": True}


def examples(questions: list[Question]) -> list[Question]:
    """A few questions of different types, the first of each."""
    by_type: dict[Any, list[Question]] = {}
    for question in questions:
        by_type.setdefault(question.metadata.get("type"), []).append(question)
    rounds = (group[number] for number in range(NUM_EXAMPLES) for group in by_type.values() if len(group) > number)
    return [question for question, _ in zip(rounds, range(NUM_EXAMPLES), strict=False)]


_NOT_OPEN = "no question of this id is being answered"
_REFUSALS = {
    422: "The body breaks a rule, or the question does not fit the model's context.",
    500: "The question could not be finished.",
    503: "The model is being loaded, too many requests are in flight, or the server shuts down.",
}
