"""What the server refuses, and how it says so: keys, sizes, depths, queues, times, clients that leave, its own end."""

from __future__ import annotations

import asyncio
import json

import pytest
from serving_scenes import PROMPT, refused

from loralloy.serving.grammar import MAX_LENGTH
from loralloy.serving.service import Limits


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "0.6*spam + @ ties"}, 400, "character 12: expected an adapter's name"),
        ({"model": "music"}, 404, "no adapter 'music' in this bank; it has cooking, spam, weather"),
        ({"model": "../../etc/passwd"}, 400, "'.' has no meaning here"),
        ({"model": '"/etc/passwd"'}, 404, "no adapter '/etc/passwd'"),
        ({"model": "examples/bank/spam"}, 404, "no adapter 'examples/bank/spam'"),
        ({"model": "spam @ nonsense"}, 400, "rule 'nonsense' is not known"),
        ({"model": "x" * (MAX_LENGTH + 1)}, 400, f"at most {MAX_LENGTH}"),
        ({"model": None}, 400, "model"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": "a\ud800b"}, 400, "unicode"),
        ({"temperature": 9}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100000}, 400, "at most 1024"),
        ({"max_tokens": 400, "prompt": "x" * 200}, 400, "the server takes 512"),
        ({"n": 1000}, 400, "n: "),
        ({"stop": ["a"] * 9}, 400, "stop"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"echo": True}, 400, "echo"),
        ({"best_of": 3}, 400, "best_of is not supported"),
        ({"bank": "/tmp"}, 400, "Extra inputs are not permitted"),
        ({"stream_options": {"include_usage": True}}, 400, "stream=true"),
    ],
)
def test_bad_requests(api, body, status, says):
    raw = json.dumps({"model": "spam", "prompt": PROMPT, **body})
    said = api.call("POST", "/v1/completions", content=raw, headers={"content-type": "application/json"})
    refused(said, status, says)


def test_bad_chats(api):
    def chat(**body):
        return api.post(
            "/v1/chat/completions", **{"model": "spam", "messages": [{"role": "user", "content": "x"}], **body}
        )

    refused(chat(messages=[]), 400, "messages")
    refused(chat(messages=[{"role": "system", "content": "x"}]), 400, "none of role user")
    refused(chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role")
    picture = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    refused(chat(messages=[{"role": "user", "content": [picture]}]), 400, "messages.0.content")
    refused(chat(tools=[{"type": "function"}]), 400, "Extra inputs")
    refused(chat(top_logprobs=3), 400, "logprobs=true")
    refused(chat(response_format={"type": "json_object"}), 400, "response_format")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'{"model": ', b"\xff\xfe", b'"x"', b"[" * 199, b"1" * 5000]
)
def test_bodies_that_are_no_request(api, raw):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/route", "/v1/compositions"):
        refused(api.call("POST", path, content=raw, headers={"content-type": "application/json"}), 400)


def test_sizes_and_depths(serve):
    api = serve(limits=Limits(max_body=5000, max_tokens=64))
    head = {"content-type": "application/json"}
    refused(api.complete("spam", "x" * 6000), 413, "larger than 5000 bytes")
    deep = b'{"model": "spam", "prompt": "x", "metadata": ' + b'{"a":' * 40 + b"1" + b"}" * 41
    refused(api.call("POST", "/v1/completions", content=deep, headers=head), 400, "deeper than 32")
    refused(api.call("POST", "/v1/completions", content=b"[" * 4000, headers=head), 400, "deeper than 32")

    async def chunks():
        for _ in range(100):
            yield b" " * 100

    refused(api.call("POST", "/v1/completions", content=chunks(), headers=head), 413, "larger than 5000")
    assert api.complete("spam", "[" * 100, max_tokens=2).status_code == 200  # brackets in a text are no depth


def test_paths_that_are_not_there(api):
    refused(api.call("GET", "/v1/nothing"), 404)
    refused(api.call("DELETE", "/v1/models"), 405)
    refused(api.call("GET", "/v1/models/a%20@"), 400, "a rule's name")
    refused(api.post("/v1/compositions", model="auto"), 400, "/v1/route")
    refused(api.post("/v1/route", input=" "), 400, "empty")


