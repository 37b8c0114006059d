"""Part c of the serving benchmark: what routing costs a request, embedding included, idle and among many."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

import numpy as np

from loralloy.bank import Bank
from loralloy.cli.ask import open_router
from loralloy.serving.routing import Routing
from serving_load import questions
from serving_world import Clock, said


async def _idle(routing: Routing, texts: list[str]) -> list[float]:
    took = []
    for text in texts:
        start = time.perf_counter()
        await routing.weigh([text])
        took.append(time.perf_counter() - start)
    return took


async def _crowd(routing: Routing, texts: list[str], clients: int, each: int) -> tuple[float, list[float]]:
    """Seconds of all, and each request's: `clients` that ask one after the other, `each` times."""
    took: list[float] = []

    async def client(number: int) -> None:
        source = random.Random(number)
        for _ in range(each):
            start = time.perf_counter()
            await routing.weigh([source.choice(texts)])
            took.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(clients)))
    return time.perf_counter() - start, took


def run(given: Any, clock: Clock) -> dict[str, Any]:
    weigher = open_router(str(given.index), Bank.load(given.bank), None, None, "exp", None, "auto", True, show=20)
    weigher.weigh("warm")
    texts = questions(given.tasks, 120)
    found: dict[str, Any] = {"vectors": sum(e.vectors for e in weigher.index.tasks.values()), "clients": given.clients}

    def figures(took: list[float]) -> dict[str, float]:
        p50, p99 = np.percentile(took, [50, 99]) * 1e3
        return {"p50 ms": float(p50), "p99 ms": float(p99), "n": len(took)}

    async def all_() -> None:
        sizes: list[tuple[int, float]] = []
        routing = Routing(weigher, on_batch=lambda n, s: sizes.append((n, s)))
        found["idle"] = figures(await _idle(routing, texts))
        said(f"idle {found['idle']['p50 ms']:.1f} ms", clock)
        rounds: dict[str, list[tuple[float, list[float], float]]] = {"batched": [], "one by one": []}
        for _ in range(3):
            for name, most in (("batched", 64), ("one by one", 1)):
                sizes.clear()
                routing.max_batch = most
                seconds, took = await _crowd(routing, texts, given.clients, 6)
                rounds[name].append((len(took) / seconds, took, statistics.mean(n for n, _ in sizes)))
        for name, made in rounds.items():
            found[name] = figures([t for _, took, _ in made for t in took]) | {
                "texts/s": statistics.median(rate for rate, _, _ in made), "texts a batch": made[0][2],
            }  # fmt: skip
        routing.close()

    asyncio.run(all_())
    weigher.index.close()
    said(f"{given.clients} at once: {found['batched']} against {found['one by one']}", clock)
    return found


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"The index has {found['vectors']:,} vectors; the cost is embedding, search, weights and neighbours' texts, without "
        "HTTP (the load test has it with HTTP and beside decoding).",
        "",
        "| | p50, ms | p99, ms | texts/s | texts a batch |",
        "|---|---|---|---|---|",
    ]
    for name, what in (
        ("idle", "idle, one at a time (asked: p50 at most 40)"),
        ("batched", f"{found['clients']} clients at once, batched as they come"),
        ("one by one", f"{found['clients']} clients at once, each text embedded alone"),
    ):
        s = found[name]
        more = f"{s['texts/s']:.0f} | {s['texts a batch']:.1f}" if "texts/s" in s else "|"
        lines.append(f"| {what} | {s['p50 ms']:.1f} | {s['p99 ms']:.1f} | {more} |")
    return lines + (["", found["note"]] if "note" in found else [])
