"""A tiny served world: a random Llama, a bank of PEFT's adapters on it, and what a request's answer has to be."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch

from helpers import load_in_peft
from loralloy.bank import Bank
from loralloy.live.base import load_base
from loralloy.merging import merge
from loralloy.serving.app import create_app
from loralloy.serving.rows import Event, Row
from loralloy.serving.sampling import Sampling
from loralloy.serving.scheduler import Scheduler
from loralloy.weights import Weights


@dataclass
class Tiny:
    """The base, its tokenizer and the bank; `truth` is PEFT's model of a merged adapter."""

    model: Any
    tokenizer: Any
    bank: Bank
    root: Any
    made: dict[str, Any] = field(default_factory=dict)

    def truth(self, weights: Weights, rule: Any = "linear", **more: Any) -> Any:
        key = f"{dict(weights.coefficients)}{rule}{more}"
        if key not in self.made:
            fresh, _ = load_base(str(self.root / "model"), "float32", "cpu")
            if not any(w for _, w in weights.items()):
                return self.made.setdefault(key, fresh)
            folder = self.root / f"merged{len(self.made)}"
            merge(self.bank, weights, rule, **more).adapter.save(folder)
            self.made[key] = load_in_peft(fresh, folder)
        return self.made[key]

    def scores(self, weights: Weights, ids: list[int], *rule: Any) -> torch.Tensor:
        """PEFT's logits [len, vocabulary] of a row alone."""
        with torch.no_grad():
            return self.truth(weights, *rule)(input_ids=torch.tensor([ids])).logits[0]


class Heard(list):
    """The events of a row."""

    @property
    def tokens(self) -> list[int]:
        return [e.choice.token for e in self if e.choice]

    @property
    def text(self) -> str:
        return "".join(e.text for e in self)

    @property
    def end(self) -> Event:
        assert self and self[-1].last and not any(e.last for e in self[:-1])
        return self[-1]


def row(prompt: list[int], weights: dict[str, float], **sampling: Any) -> tuple[Row, Heard]:
    heard = Heard()
    return Row(list(prompt), Weights(weights), Sampling(**sampling), heard.append), heard


def drain(scheduler: Scheduler, steps: int = 500) -> None:
    for _ in range(steps):
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


PROMPT = "prize winner claim free cash"


class Api:
    """A served world, spoken to in the process; each call is one run of an event loop."""

    def __init__(self, service, key=None, hosts=None, headers=None):
        self.service, self.app, self.headers = service, create_app(service, key, hosts), headers
        self.loop = asyncio.new_event_loop()
        self.stack = contextlib.AsyncExitStack()
        self.run(self.stack.enter_async_context(self.app.router.lifespan_context(self.app)))

    def run(self, work):
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    @contextlib.asynccontextmanager
    async def client(self):
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=self.headers) as client:
            yield client

    def call(self, method, path, body=None, **more):
        async def go():
            async with self.client() as client:
                return await client.request(method, path, json=body, **more)

        return self.run(go())

    def post(self, path, **body):
        return self.call("POST", path, body)

    def complete(self, model, prompt=PROMPT, **body):
        return self.post("/v1/completions", model=model, prompt=prompt, **{"temperature": 0, **body})

    def close(self):
        self.run(self.stack.aclose())
        self.loop.close()


def refused(response, status, *says, code=None, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    for part in says:
        assert part in error["message"], error
    if code:
        assert error["code"] == code
    if param:
        assert error["param"] == param
    return error
