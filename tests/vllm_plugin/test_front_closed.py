"""What the front keeps from clients: vLLM's other paths, whatever is written to hide one; other hosts; the key; broken lines."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from front_scenes import Fronted
from starlette.datastructures import URL
from starlette.requests import Request

from loralloy.vllm_plugin.forward import Upstream


@pytest.fixture
def front():
    return Fronted()


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/%6coad_lora_adapter", "/v1//load_LORA_adapter/",
     "/v1/x/../load_lora_adapter", "/adapters", "/adapters/a", "/scale_elastic_ep", "/reset_prefix_cache", "/invocations",
     "/release_kv_cache_memory", "/abort_requests", "/inference/v1/abort_requests", "/shutdown_weight_transfer_engine",
     "/finish_weight_update", "/weight_checker", "/fault_tolerance/apply", "/server_info", "/docs", "/v1/models%2F..%2Fx",
     "/health/../adapters", "/v1/responses/../load_lora_adapter", "/v1/models%0A", "/v1/m%C3%B6dels", "/v1/models/"],
)  # fmt: skip
def test_only_what_asks_a_model_passes(front, path):
    for method in ("GET", "POST"):
        answer = front.call(method, path, **({"json": {"lora_path": "/etc"}} if method == "POST" else {}))
        assert answer.status_code == 403 and "ask vLLM itself" in answer.json()["error"]["message"]
    assert not front.seen


def test_a_host_header_hides_no_path(monkeypatch):
    """``Host: x/health?`` may move the path of request.url (older Starlette); what is forwarded is in the scope."""
    monkeypatch.setattr(Request, "url", property(lambda _: URL("http://127.0.0.1/health?/hidden")))
    front = Fronted(key="secret")
    assert front.call("POST", "/tokenize").status_code == 401
    bearer = {"authorization": "Bearer secret"}
    assert front.call("POST", "/v1/load_lora_adapter", headers=bearer, json={}).status_code == 403
    assert not front.seen
    assert front.call("POST", "/v1/embeddings?a=1", headers=bearer, json={}).status_code == 200
    assert (front.seen[-1]["path"], front.seen[-1]["raw"]) == ("/v1/embeddings", b"{}")


@pytest.mark.parametrize("target", ["%2F@evil.example/", "@evil.example/", "http://evil.example/"])
def test_a_target_that_is_no_path_goes_nowhere(target):
    async def go():
        asked = []

        def answer(request):
            asked.append(request.url.host)
            return httpx.Response(200)

        upstream = Upstream("http://vllm:8000", 5.0, httpx.MockTransport(answer))
        with pytest.raises(ValueError, match="no path"):
            await upstream.send("GET", target, {}, b"")
        assert not asked

    asyncio.run(go())


def test_a_key_is_asked_for_and_passed_on():
    front = Fronted(key="secret")
    assert front.complete().status_code == 401 and front.call("POST", "/tokenize").status_code == 401
    assert front.call("GET", "/health").status_code == 200
    bearer = {"authorization": "Bearer secret"}
    body = {"model": "auto", "prompt": "WINNER"}
    assert front.call("POST", "/v1/completions", json=body, headers=bearer).status_code == 200
    assert front.seen[-1]["headers"]["authorization"] == "Bearer secret"


def test_another_host_is_refused(front):
    assert front.call("GET", "/health", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("path", ["/front/metrics", "/tokenize", "/metrics", "/load", "/v1/models"])
def test_with_a_key_nothing_but_a_look_at_its_life_is_open(path):
    front = Fronted(key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        assert front.call("GET", path, headers=headers).status_code == 401
    assert front.call("GET", path, headers={"authorization": "Bearer secret"}).status_code != 401
    assert [front.call("GET", open_).status_code for open_ in ("/health", "/ping", "/version")] == [200, 404, 418]


def test_headers_of_one_connection_stay_there(front):
    headers = {
        "connection": "close, X-Secret",
        "x-secret": "1",
        "te": "trailers",
        "x-mine": "2",
        "expect": "100-continue",
    }
    front.call("POST", "/v1/embeddings", headers=headers, json={})
    seen = front.seen[-1]["headers"]
    assert not {"x-secret", "te", "expect"} & set(seen) and seen["x-mine"] == "2" and seen["content-length"] == "2"


def test_half_a_surrogate_pair_takes_no_field_away():
    raw = b'{"text": "\\ud83d"}'
    answered = httpx.MockTransport(
        lambda _: httpx.Response(200, headers={"content-type": "application/json"}, content=raw)
    )
    said = json.loads(Fronted(transport=answered).complete().content)
    assert said["text"] == "\ud83d" and said["loralloy"]["weights"]["sms_spam"] == 0.7


def test_a_base_that_has_another_name_now_is_asked_for():
    names, asked = ["old", "new"], []

    def answer(request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": names[0]}]})
        asked.append(json.loads(request.content)["model"])
        return httpx.Response(200 if asked[-1] == names[0] else 404, json={})

    async def go():
        fronted = Fronted(transport=httpx.MockTransport(answer))
        transport = httpx.ASGITransport(fronted.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            body = {"model": "auto", "prompt": "unlike"}
            codes = [(await client.post("/v1/completions", json=body)).status_code]
            del names[0]
            codes += [(await client.post("/v1/completions", json=body)).status_code for _ in range(2)]
        fronted.front.routing.close()
        await fronted.front.upstream.close()
        return codes

    assert asyncio.run(go()) == [200, 404, 200]
    assert asked == ["old", "old", "old", "new"]


@pytest.mark.parametrize("path, body", [("/v1/completions", {"model": "auto", "prompt": "x"}), ("/v1/embeddings", {})])
def test_a_client_that_leaves_before_the_answer_ends_it_in_vllm(path, body):
    """Not only a stream: vLLM ends a request when its connection ends, and generates to the end otherwise."""

    async def go():
        begun, ended = asyncio.Event(), asyncio.Event()

        class Slow(httpx.AsyncBaseTransport):
            async def handle_async_request(self, request):
                begun.set()
                try:
                    await asyncio.sleep(60)
                finally:
                    ended.set()

        app = Fronted(transport=Slow()).app()
        raw, sent = json.dumps(body).encode(), []
        messages = [{"type": "http.request", "body": raw, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await begun.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": headers, "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "root_path": "",
            "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 20)
        assert ended.is_set() and sent[0]["status"] == 499

    asyncio.run(go())


def test_a_stream_that_breaks_off_in_vllm_does_not_end_well():
    class Broken(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield b"data: 1\n\n"
            raise httpx.ReadError("gone")

        async def aclose(self):
            closed.append(True)

    closed = []
    head = {"content-type": "text/event-stream"}
    fronted = Fronted(transport=httpx.MockTransport(lambda _: httpx.Response(200, headers=head, stream=Broken())))
    with pytest.raises(ConnectionError, match="broke off: ReadError"):
        fronted.complete(stream=True)
    assert closed
