"""The routes: which path does what, and what every failure of theirs becomes.

Rules: a route parses, asks the Front, and shapes what came; it decides nothing else. Errors reach the client in one
shape through the table of errors.py; an exception of another kind is a bug, answered 500 and logged in full.

Source: INTERFACES.md, "HTTP".
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, cast

import msgspec
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from node.errors import InternalError, NotReady, RequestError, UnknownModel
from node.front import Front, ModelRow
from node.metrics import CONTENT_TYPE, OPENMETRICS_TYPE, pieces, wants_openmetrics
from node.tallies import model_rows
from node.version import VERSION
from node.web.answers import ClientGone
from node.web.anthropic import Anthropic
from node.web.door import COUNTS_KEY, REQUEST_ID_KEY, Door, WebCounts
from node.web.embeddings import Embeddings
from node.web.errors import MethodNotAllowed, NotFound, error_answer
from node.web.gate import Gate
from node.web.generation import Generations
from node.web.itself import Itself
from node.web.meter import Meter
from node.web.metered import MeteredFront
from node.web.ollama import Ollama
from node.web.pages import page_routes
from node.web.responses import Responses
from node.web.schema_openapi import document
from node.web.sealed import Sealed
from node.web.self_tools import SelfTools
from node.web.session import SessionRoutes
from node.web.settings import WebConfig
from node.web.training import Training
from node.web.wallets import SignIns

log = logging.getLogger("node.web")

Endpoint = Callable[[Request], Awaitable[ASGIApp]]  # a Response is an ASGI application too


def build_app(front: Front, rng: Random, config: WebConfig | None = None, *, stop: trio.Event | None = None) -> Door:
    """The application of a node. `rng` draws the seeds of requests that name none; at `stop` live pages end."""
    config = config or WebConfig()
    gate, meter, counts = config.gate, Meter(), WebCounts()
    front = cast(Front, MeteredFront(front, meter, counts.drops))  # what it does not meter it hands on
    sign_ins = SignIns(gate.audience, gate.wallets)
    session = SessionRoutes(sign_ins)
    embeddings = Embeddings(front)
    own = SelfTools(front, is_on=config.self_report)
    generations = Generations(front, rng, embeddings, config.defaults, self_tools=own)
    facts = Facts(front)
    itself = Itself(front)
    training = Training(front)
    sealed = Sealed(front)
    routes = [
        *work_routes(generations, embeddings),
        post("/api/v1/sealed", sealed.sealed),
        get("/api/v1/peers/{peer}/sealing-key", sealed.key),
        get("/v1/models", facts.models),
        get("/v1/models/{model:path}", facts.model),
        get("/openapi.json", facts.openapi),
        get("/healthz", facts.healthz),
        get("/readyz", facts.readyz),
        get("/metrics", facts.metrics),
        get("/api/v1/metrics/model", facts.metrics_model),
        get("/api/v1/status", facts.status),
        get("/api/v1/peers", facts.peers),
        get("/api/v1/self", itself.told),
        get("/api/v1/self/history", itself.history),
        get("/api/v1/memory", itself.recall),
        post("/api/v1/memory", itself.note),
        Route("/api/v1/memory", itself.forget, methods=["DELETE"]),
        get("/api/v1/memory/verify", itself.verify),
        post("/api/v1/session/challenge", session.challenge),
        post("/api/v1/session", session.session),
        get("/api/v1/training", training.status),
        post("/api/v1/training/start", training.start),
        post("/api/v1/training/join", training.join),
        post("/api/v1/training/pause", training.pause),
        post("/api/v1/training/resume", training.resume),
        post("/api/v1/training/leave", training.leave),
        *Anthropic(front, generations).routes(),
        *Responses(generations).routes(),
        *Ollama(front, generations, embeddings).routes(),
    ]
    routes += page_routes(front, trio.Event() if stop is None else stop, frozenset(route.path for route in routes))
    inner = Gate(application(routes), gate, meter, sign_ins)
    return Door(inner, config.door, counts, inner.early)


def get(path: str, endpoint: Endpoint) -> Route:
    """A route that tells."""
    return Route(path, endpoint, methods=["GET"])


def post(path: str, endpoint: Endpoint) -> Route:
    """A route that does."""
    return Route(path, endpoint, methods=["POST"])


def work_routes(generations: Generations, embeddings: Embeddings) -> list[Route]:
    """What models are asked for: over HTTP, and inside of sealed requests."""
    return [
        post("/v1/chat/completions", generations.chat),
        post("/v1/completions", generations.completions),
        post("/v1/embeddings", embeddings.embeddings),
        post("/api/v1/model/inference", generations.inference),
    ]


def application(routes: list[Route]) -> Starlette:
    """These routes, with the table of errors."""
    handlers: Any = {
        RequestError: _on_request_error,
        ClientGone: _on_client_gone,
        HTTPException: _on_http_exception,
        Exception: _on_bug,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class Facts:
    """The routes that only tell."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._started_s = int(time.time())

    async def models(self, request: Request) -> Response:
        rows = merged(self._front.models())
        return json_response({"object": "list", "data": [self._model(same) for same in rows.values()]})

    async def model(self, request: Request) -> Response:
        rows, wanted = merged(self._front.models()), request.path_params["model"]
        if wanted not in rows:
            raise UnknownModel(
                f"no live peer serves the model {wanted[:200]!r}; served are: {', '.join(rows) or 'none'}",
                param="model",
                more={"is_possible": False, "models": sorted(rows)},
            )
        return json_response(self._model(rows[wanted]))

    def _model(self, same: list[ModelRow]) -> dict[str, object]:
        first = same[0]
        return {
            "id": first.id,
            "object": "model",
            "created": self._started_s,
            "owned_by": "openagi",
            "revision": first.revision,
            "kind": first.kind,
            "peers": sum(row.peers for row in same),
            "context_tokens": first.context_tokens,
            "local": any(row.local for row in same),
            "embeds": any(row.embeds for row in same),
            "revisions": [{"revision": row.revision, "peers": row.peers} for row in same],
        }

    async def openapi(self, request: Request) -> Response:
        return json_response(document(request.app.routes, VERSION))

    async def healthz(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        readiness = self._front.readiness()
        told: dict[str, Any] = {"ready": readiness.ready, "reason": readiness.reason, "loading": readiness.loading}
        told["degraded"] = list(readiness.degraded)
        if readiness.ready:
            return json_response(told)
        more = {"loading": readiness.progress} if readiness.progress is not None else None
        error = NotReady(readiness.reason, retry_after_s=readiness.retry_after_s, more=more)
        status, headers, body = error_answer(error, request.scope[REQUEST_ID_KEY], request.scope["path"])
        return json_response({**told, **msgspec.json.decode(body)}, status=status, headers=headers)

    async def status(self, request: Request) -> Response:
        return json_response(self._status(request))

    async def metrics(self, request: Request) -> Response:
        is_open, written = wants_openmetrics(request.headers.get("accept", "")), list[str]()
        for piece in pieces(self._status(request), self._front.measured(), is_open=is_open):
            written.append(piece)
            await trio.lowlevel.checkpoint()  # others wait for one piece, and not for all
        return Response("".join(written), media_type=OPENMETRICS_TYPE if is_open else CONTENT_TYPE)

    async def metrics_model(self, request: Request) -> Response:
        return json_response({"models": model_rows(self._front.measured().models)})

    def _status(self, request: Request) -> dict[str, Any]:
        counts = request.scope[COUNTS_KEY]
        web = {"requests": counts.requests, "connections": counts.connections, "drops": dict(counts.drops)}
        return {**self._front.status(), "web": web}

    async def peers(self, request: Request) -> Response:
        return json_response({"peers": self._front.peers()})


def merged(rows: list[ModelRow]) -> dict[str, list[ModelRow]]:
    """Rows by model id, in the order in which the ids first come."""
    by_id: dict[str, list[ModelRow]] = {}
    for row in rows:
        by_id.setdefault(row.id, []).append(row)
    return by_id


def json_response(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


class _NoResponse(Response):
    """For a client that has gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


def _refused(request: Request, error: RequestError, **more: str) -> Response:
    status, headers, body = error_answer(error, request.scope[REQUEST_ID_KEY], request.scope["path"])
    return Response(body, status, {**headers, **more})


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _refused(request, error)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return _NoResponse()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method[:20]} is not for {request.url.path[:200]}; it takes {allowed}"
        return _refused(request, MethodNotAllowed(message), allow=allowed)
    return _refused(request, NotFound(f"there is no route {request.url.path[:200]!r}{_meant(request.url.path)}"))


def _meant(path: str) -> str:
    """What a base URL that is not quite right makes of a route of OpenAI's or Anthropic's, put right."""
    end = "/" + re.sub("/+", "/", path).strip("/").removeprefix("v1/").removeprefix("v1/")
    if end not in ("/completions", "/chat/completions", "/embeddings", "/models", "/responses", "/messages"):
        return ""
    base = "http://HOST:PORT" if end == "/messages" else "http://HOST:PORT/v1"
    return f"; it is at '/v1{end}': the client's base URL is {base}"


async def _on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the exception again after this response, and Hypercorn logs its traceback."""
    log.error("%s %s ended in a bug: %r", request.scope[REQUEST_ID_KEY], request.url.path, error)
    return _refused(
        request, InternalError(f"a bug ended this request; the log has it as {request.scope[REQUEST_ID_KEY]}")
    )
