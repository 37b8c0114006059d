"""What every request passes before any of it is parsed: the key, the size, the depth, how many there may be at once."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from .metrics import Metrics


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None, **more: Any
) -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}


def too_deep(body: bytes, most: int) -> bool:
    """Whether a JSON text nests deeper than `most` levels (the parser itself stops at about 200)."""
    try:
        level = [from_json(body)]
    except ValueError as error:
        return "recursion" in str(error)  # whatever else is wrong is told by who reads it next
    for _ in range(most + 1):
        level = [
            item
            for value in level
            if isinstance(value, list | dict)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


def has_key(scope: Scope, key: str | None) -> bool:
    """Whether a request carries the key, as ``Authorization: Bearer <key>``."""
    given = dict(scope["headers"]).get(b"authorization", b"")
    return key is None or hmac.compare_digest(given, b"Bearer " + key.encode())


class Guard:
    """ASGI middleware. `key`: what /v1 and /metrics ask for, as ``Authorization: Bearer <key>``; None for nothing.

    A body is read whole before the application sees the request: `max_body` bytes, `max_depth` levels of JSON, within
    `seconds`. More than `max_open` requests to /v1 at a time are answered with 429.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        key: str | None = None,
        max_body: int = 2 << 20,
        max_depth: int = 32,
        max_open: int = 512,
        seconds: float = 30.0,
    ) -> None:
        self.app, self.metrics, self.key = app, metrics, key
        self.max_body, self.max_depth, self.max_open, self.seconds = max_body, max_depth, max_open, seconds
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status, path = time.perf_counter(), 500, scope["path"]

        async def spied(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        api = path.startswith("/v1/")
        self._open += 1
        self.metrics.open.inc()
        try:
            if (api or path == "/metrics") and not has_key(scope, self.key):
                body = error_body("the API key is missing or wrong", "authentication_error", code="invalid_api_key")
                return await _answer(spied, 401, body, {"www-authenticate": "Bearer"})
            if api and self._open > self.max_open:
                body = error_body("too many requests at once", "rate_limit_error", code="overloaded")
                return await _answer(spied, 429, body, {"retry-after": "1"})
            replayed = await self._read(scope, receive, spied) if api else receive
            if replayed is not None:
                await self.app(scope, replayed, spied)
        finally:
            self._open -= 1
            self.metrics.open.dec()
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> Receive | None:
        """A `receive` that gives the whole body first; None when the request has been answered."""
        body = bytearray()
        too_large = error_body(f"the request is larger than {self.max_body} bytes", "invalid_request_error")
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated[:19]) > self.max_body:
            await _answer(send, 413, too_large)
            return None
        until = time.monotonic() + self.seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.001, until - time.monotonic()))
            except asyncio.TimeoutError:
                await _answer(send, 408, error_body("the request's body did not come", "timeout_error"))
                return None
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_body:
                await _answer(send, 413, too_large)
                return None
            if not message.get("more_body"):
                break
        if too_deep(bytes(body), self.max_depth):
            why = f"the request nests deeper than {self.max_depth} levels"
            await _answer(send, 400, error_body(why, "invalid_request_error"))
            return None
        told = False

        async def replay() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return replay


async def _answer(send: Send, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    raw = json.dumps(body).encode()
    more = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": raw})
