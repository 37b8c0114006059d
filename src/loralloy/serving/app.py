"""The HTTP server: OpenAI's API over compositions, and the server's own endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..errors import LoralloyError
from .by_module import WeightError
from .compositions import NotFound
from .engine import Busy, Stopping
from .grammar import AUTO, BASE, Composition, GrammarError
from .guard import Guard, error_body
from .leaving import Gone, unless_gone
from .page import add_page
from .replies import Failed, Reply, TooLate
from .schemas import (
    ChatRequest,
    CompletionRequest,
    CompositionRequest,
    ErrorResponse,
    LayersReport,
    LayersRequest,
    RouteRequest,
    ServerReport,
)
from .service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
MAX_SAID = 4000  # characters of an error: it may quote what was sent
_STREAM = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def create_app(
    service: Service, key: str | None = None, hosts: Sequence[str] | None = None, page: bool = True
) -> FastAPI:
    """The application over a service, which it starts and stops.

    Args:
        service: see :func:`.service.build`.
        key: the API key that /v1 and /metrics ask for.
        hosts: the values of a Host header that are answered, so that no web page can reach a local server under a name of
            its own; None for any.
        page: whether there is a page at ``/``.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="LoRAlloy", version=__version__, lifespan=lifespan, responses=_ERRORS)
    app.state.service = service
    limits = service.limits
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        key=key,
        max_body=limits.max_body,
        max_depth=limits.max_depth,
        max_open=limits.max_open,
    )
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    _answer_errors(app)
    _openai(app, service)
    _own(app, service)
    if page:
        add_page(app)
    return app


