"""Routing for many clients: who arrives together is embedded together, and each gets their own weights."""

from __future__ import annotations

import asyncio
import threading

import pytest

from loralloy.errors import LoralloyError
from loralloy.serving.engine import Busy
from loralloy.serving.routing import Routing
from loralloy.weights import Weights


class Slow:
    """A weigher that waits until it is let go; each text's weight is its length."""

    def __init__(self):
        self.batches, self.free = [], threading.Event()

    def weigh_batch(self, texts):
        self.batches.append(list(texts))
        assert self.free.wait(20)
        if "bad" in texts:
            raise LoralloyError("cannot be embedded")
        return [Weights({"a": float(len(text))}, explain={"unlike": 0.5}) for text in texts]


@pytest.fixture
def slow():
    return Slow()


def run(slow, work, **options):
    async def go():
        routing = Routing(slow, **options)
        try:
            return await asyncio.wait_for(work(routing), 20)
        finally:
            routing.close()

    return asyncio.run(go())


async def begun(slow, n=1):
    while len(slow.batches) < n:
        await asyncio.sleep(0.001)


def test_texts_that_arrive_meanwhile_go_together(slow):
    async def work(routing):
        first = asyncio.ensure_future(routing.weigh(["x"]))
        await begun(slow)
        rest = [asyncio.ensure_future(routing.weigh(["y" * i, "z" * i])) for i in range(2, 7)]
        await asyncio.sleep(0)
        slow.free.set()
        return await asyncio.gather(first, *rest)

    made = run(slow, work, max_batch=8)
    assert [len(b) for b in slow.batches] == [1, 8, 2]
    assert [[w.of("a") for w in one] for one in made] == [[1.0]] + [[i, i] for i in range(2, 7)]


def test_a_client_that_leaves_is_not_routed(slow):
    async def work(routing):
        first = asyncio.ensure_future(routing.weigh(["x"]))
        await begun(slow)
        second, third = (asyncio.ensure_future(routing.weigh([t])) for t in ("y", "z"))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        slow.free.set()
        return await asyncio.gather(first, third)

    run(slow, work)
    assert slow.batches == [["x"], ["z"]]


def test_a_failing_batch_is_told_and_the_next_goes_on(slow):
    slow.free.set()

    async def work(routing):
        bad = await asyncio.gather(routing.weigh(["bad"]), return_exceptions=True)
        return bad, await routing.weigh(["good"])

    bad, good = run(slow, work)
    assert str(bad[0]) == "cannot be embedded" and good[0].of("a") == 4


def test_refusals_and_fallbacks(slow):
    async def work(routing):
        with pytest.raises(LoralloyError, match="empty"):
            await routing.weigh(["a", " "])
        first = asyncio.ensure_future(routing.weigh(["x"]))
        await begun(slow)
        more = asyncio.ensure_future(routing.weigh(["x"] * 3))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="3 texts wait"):
            await routing.weigh(["y"])
        slow.free.set()
        return await first + await more

    made = run(slow, work, max_waiting=3, threshold=0.4)
    assert all(w.of("a") == 0 and w.explain["routed"] == {"a": 1.0} for w in made)
