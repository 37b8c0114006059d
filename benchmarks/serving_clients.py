"""What the clients of the load test ask for, and what they keep of the answers."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loralloy.tasks import load_tasks

TOKENS = (4, 24)
MERGED = ["ties(density=0.3)", "dare_ties(density=0.5, seed=1)", "magnitude_prune(density=0.5)"]
MALFORMED: list[tuple[str, bytes, set[int]]] = [
    ("no JSON", b'{"model": "base", "prompt": ', {400}),
    ("no such adapter", b'{"model": "nowhere", "prompt": "a"}', {404}),
    ("grammar", b'{"model": "0.5*+*base", "prompt": "a"}', {400}),
    ("unknown rule", b'{"model": "sarcasm @ nothing", "prompt": "a"}', {400}),
    ("field", b'{"model": "base", "prompt": "a", "max_tokens": -1}', {400}),
    ("type", b'{"model": "base", "prompt": {"a": 1}}', {400}),
    ("deep", b'{"model": "base", "prompt": ' + b"[" * 100 + b"]" * 100 + b"}", {400}),
    ("long", json.dumps({"model": "base", "prompt": "word " * 30000}).encode(), {400}),
    ("large", json.dumps({"model": "base", "prompt": "x" * (3 << 20)}).encode(), {413}),
    ("token ids", b'{"model": "base", "prompt": [999999999]}', {400}),
    ("not UTF-8", b'{"model": "base", "prompt": "\xff\xfe"}', {400}),
]


@dataclass
class Heard:
    """What the clients met. `answers` hold all that the check needs."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    route: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss: list[tuple[float, float]] = field(default_factory=list)
    own: list[tuple[float, float]] = field(default_factory=list)


def composition(source: random.Random, names: list[str], auto: bool) -> str:
    """A request's `model`: mostly sums of a few adapters, some of them weighted by layer, some named, auto, base, and some
    that have to be merged."""
    kind = source.random()
    if kind < 0.08:
        return "base"
    if kind < 0.2:
        return source.choice(names)
    if auto and kind < 0.35:
        return "auto"
    if kind < 0.45:  # few different ones, so that they are used again
        pair = names[: 2 + source.randrange(2)]
        return " + ".join(f"0.5*{n}" for n in pair) + " @ " + source.choice(MERGED)
    terms = source.sample(names, min(len(names), source.randint(2, 4)))
    if kind < 0.55:
        return " + ".join(f"[{source.uniform(-0.3, 0.7):.3f}, {source.uniform(0.1, 1):.3f}]*{n}" for n in terms)
    return " ".join(
        f"{'-' if source.random() < 0.15 else '+'} {source.uniform(0.1, 0.7):.3f}*{n}" for n in terms
    ).removeprefix("+ ")


def questions(folder: Path, count: int) -> list[str]:
    """Texts of the tasks' validation rows, where their data is there."""
    found: list[str] = []
    for task in load_tasks([folder]):
        try:
            found += [e.raw[:300] for e in task.examples("validation")[:20] if e.raw.strip()]
        except Exception as error:
            print(f"{task.name}: {error}", file=sys.stderr)
    return found[:count] if found else [f"A question about {word}?" for word in ("cats", "rain", "tax", "tea")]


async def one(
    client: httpx.AsyncClient, source: random.Random, names: list[str], texts: list[str], auto: bool, heard: Heard
) -> None:
    kind = source.random()
    if kind < 0.08:
        what, body, wanted = source.choice(MALFORMED)
        got = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        heard.kinds[f"malformed, {got.status_code}"] += 1
        if got.status_code not in wanted:
            heard.wrong.append(f"malformed ({what}): {got.status_code} {got.text[:200]}")
        return
    asked = {
        "model": composition(source, names, auto), "prompt": source.choice(texts), "temperature": 0, "logprobs": 1,
        "max_tokens": source.randint(*TOKENS),
    }  # fmt: skip
    start = time.perf_counter()
    if kind < 0.16:  # leaves before the answer, or within it
        try:
            async with asyncio.timeout(source.uniform(0.01, 1.5)):
                async with client.stream("POST", "/v1/completions", json=asked | {"stream": kind < 0.13}) as response:
                    async for _ in response.aiter_lines():
                        if source.random() < 0.3:
                            break
        except TimeoutError:
            pass
        heard.kinds["left"] += 1
        return
    if kind < 0.4:
        tokens, logprobs, composed, end, done = [], [], None, None, False
        async with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as response:
            if response.status_code != 200:
                heard.kinds[f"streamed, {response.status_code}"] += 1
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done = True
                    continue
                frame = json.loads(line[6:])
                if "error" in frame:
                    heard.wrong.append(f"streamed: {frame}")
                    return
                composed = composed or frame.get("loralloy")
                for choice in frame["choices"]:
                    tokens += choice["logprobs"]["tokens"]
                    logprobs += choice["logprobs"]["token_logprobs"]
                    end = choice["finish_reason"] or end
        if not done:
            heard.wrong.append("a stream ended without [DONE]")
        heard.kinds["streamed, 200"] += 1
    else:
        got = await client.post("/v1/completions", json=asked)
        heard.kinds[f"whole, {got.status_code}"] += 1
        if got.status_code != 200:
            if got.status_code != 429:
                heard.wrong.append(f"whole: {got.status_code} {got.text[:200]}")
            else:
                await asyncio.sleep(min(5.0, float(got.headers["retry-after"])))
            return
        body = got.json()
        composed, choice = body["loralloy"], body["choices"][0]
        tokens, logprobs, end = (
            choice["logprobs"]["tokens"],
            choice["logprobs"]["token_logprobs"],
            choice["finish_reason"],
        )
    heard.seconds.append(time.perf_counter() - start)
    heard.answers.append(
        asked | {"tokens": tokens, "token_logprobs": logprobs, "composition": composed["composition"], "finish": end}
    )
