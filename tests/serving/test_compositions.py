"""Compositions in the live model: what makes two of them one, who waits for a merge, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import threading

import pytest

from loralloy.errors import LoralloyError
from loralloy.serving.compositions import Compositions, NotFound
from loralloy.serving.engine import Busy
from loralloy.weights import Weights

TEXT = "0.6*spam + 0.4*weather @ ties(density=0.3)"


@pytest.fixture
def compositions(tiny, paged):
    made = Compositions(tiny.bank, paged, max_waiting=2)
    yield made
    made.close()


def test_the_key_is_of_all_that_the_result_depends_on(compositions):
    key = compositions.key(compositions.read(TEXT))
    same = [
        "0.4*weather + 0.6*spam @ ties(density=0.3)",
        "0.60*spam+4e-1*weather@ties(space=delta, density=.3)",
        "0.6*spam + 0.4*weather @ ties(density=0.3, rank=max, vote=unweighted)",
    ]
    other = [
        "0.4*spam + 0.6*weather @ ties(density=0.3)",
        "0.6*spam + 0.4*cooking @ ties(density=0.3)",
        "0.6*spam + 0.4*weather @ ties(density=0.31)",
        "0.6*spam + 0.4*weather @ ties",
        "0.6*spam + 0.4*weather @ ties(density=0.3, space=factors)",
        "0.6*spam + 0.4*weather @ ties(density=0.3, rank=2)",
        "0.6*spam + 0.4*weather @ ties(density=0.3, vote=weighted)",
        "0.6*spam + 0.4*weather @ dare_ties(density=0.3)",
        "0.6*spam + 0.4*weather @ dare_ties(density=0.3, seed=1)",
    ]
    keys = [compositions.key(compositions.read(text)) for text in same + other]
    assert keys[: len(same)] == [key] * len(same)
    assert len({key, *keys[len(same) :]}) == 1 + len(other)


def test_reading(compositions, tiny, monkeypatch):
    assert compositions.read("spam").terms == (("spam", 1.0),)
    with pytest.raises(NotFound, match="no adapter 'ham' in this bank; it has cooking, spam, weather"):
        compositions.read("spam + ham")
    monkeypatch.setitem(tiny.bank._adapters, "2 odd-", tiny.bank["spam"])
    assert compositions.read("2 odd-").terms == (("2 odd-", 1.0),)  # an exact name needs no quotes


def test_routed_weights_take_the_place_of_auto(compositions):
    auto = compositions.read("auto @ ties")
    filled = compositions.fill(auto, Weights({"spam": 0.7, "weather": 0.3, "cooking": 0.0}))
    assert str(filled) == "0.7*spam + 0.3*weather @ ties"
    assert str(compositions.fill(auto, Weights({"spam": 0.0}))) == "base"
    with pytest.raises(LoralloyError, match="no auto"):
        compositions.fill(auto)


class Held:
    """Merges wait until they are let go."""

    def __init__(self, compositions, monkeypatch):
        self.free, self.begun = threading.Event(), []
        merge = compositions._merge_now

        def held(key, *args):
            self.begun.append(key)
            assert self.free.wait(20)
            return merge(key, *args)

        monkeypatch.setattr(compositions, "_merge_now", held)


def test_one_merge_for_all_who_ask_also_when_the_first_leaves(compositions, monkeypatch):
    held = Held(compositions, monkeypatch)

    async def use():
        async with compositions.use(compositions.read(TEXT)) as ready:
            return ready

    async def go():
        tasks = [asyncio.ensure_future(use()) for _ in range(4)]
        while not held.begun:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        held.free.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *rest = asyncio.run(go())
    assert isinstance(first, asyncio.CancelledError)
    assert [r.cache for r in rest] == ["merged"] * 3 and len(held.begun) == 1
    ((ready, entry),) = compositions.kept
    assert (entry.users, entry.uses, ready.cache) == (0, 3, "hit")


def test_merges_wait_in_a_queue_that_ends(compositions, monkeypatch):
    held = Held(compositions, monkeypatch)

    async def use(i):
        async with compositions.use(compositions.read(f"{i + 2}*spam @ svd(rank=1)")) as ready:
            return ready.cache

    async def go():
        tasks = [asyncio.ensure_future(use(i)) for i in range(3)]
        while len(held.begun) < 1 or not tasks[2].done():
            await asyncio.sleep(0.001)
        held.free.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    *good, full = asyncio.run(go())
    assert good == ["merged", "merged"]
    assert isinstance(full, Busy) and full.retry_after == 5


def test_a_failed_merge_is_told_to_all_and_leaves_nothing(compositions, monkeypatch):
    held = Held(compositions, monkeypatch)
    before = compositions.live.names

    def broken(plan, bank):
        raise LoralloyError("these cannot be combined")

    monkeypatch.setattr("loralloy.serving.compositions.run", broken)

    async def use():
        async with compositions.use(compositions.read(TEXT)):
            raise AssertionError

    async def go():
        held.free.set()
        return await asyncio.gather(use(), use(), return_exceptions=True)

    assert [str(e) for e in asyncio.run(go())] == ["these cannot be combined"] * 2
    assert compositions.live.names == before and not compositions.kept and not compositions._under_way


def test_what_is_in_use_stays(tiny, paged):
    compositions = Compositions(tiny.bank, paged)

    async def go():
        async with compositions.use(compositions.read("2*spam @ svd(rank=1)")):
            compositions.max_bytes = 2 * compositions.size + 100  # room for two
        async with (
            compositions.use(compositions.read("2*spam @ svd(rank=1)")) as one,
            compositions.use(compositions.read("3*spam @ svd(rank=1)")) as two,
        ):
            with pytest.raises(Busy, match="all merged compositions are in use"):
                async with compositions.use(compositions.read("4*spam @ svd(rank=1)")):
                    raise AssertionError
            assert {r.key for r, _ in compositions.kept} == {one.key, two.key}
        async with compositions.use(compositions.read("2*spam @ svd(rank=1)")):
            pass
        async with compositions.use(compositions.read("4*spam @ svd(rank=1)")) as three:
            assert three.cache == "merged"
        async with compositions.use(compositions.read("2*spam @ svd(rank=1)")) as again:
            assert again.cache == "hit"  # the one used longest ago went
        assert len(paged.names) == 3 + len(compositions.kept)

    asyncio.run(go())
    compositions.close()


def test_used_only_if_it_is_kept(compositions, monkeypatch):
    """Without `merge` nothing is merged, also not what was driven out since somebody looked; what is kept stays while used."""
    asked, merges = compositions.read(TEXT), []
    made = compositions._merge_now
    monkeypatch.setattr(compositions, "_merge_now", lambda *args: merges.append(args) or made(*args))

    async def go():
        async with compositions.use(asked, merge=False) as ready:
            assert (ready.cache, ready.error, ready.key) == ("cold", None, compositions.key(asked))
        async with compositions.use(asked):
            pass
        async with compositions.use(asked, merge=False) as ready:
            assert ready.cache == "hit"
            with pytest.raises(Busy):  # in use: it cannot go
                compositions._make_room(compositions.max_bytes)
        assert compositions.look(asked).cache == "hit"
        compositions._make_room(compositions.max_bytes)
        async with compositions.use(asked, merge=False) as ready:
            assert ready.cache == "cold"
        async with compositions.use(compositions.read("spam"), merge=False) as ready:
            assert ready.cache == "live"

    asyncio.run(go())
    assert len(merges) == 1 and not compositions.kept