def test_the_key(serve):
    api = serve(key="secret")
    for path in ("/v1/models", "/metrics"):
        refused(api.call("GET", path), 401, "API key", code="invalid_api_key")
        refused(api.call("GET", path, headers={"authorization": "Bearer secre\xff".encode("latin1")}), 401)
        assert api.call("GET", path, headers={"authorization": "Bearer secret"}).status_code == 200
    assert api.call("GET", "/healthz").json()["status"] == "ok"


def test_other_hosts_are_refused(serve):
    api = serve(hosts=["127.0.0.1", "localhost"])
    assert api.call("GET", "/v1/models").status_code == 200
    assert api.call("GET", "/v1/models", headers={"host": "evil.example"}).status_code == 400


def test_without_an_index_there_is_no_auto(serve):
    api = serve(index=False)
    assert "auto" not in [m["id"] for m in api.call("GET", "/v1/models").json()["data"]]
    refused(api.complete("auto"), 400, "--index")
    refused(api.post("/v1/route", input="x"), 400, "--index")
    refused(api.complete("spam", loralloy={"template": "auto"}), 400, "index")


def test_back_pressure(serve, tiny):
    """A full queue is 429 with Retry-After, and what was taken in is answered."""
    api = serve(max_rows=1, max_waiting=4)
    api.service.engine.scheduler.ends = set()

    async def go():
        async with api.client() as client:
            body = {"model": "spam", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(12)))

    said = api.run(go())
    good, full = [r for r in said if r.status_code == 200], [r for r in said if r.status_code == 429]
    assert len(good) + len(full) == 12 and len(good) >= 4 and full
    assert len({r.json()["choices"][0]["text"] for r in good}) == 1
    for r in full:
        refused(r, 429, "the queue holds 4", code="overloaded")
        assert 1 <= int(r.headers["retry-after"]) <= 60
    refused(api.complete("spam", [PROMPT] * 5), 429)  # never fits


def test_too_many_requests_at_once(serve):
    api = serve(limits=Limits(max_open=3))

    async def go():
        async with api.client() as client:
            calls = [client.post("/v1/completions", json={"model": "spam", "prompt": "x"}) for _ in range(8)]
            return await asyncio.gather(*calls)

    codes = [r.status_code for r in api.run(go())]
    assert codes.count(200) >= 3 and set(codes) == {200, 429}


def test_a_merge_too_large_is_refused(serve):
    api = serve(max_bytes=20000)
    refused(api.complete("spam + weather @ ties(rank=full)"), 400, "there is room for", "ties(rank=16)")
    assert api.complete("spam @ svd(rank=1)", max_tokens=1).status_code == 200


def test_the_merged_are_let_go_of(serve, tiny):
    api = serve(max_bytes=16000)
    for i in range(6):
        told = api.complete(f"spam + {i + 2}*weather @ svd(rank=1)", max_tokens=1).json()["loralloy"]
        assert told["cache"] == "merged"
    kept = api.call("GET", "/v1/compositions").json()
    assert 1 <= len(kept["data"]) < 6 and kept["bytes"] <= 16000
    live = api.service.compositions.live
    while api.service.engine.scheduler.jobs:
        pass
    assert sum(n.startswith("merged:") for n in live.names) == len(kept["data"])
    assert api.complete("spam + 2*weather @ svd(rank=1)", max_tokens=1).json()["loralloy"]["cache"] == "merged"


def test_time_is_limited(serve):
    api = serve(limits=Limits(seconds=0.02, max_tokens=450), max_rows=1)
    api.service.engine.scheduler.ends = set()
    refused(api.complete("spam", max_tokens=450), 504, "too long", code="timeout")
    streamed = api.complete("spam", max_tokens=450, stream=True).text
    assert "[DONE]" not in streamed and json.loads(streamed.split("data: ")[-1])["error"]["type"] == "timeout_error"
    assert api.complete("base", max_tokens=1).status_code in (200, 504) and api.service.engine.alive


def test_one_row_of_many_prompts_too_long(api):
    refused(api.complete("spam", ["x", "x" * 600]), 400, "the server takes 512")
    assert api.service.engine.waiting == 0