def _openai(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.born, "owned_by": "loralloy"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What `model` may be: auto (with an index), base, and each adapter; compositions of these are not listed."""
        names = [*([AUTO] if service.routing else []), BASE, *service.bank.names]
        return {"object": "list", "data": [card(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model; a composition is one too."""
        asked = await service.compositions.asked(name)
        if asked.by_module:  # whether they fit their adapters
            await service.compositions.aside(asked.size, service.compositions.look, asked)
        return card(name)

    @app.post("/v1/completions", response_model=None, responses=_STREAM)  # type: ignore[arg-type]
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete a prompt under a composition."""
        return await _reply(service, body, request)

    @app.post("/v1/chat/completions", response_model=None, responses=_STREAM)  # type: ignore[arg-type]
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a chat under a composition; with auto, the last user message is routed."""
        return await _reply(service, body, request)


def _own(app: FastAPI, service: Service) -> None:
    @app.post("/v1/route")
    async def route(body: RouteRequest) -> dict[str, Any]:
        """The weights that auto would take for each text, and why."""
        routed = await service.route(body.input)
        said = [service.said(weights, body.neighbours).model_dump(exclude_none=True) for weights in routed]
        return {"object": "list", "data": [{"index": i, **one} for i, one in enumerate(said)]}

    @app.get("/v1/compositions")
    async def compositions() -> dict[str, Any]:
        """The merged compositions that are kept, the one used last first."""
        data = [
            service.described(ready).model_dump(exclude_none=True)
            | {"users": e.users, "uses": e.uses, "bytes": e.size, "seconds": e.seconds, "created": int(e.born)}
            for ready, e in service.compositions.kept
        ]
        return {"object": "list", "data": data, "bytes": service.compositions.size}

    @app.post("/v1/compositions")
    async def composition(body: CompositionRequest) -> dict[str, Any]:
        """How a composition is read and how it stands; with `prepare`, it is merged now if it has to be."""
        asked = await service.compositions.asked(await _what(service, body))
        if asked.auto:
            raise LoralloyError("auto is composed for each request; ask /v1/route for its weights")
        if not body.prepare:
            ready = await service.compositions.aside(asked.size, service.compositions.look, asked)
            return service.described(ready).model_dump(exclude_none=True)
        async with service.compositions.use(asked) as ready:
            return service.described(ready).model_dump(exclude_none=True)

    @app.post("/v1/layers")
    async def layers(body: LayersRequest, request: Request) -> LayersReport:
        """Where in the model a composition acts: the size of each adapter's part, and of the whole, by layer and projection."""
        try:
            return await unless_gone(request, service.layers.measure(await _what(service, body), body.prepare))
        except (asyncio.TimeoutError, TimeoutError):
            raise TooLate("measuring took too long") from None

    @app.get("/v1/server")
    async def server() -> ServerReport:
        """What this server has: an index or not, templates, rules, its limit of tokens."""
        return service.report()

    @app.get("/healthz")
    async def health() -> JSONResponse:
        """200 while rows are decoded, 503 once they are not."""
        engine = service.engine
        said = {"status": "ok" if engine.alive else "stopping", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(said, 200 if engine.alive else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _what(service: Service, body: CompositionRequest) -> str | Composition:
    """What is asked for; fields may be many."""
    return await service.compositions.aside(body.size, lambda: body.asked) if body.weights else body.asked


async def _reply(service: Service, body: CompletionRequest | ChatRequest, request: Request) -> Response:
    async with AsyncExitStack() as stack:
        begun = asyncio.wait_for(service.begin(body, stack), service.limits.seconds)
        try:
            reply = Reply(service, body, await unless_gone(request, begun))
            if not body.stream:
                return JSONResponse(await unless_gone(request, reply.whole()))
        except (asyncio.TimeoutError, TimeoutError):
            raise TooLate("composing took too long") from None
        return EventStream(reply.events(), stack.pop_all())
    raise AssertionError  # the stack swallows nothing


class EventStream(StreamingResponse):
    """Server-sent events; `stack` is closed however they end, also when they never began."""

    def __init__(self, events: AsyncIterator[str], stack: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            # under a version of ASGI in which a client's leaving is told by `receive`, and waited for
            await super().__call__({**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}, receive, send)


def _answer_errors(app: FastAPI) -> None:
    """Every error in the shape of OpenAI's API."""

    def answer(status: int, message: str, kind: str, code: str | None = None, **more: Any) -> JSONResponse:
        headers = more.pop("headers", None)
        param = more.pop("param", None)
        return JSONResponse(error_body(message, kind, param, code, **more), status, headers)

    @app.exception_handler(LoralloyError)
    async def wrong(_: Request, error: LoralloyError) -> JSONResponse:
        said = str(error)
        said = said if len(said) <= MAX_SAID else said[: MAX_SAID - 3] + "..."
        if isinstance(error, Busy):
            return answer(429, said, "rate_limit_error", "overloaded", headers={"retry-after": str(error.retry_after)})
        if isinstance(error, Stopping):
            return answer(503, said, "server_error", "stopping", headers={"retry-after": "10"})
        if isinstance(error, TooLate):
            return answer(504, said, "timeout_error", "timeout")
        if isinstance(error, Failed):
            return answer(500, said, "server_error", "decoding_failed")
        if isinstance(error, NotFound):
            return answer(404, said, "invalid_request_error", "model_not_found", param="model")
        if isinstance(error, GrammarError):
            return answer(
                400, said, "invalid_request_error", "invalid_composition", param="model", position=error.position
            )
        if isinstance(error, WeightError):
            return answer(400, said, "invalid_request_error", "invalid_weights", param=error.place)
        return answer(400, said, "invalid_request_error")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith("function-"))[:200]
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return answer(400, message, "invalid_request_error", first["type"], param=where or None)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), "invalid_request_error", headers=error.headers)

    @app.exception_handler(Gone)
    async def gone(_: Request, __: Gone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def ours(_: Request, error: Exception) -> JSONResponse:
        with contextlib.suppress(Exception):
            logging.getLogger("loralloy.serving").exception("a request failed", exc_info=error)
        return answer(500, "the server failed on this request; its log says why", "server_error")
