"""The thin server before vLLM: it routes requests whose model is `auto` and forwards what asks a model."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from .. import __version__
from ..errors import LoralloyError
from ..serving.engine import Busy
from ..serving.grammar import Composition
from ..serving.guard import Guard, error_body, has_key
from ..serving.leaving import Gone
from ..serving.metrics import Metrics
from ..serving.routing import Routing
from ..serving.schemas import Neighbour, Route
from .forward import Forwarded, Upstream, forward
from .routed import asks_router, composed, one_name, rounded

log = logging.getLogger("loralloy.front")
ROUTED = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}
OPEN = ("/health", "/ping", "/version")  # without a key, for who looks whether it lives
# What clients ask a model for. All else of vLLM stays closed: it loads adapters from a path that a client gives, shows the
# configuration, or puts the server to sleep, and every version adds to it.
PASSED = re.compile(
    r"/(?:health|ping|version|load|metrics|tokenize|detokenize|pooling|classify|score|rerank|generative_scoring"
    r"|v1/(?:models|embeddings|score|rerank|audio/transcriptions|audio/translations)"
    r"|v1/completions(?:/render|/derender)?|v1/chat/completions(?:/batch|/render|/derender)?"
    r"|v1/messages(?:/count_tokens|/render)?|v1/responses(?:/render|/[A-Za-z0-9_-]+(?:/cancel)?)?"
    r"|v2/rerank|v2/embed|cohere/v2/chat|inference/v1/generate)"
)
MAX_BODY = 8 << 20
_MOST = 20  # neighbours a request may ask for
_LONG = 16384  # characters that are read in some 20 ms
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Front:
    """What the front does; :func:`create_front` puts it behind HTTP.

    Attributes:
        routing: of the index; see :class:`loralloy.serving.routing.Routing`.
        upstream: vLLM.
        step, top: weights are rounded to multiples of `step` over the `top` largest, so that requests meet compositions
            that vLLM has.
        adapters: the bank's. Compositions of them go on under one name each (see :func:`.routed.one_name`).
    """

    routing: Routing
    upstream: Upstream
    step: float = 0.1
    top: int = 3
    metrics: Metrics = field(default_factory=Metrics)
    adapters: frozenset[str] = frozenset()
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "reader"), repr=False)

    async def compose(self, body: dict[str, Any], path: str, headers: Mapping[str, str]) -> dict[str, Any] | None:
        """Put the routed composition into a request for `auto`, in place, and say why; None for other models, of which a
        composition gets its one name.

        Raises LoralloyError for what cannot be routed.
        """
        asked = asks_router(body.get("model"))
        wanted = _wanted(body, asked)
        if asked is None:
            model = body.get("model")
            await self.aside(len(model) if isinstance(model, str) else 0, self.rename, body)
            return None
        (weights,) = await self.routing.weigh([_text(body, path)])
        chosen = composed(asked, rounded(dict(weights.items()), self.step, self.top))
        explain = weights.explain
        route = Route(
            weights=explain.get("routed") or dict(weights.items()),
            fallback="fallback" in explain,
            unlike=explain.get("unlike"),
            neighbours=[Neighbour(**n) for n in explain.get("neighbours", [])[:wanted]],
        )
        body["model"] = str(chosen) if chosen else await self.upstream.base(headers)
        terms = chosen or Composition()
        said = {"composition": str(terms), "weights": dict(terms.terms), "rule": str(asked.bound)}
        return said | {"route": route.model_dump(exclude_none=True)}

    async def aside(self, size: int, work: Callable[[T], R], given: T) -> R:
        """`work`, for something of so many characters: what is long in a thread, one by one."""
        if size <= _LONG:
            return work(given)
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, given)

    def close(self) -> None:
        self.routing.close()
        self._reader.shutdown(wait=False, cancel_futures=True)

    def rename(self, body: dict[str, Any]) -> None:
        """Put a composition's one name into a request, in place."""
        if isinstance(model := body.get("model"), str) and (name := one_name(model, self.adapters)) != model:
            body["model"] = name

    def renamed(self, raw: bytes) -> bytes:
        """A request's bytes, with a composition's one name if it is a JSON object with another."""
        try:
            body = json.loads(raw) if raw.lstrip()[:1] == b"{" else None
        except (ValueError, RecursionError):
            return raw  # vLLM says what is wrong with it
        if not isinstance(body, dict):
            return raw
        before = body.copy()
        self.rename(body)
        return raw if body == before else json.dumps(body).encode()


