"""A request to vLLM and its answer, streamed through as it comes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..errors import LoralloyError
from ..serving.leaving import unless_gone

HEADER = "x-loralloy"
_MOST = 6000  # bytes of a header: servers and proxies read 8 KiB of one
# of this connection, not of the request (RFC 9110, 7.6.1); the length is that of what is sent
_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length", "expect",
}  # fmt: skip


class Forwarded(LoralloyError):
    """vLLM could not be asked; `status` is what the client gets."""

    def __init__(self, why: str, status: int, code: str) -> None:
        super().__init__(why)
        self.status, self.code = status, code


class Upstream:
    """vLLM at `url`. Args: `seconds` that it may be silent; `transport` in the place of the network (tests)."""

    def __init__(self, url: str, seconds: float = 300.0, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url, self.seconds = url.rstrip("/"), seconds
        self._client = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(seconds, connect=5.0, pool=30.0),
            limits=httpx.Limits(max_connections=1024, max_keepalive_connections=64),
            transport=transport,
            trust_env=False,
        )
        self._base: str | None = None

    async def send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> httpx.Response:
        """The answer, its body not read yet. Raises Forwarded when there is none."""
        if not target.startswith("/"):  # of an address, more than the path would change with it
            raise Forwarded("the request's target is no path", 400, "invalid_target")
        kept = {"accept-encoding": "identity"} | _end_to_end(headers)
        try:
            return await self._client.send(
                self._client.build_request(method, self.url + target, headers=kept, content=body), stream=True
            )
        except httpx.ConnectError:
            raise Forwarded(f"vLLM does not answer at {self.url}; is it running?", 502, "upstream_down") from None
        except httpx.PoolTimeout:
            raise Forwarded("too many requests are open to vLLM", 503, "upstream_busy") from None
        except httpx.TimeoutException:
            raise Forwarded(f"vLLM at {self.url} was silent for too long", 504, "upstream_timeout") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            said = f"the connection to vLLM at {self.url} broke: {type(error).__name__}"
            raise Forwarded(said, 502, "upstream_broke") from None

    async def base(self, headers: Mapping[str, str]) -> str:
        """The name that vLLM serves its base model under."""
        if self._base is None:
            only = {k: v for k, v in headers.items() if k.lower() == "authorization"}
            answer = await self.send("GET", "/v1/models", only, b"")
            try:
                data = json.loads(await answer.aread())["data"]
                self._base = str(next(card["id"] for card in data if not card.get("parent")))
            except (httpx.HTTPError, ValueError, LookupError, TypeError, StopIteration):
                said = f"vLLM at {self.url} does not list its models ({answer.status_code})"
                raise Forwarded(said, 502, "upstream_models") from None
            finally:
                await answer.aclose()
        return self._base

    def forget_base(self) -> None:
        """Ask for the base model's name again, the next time it is needed."""
        self._base = None

    async def close(self) -> None:
        await self._client.aclose()


async def forward(upstream: Upstream, request: Request, body: bytes, said: Mapping[str, Any] | None) -> Response:
    """vLLM's answer. With `said`, it is added as the field `loralloy` of a JSON answer, and as a header of any.

    Raises Forwarded, and Gone when the client leaves before vLLM has answered, which ends the request there too.
    """
    return await unless_gone(request, _answer(upstream, request, body, said))


async def _answer(upstream: Upstream, request: Request, body: bytes, said: Mapping[str, Any] | None) -> Response:
    target = request.scope["path"]  # as it was looked at, and of characters that need no escape (see front.PASSED)
    if query := request.scope.get("query_string", b""):
        target += "?" + query.decode("latin-1")
    answer = await upstream.send(request.method, target, request.headers, body)
    if said is not None and answer.status_code == 404:
        # once more: between vLLM's two looks at its list, the composition may have left it (see lending)
        await answer.aclose()
        upstream.forget_base()  # or vLLM was started again, and calls its base by another name
        answer = await upstream.send(request.method, target, request.headers, body)
    headers = _end_to_end(answer.headers)
    if said is None or answer.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        if said is not None:
            headers[HEADER] = _header(said)
        return _Through(answer, headers)
    try:
        content = await answer.aread()  # decoded
    except httpx.HTTPError as error:
        raise Forwarded(f"vLLM's answer broke off: {type(error).__name__}", 502, "upstream_broke") from None
    finally:
        await answer.aclose()
    headers = {k: v for k, v in headers.items() if k.lower() != "content-encoding"} | {HEADER: _header(said)}
    try:
        data = json.loads(content)
        if isinstance(data, dict):
            content = json.dumps(data | {"loralloy": said}).encode()  # ASCII: a text may hold half a surrogate pair
    except ValueError:
        pass
    return Response(content, answer.status_code, headers)


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """Without what is of one connection: the headers known for it, and those that `Connection` names."""
    named = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    return {k: v for k, v in headers.items() if k.lower() not in _HOP | named}


def _header(said: Mapping[str, Any]) -> str:
    """ASCII JSON; without the neighbours' texts, and without what makes it too long for a header."""
    route = dict(said["route"])
    near = [{k: n[k] for k in ("id", "task", "distance")} for n in route.pop("neighbours", [])]
    for short in (dict(said) | {"route": route | {"neighbours": near}}, dict(said) | {"route": route}):
        if len(text := json.dumps(short)) <= _MOST:
            return text
    return json.dumps({"composition": said["composition"][:2000]})


class _Through(StreamingResponse):
    """Bytes as they come; when the client leaves, vLLM is told by the connection's end, and stops."""

    def __init__(self, answer: httpx.Response, headers: Mapping[str, str]) -> None:
        super().__init__(self._bytes(answer), answer.status_code, dict(headers))
        self._answer = answer

    @staticmethod
    async def _bytes(answer: httpx.Response) -> AsyncIterator[bytes]:
        async for part in answer.aiter_raw():
            yield part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # under a version of ASGI in which a client's leaving is told by `receive`, and waited for
            await super().__call__({**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}, receive, send)
        except httpx.HTTPError as error:  # the status has been sent: all that is left is to break off
            raise ConnectionError(f"vLLM's answer broke off: {type(error).__name__}") from None
        finally:
            await self._answer.aclose()
