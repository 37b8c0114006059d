"""Clients that leave free what they had; the server's own end is told; what is let go of is never missed by a row."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from serving_scenes import PROMPT, refused

from loralloy.serving.service import Limits


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(serve, stream):
    api = serve(limits=Limits(max_tokens=450))
    engine, composed = api.service.engine, api.service.compositions
    engine.scheduler.ends = set()

    async def go():
        body = {"model": "spam @ svd", "prompt": PROMPT, "max_tokens": 450, "stream": stream}
        raw = json.dumps(body).encode()
        left, sent = asyncio.Event(), []

        async def receive(first=[True]):  # noqa: B006
            if first.pop() if first else False:
                return {"type": "http.request", "body": raw, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")], "client": ("x", 1), "server": ("y", 1),
        }  # fmt: skip
        task = asyncio.ensure_future(api.app(scope, receive, send))
        while not engine.running:
            await asyncio.sleep(0.001)
        assert composed.kept[0][1].users == 1
        left.set()
        await task
        while engine.running:
            await asyncio.sleep(0.001)
        return sent

    sent = api.run(go())
    assert engine.cancelled == 1 and composed.kept[0][1].users == 0
    assert [m["status"] for m in sent if m["type"] == "http.response.start"] == ([200] if stream else [499])
    assert api.complete("spam", max_tokens=2).status_code == 200


def test_shutting_down(serve):
    """Rows under way end; new ones are refused; health says so."""
    api = serve(limits=Limits(max_tokens=450))
    engine = api.service.engine
    engine.scheduler.ends = set()

    async def go():
        async with api.client() as client:
            body = {"model": "spam", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
            under_way = asyncio.ensure_future(client.post("/v1/completions", json=body))
            while not engine.running:
                await asyncio.sleep(0.001)
            stopping = asyncio.ensure_future(asyncio.to_thread(engine.stop, 30))
            while engine.alive:
                await asyncio.sleep(0.001)
            late, health = await client.post("/v1/completions", json=body), await client.get("/healthz")
            await stopping
            return await under_way, late, health

    done, late, health = api.run(go())
    assert done.status_code == 200 and done.json()["usage"]["completion_tokens"] == 60
    refused(late, 503, "shutting down", code="stopping")
    assert health.status_code == 503 and late.headers["retry-after"]


def test_rows_that_do_not_end_in_time_are_ended(serve):
    api = serve(limits=Limits(max_tokens=450, stopping_seconds=0.01))
    engine = api.service.engine
    engine.scheduler.ends = set()

    async def go():
        async with api.client() as client:
            body = {"model": "spam", "prompt": PROMPT, "max_tokens": 450}
            under_way = asyncio.ensure_future(client.post("/v1/completions", json=body))
            while not engine.running:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(engine.stop, 0.01)
            return await under_way

    refused(api.run(go()), 503, "shutting down", code="stopping")


def test_a_dead_decoder_is_told(serve, monkeypatch):
    api = serve()
    engine = api.service.engine

    def broken():
        raise AssertionError("a fault")

    monkeypatch.setattr(engine.scheduler, "step", broken)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    refused(api.complete("spam"), 503, "the decoder has died: AssertionError: a fault")
    refused(api.complete("spam"), 503, "the decoder has died")
    assert api.call("GET", "/healthz").status_code == 503


def test_letting_go_beside_rows_that_leave(serve, tiny):
    """Merged compositions come and go while their clients leave; the rows beside them never notice."""
    api = serve(max_bytes=12000, limits=Limits(max_tokens=450))
    api.service.engine.scheduler.ends = set()

    async def go():
        async with api.client() as client:

            async def leave(i):
                body = {"model": f"spam + {i + 2}*weather @ svd(rank=1)", "prompt": PROMPT, "max_tokens": 450}
                task = asyncio.ensure_future(client.post("/v1/completions", json=body))
                await asyncio.sleep(0.02)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            async def leaves():
                for i in range(12):
                    await leave(i)

            body = {"model": "0.5*cooking", "prompt": PROMPT, "max_tokens": 150, "temperature": 0}
            stay = [client.post("/v1/completions", json=body) for _ in range(3)]
            return (await asyncio.gather(*stay, leaves()))[:3]

    said = api.run(go())
    assert [r.status_code for r in said] == [200] * 3, [r.text for r in said]
    assert api.service.compositions.evicted >= 5


def test_an_adapter_goes_only_after_the_rows_that_left(serve, tiny):
    """A client leaves, and its composition is let go of, in the middle of a step that then sets the rows anew."""
    api = serve(max_bytes=12000, limits=Limits(max_tokens=450))
    scheduler, compositions = api.service.engine.scheduler, api.service.compositions
    scheduler.ends = set()

    async def go():
        async with api.client() as client:

            def ask(model, tokens=450):
                body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
                return asyncio.ensure_future(client.post("/v1/completions", json=body))

            stays, leaves = ask("cooking"), ask("spam + weather @ svd(rank=1)")
            while len(scheduler.running) < 2:
                await asyncio.sleep(0.001)
            key = compositions.kept[0][1].name
            asked, gone, decode = threading.Event(), threading.Event(), scheduler._decode

            def held():  # after the sweep, before the pass
                if not gone.is_set():
                    scheduler._set = []
                    asked.set()
                    gone.wait(20)
                decode()

            scheduler._decode = held
            await asyncio.to_thread(asked.wait, 20)
            leaves.cancel()
            await asyncio.gather(leaves, return_exceptions=True)
            compositions._make_room(compositions.max_bytes)
            assert not compositions.kept and key in compositions.live.names
            gone.set()
            said = await stays
            while scheduler.jobs:
                await asyncio.sleep(0.001)
            assert key not in compositions.live.names
            return said

    said = api.run(go())
    assert said.status_code == 200 and said.json()["usage"]["completion_tokens"] == 450
