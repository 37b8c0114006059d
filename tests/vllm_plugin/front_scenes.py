"""A front before a stand-in for vLLM."""

from __future__ import annotations

import asyncio
import json

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from loralloy.serving.routing import Routing
from loralloy.vllm_plugin.forward import Upstream
from loralloy.vllm_plugin.front import Front, create_front
from loralloy.weights import Weights

SPAM = {"sms_spam": 0.68, "sarcasm": 0.23, "question_type": 0.09}


class Weigher:
    """The word "unlike" in a text makes it unlike the index; accents stay in a neighbour."""

    def weigh_batch(self, texts):
        near = [{"id": "1", "task": "sms_spam", "distance": 0.2, "text": "Gewonnen! Prämie é " + "x" * 50}] * 3
        return [
            Weights(SPAM, explain={"unlike": 0.999 if "unlike" in text else 0.2, "neighbours": near}) for text in texts
        ]


def make_vllm(seen):
    app = FastAPI()

    @app.get("/v1/models")
    async def models():
        return {"data": [{"id": "a+b", "parent": "the-base"}, {"id": "the-base", "parent": None}]}

    @app.post("/v1/{kind:path}")
    async def complete(kind: str, request: Request):
        raw = await request.body()
        seen.append(
            {
                "path": request.scope["path"],
                "raw": raw,
                "headers": dict(request.headers),
                "query": request.scope["query_string"].decode(),
            }
        )
        try:
            body = json.loads(raw)
        except ValueError:
            return JSONResponse({"error": {"message": "no JSON"}}, 400)
        if body.get("prompt") == "missing once" and len(seen) == 1:
            return JSONResponse({"error": {"message": "does not exist"}}, 404)
        if body.get("stream"):

            async def events():
                for i in range(3):
                    yield f'data: {{"n": {i}}}\n\n'
                    await asyncio.sleep(0)
                yield "data: [DONE]\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")
        return {"model": body.get("model"), "choices": [{"text": "yes"}], "object": "text_completion"}

    @app.get("/health")
    async def health():
        return Response(status_code=200)

    @app.get("/version")
    async def odd(request: Request):
        return Response(b"\x00\xff", 418, {"x-odd": "1"}, "application/octet-stream")

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def rest(path: str, request: Request):
        seen.append({"path": request.scope["path"]})
        return Response(status_code=404)

    return app


class Fronted:
    def __init__(self, key=None, transport=None, **options):
        self.seen = []
        self.transport = transport or httpx.ASGITransport(make_vllm(self.seen))
        self.key, self.options = key, options

    def app(self):
        self.front = Front(Routing(Weigher(), 0.99), Upstream("http://vllm", 5.0, self.transport), **self.options)
        return create_front(self.front, self.key, ["127.0.0.1"])

    def call(self, method, path, **more):
        async def go():
            app = self.app()
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
                answer = await client.request(method, path, **more)
            self.front.routing.close()
            await self.front.upstream.close()
            return answer

        return asyncio.run(asyncio.wait_for(go(), 30))

    def complete(self, model="auto", prompt="WINNER", **body):
        return self.call("POST", "/v1/completions", json={"model": model, "prompt": prompt, **body})

    def chat(self, *messages, **body):
        return self.call("POST", "/v1/chat/completions", json={"model": "auto", "messages": list(messages), **body})

    @property
    def sent(self):
        return json.loads(self.seen[-1]["raw"])