def create_front(front: Front, key: str | None = None, hosts: Sequence[str] | None = None) -> FastAPI:
    """The application.

    Args:
        key: the API key that /v1 asks for; it is passed on, so vLLM's --api-key is the same or none.
        hosts: values of a Host header that are answered; None for any.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        front.close()
        await front.upstream.close()

    app = FastAPI(title="LoRAlloy front", version=__version__, lifespan=lifespan, openapi_url=None)
    app.add_middleware(Guard, metrics=front.metrics, key=key, max_body=MAX_BODY)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    def locked(request: Request) -> Response | None:
        """An answer for who has not the key, on the paths that :class:`Guard` leaves open."""
        if has_key(request.scope, key):
            return None
        return JSONResponse(error_body("the API key is missing or wrong", "authentication_error"), 401)

    @app.get("/front/metrics", response_model=None)
    async def metrics(request: Request) -> Response:
        if (refused := locked(request)) is not None:
            return refused
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def routed(request: Request) -> Response:
        raw, said = await request.body(), None  # of a bounded size: see Guard
        try:
            body = json.loads(raw)
        except ValueError:
            body = None  # vLLM says what is wrong with it
        if isinstance(body, dict) and ("loralloy" in body or isinstance(body.get("model"), str)):
            before = body.copy()
            start = time.perf_counter()
            if (said := await front.compose(body, request.scope["path"], request.headers)) is not None:
                front.metrics.route(1, time.perf_counter() - start)
            if body != before:
                raw = json.dumps(body).encode()
        return await forward(front.upstream, request, raw, said)

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
    async def others(request: Request) -> Response:
        path = request.scope["path"]  # request.url is also made of the Host header, which a client writes
        if not PASSED.fullmatch(path):
            said = "the front does not pass this path on: it passes what asks a model; ask vLLM itself for the rest"
            return JSONResponse(error_body(said, "permission_error"), 403)
        if path not in OPEN and (refused := locked(request)) is not None:
            return refused
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > MAX_BODY:
                return JSONResponse(error_body(f"larger than {MAX_BODY} bytes", "invalid_request_error"), 413)
        return await forward(front.upstream, request, await front.aside(len(raw), front.renamed, bytes(raw)), None)

    @app.exception_handler(LoralloyError)
    async def wrong(_: Request, error: LoralloyError) -> JSONResponse:
        if isinstance(error, Forwarded):
            return JSONResponse(error_body(str(error), "server_error", code=error.code), error.status)
        if isinstance(error, Busy):
            said = error_body(str(error), "rate_limit_error", code="overloaded")
            return JSONResponse(said, 429, {"retry-after": str(error.retry_after)})
        return JSONResponse(error_body(str(error), "invalid_request_error"), 400)

    @app.exception_handler(Gone)
    async def gone(_: Request, __: Gone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def ours(_: Request, error: Exception) -> JSONResponse:
        log.exception("a request failed", exc_info=error)
        return JSONResponse(error_body("the front failed on this request; its log says why", "server_error"), 500)

    return app


def _wanted(body: dict[str, Any], asked: Composition | None) -> int:
    """The neighbours that a request's own field `loralloy` asks for; the field is taken out, since vLLM knows none."""
    field = body.pop("loralloy", None)
    if field is None:
        return 0
    if not isinstance(field, dict):
        raise LoralloyError('the field loralloy has to be an object, such as {"neighbours": 3}')
    if unknown := sorted(set(field) - {"neighbours", "template"}):
        raise LoralloyError(f"the field loralloy has no {unknown[0][:50]!r} here; it has neighbours")
    if field.get("template") not in (None, "none"):
        raise LoralloyError("the front sends a text as it is: template is for `loralloy serve`; leave it out")
    count = field.get("neighbours", 0)
    if type(count) is not int or not 0 <= count <= _MOST:
        raise LoralloyError(f"loralloy.neighbours has to be a whole number from 0 to {_MOST}")
    return count if asked is not None else 0


def _text(body: dict[str, Any], path: str) -> str:
    """What is routed: a completion's prompt, or a chat's last user message."""
    if ROUTED[path] == "prompt":
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise LoralloyError(
                "auto routes one text a request: give prompt as one string, and send each prompt by itself"
            )
        return prompt
    messages = body.get("messages")
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            parts = content if isinstance(content, list) else []
            texts = [p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)]
            if texts:
                return "\n".join(texts)
    raise LoralloyError("auto routes the last message of role user, and messages has none with text")
