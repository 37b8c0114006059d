"""Requests that are long: what they may cost, whom they hold up, and what becomes of what they leave."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from serving_scenes import PROMPT, refused

from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live.paged import PagedModel
from loralloy.serving import compositions as compositions_
from loralloy.serving.compositions import Compositions
from loralloy.serving.engine import Busy
from loralloy.serving.grammar import MAX_LENGTH, GrammarError, parse

LONG = "[" + "1, " * 4000 + "0.5]*spam"  # 12 thousand characters
LONGER = " + ".join("[" + "1, " * 3500 + f"0.5]*{name}" for name in ("spam", "weather", "cooking"))
SHORT = "[1, 0.5]*spam"


@pytest.fixture
def compositions(tiny, paged):
    made = Compositions(tiny.bank, paged)
    yield made
    made.close()


@pytest.mark.parametrize(
    "text",
    [
        " + ".join("[" + "1," * 4000 + f"1]*a{i}" for i in range(30)),
        " + ".join("[" + "1e6," * 4000 + f"1]*a{i}" for i in range(14)),
        " + ".join("{" + ",".join(f"m{j}:1" for j in range(4000)) + f"}}*a{i}" for i in range(8)),
    ],
    ids=["blanks", "digits", "modules"],
)
def test_what_is_read_can_be_said_and_asked_for_again(text):
    assert MAX_LENGTH // 2 < len(text) < MAX_LENGTH
    with pytest.raises(GrammarError, match=f"written out, .* more than {MAX_LENGTH} characters"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    ["1" * 200_000 + "*spam", "spam @ " + "t" * 200_000, "spam @ ties(" + "t" * 200_000 + "=1)", "[1 spam]*a" * 20_000],
)
def test_an_error_is_short_whatever_it_is_about(text):
    with pytest.raises(GrammarError) as error:
        parse(text)
    assert len(str(error.value)) < 2200


def test_the_way_out_is_told_of_a_long_one_too(tiny, paged):
    small = Compositions(tiny.bank, paged, max_bytes=1000)

    async def go():
        async with small.use(small.read(LONG + " @ svd")):
            raise AssertionError

    with pytest.raises(LoralloyError, match=r"room for 0; give a smaller rank, as in '@ svd\(rank=16\)'") as error:
        asyncio.run(go())
    assert len(str(error.value)) < 1500
    small.close()


def test_a_text_that_is_kept_counts(compositions):
    """A merged adapter may be smaller than what was asked for."""

    async def go():
        async with compositions.use(compositions.read("[1, 0.2]*spam @ svd(rank=1)")):
            short = compositions.size
        async with compositions.use(compositions.read(LONG + " @ svd(rank=1)")):
            return short, compositions.size - short

    short, long = asyncio.run(go())
    assert long > short + 10 * len(LONG)


def test_two_names_of_one_content_keep_their_own_weights(tiny):
    """They share a merged adapter; what is said of a request is its own."""
    twin = tiny.bank["spam"].__class__.load(tiny.root / "bank" / "spam", "twin")
    bank = Bank([tiny.bank["spam"], twin, tiny.bank["weather"]])
    live = PagedModel(tiny.model, bank)
    compositions = Compositions(bank, live)

    async def go():
        said = []
        for name in ("spam", "twin"):
            async with compositions.use(compositions.read(f"[0.2, 0.8]*{name} + weather @ ties")) as ready:
                said.append(ready)
        return said

    first, second = asyncio.run(go())
    assert (first.cache, second.cache) == ("merged", "hit") and first.key == second.key
    assert second.given.names == ["twin", "weather"]
    assert second.given.coefficients["twin"] == first.given.coefficients["spam"]
    assert compositions.look(second.composition).given == second.given
    compositions.close()
    live.close()


def test_long_ones_are_read_one_by_one_and_short_ones_meanwhile(compositions, monkeypatch):
    inside, most, let, threads = 0, 0, threading.Event(), set()

    def work(n):
        nonlocal inside, most
        inside, most = inside + 1, max(most, inside + 1)
        threads.add(threading.current_thread())
        let.wait(20)
        inside -= 1
        return n

    async def go():
        long = [asyncio.ensure_future(compositions.aside(1 << 18, work, n)) for n in range(3)]
        await asyncio.sleep(0.05)
        assert await compositions.aside(100, lambda: "short") == "short"
        async with compositions.use(compositions.read(SHORT)) as ready:
            assert ready.cache == "live"
        monkeypatch.setattr(compositions_, "_READING", 3)
        with pytest.raises(Busy, match="3 long compositions wait"):
            await compositions.asked("spam" + " " * 20_000)
        let.set()
        assert await asyncio.gather(*long) == [0, 1, 2]
        assert (await compositions.asked("spam" + " " * 20_000)).terms == (("spam", 1.0),)

    asyncio.run(go())
    assert most == 1 and len(threads) == 1 and threading.main_thread() not in threads


def test_all_prompts_of_a_request_have_one_composition(api, monkeypatch):
    calls, live = [], api.service.compositions._live
    monkeypatch.setattr(api.service.compositions, "_live", lambda c: (calls.append(c), live(c))[1])
    said = api.complete(SHORT, prompt=[PROMPT, "other", "third"], n=2, max_tokens=1).json()
    assert len(calls) == 1 and [c["index"] for c in said["choices"]] == list(range(6))
    assert all(c["loralloy"] == said["loralloy"] for c in said["choices"])
    calls.clear()
    api.complete("auto", prompt=[PROMPT, "other"], max_tokens=1)
    assert len(calls) == 2  # each its own


def test_a_long_one_is_said_with_few_answers(api):
    """It comes back with each: 256 times a text of a quarter of a million characters is not to be had for one."""
    assert len(LONGER) > 30_000
    assert api.complete(LONGER, prompt=["x"] * 32, n=1, max_tokens=1).status_code == 200
    error = refused(
        api.complete(LONGER, prompt=["x"] * 32, n=8, max_tokens=1), 400, "send fewer prompts, or a smaller n"
    )
    assert f"at most {(1 << 22) // len(LONGER)} of them" in error["message"]


@pytest.mark.parametrize("model", [LONG, SHORT])
def test_a_stream_says_it_once_a_choice(api, model):
    api.service.engine.scheduler.ends = set()
    said = api.complete(model, n=2, max_tokens=8, stream=True, stream_options={"include_usage": True}).text
    frames = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
    first = {f["choices"][0]["index"]: f for f in reversed(frames) if f["choices"]}
    assert set(first) == {0, 1} and all(f["model"] == model for f in first.values())
    others = [f for f in frames if f not in first.values()]
    short = model if model == SHORT else model[:1021] + "..."
    assert len(others) >= 8 and {f["model"] for f in others} == {short}


def raw(api, path, **body):
    """As JSON that writes half a surrogate pair, which Python's reader takes."""
    return api.call("POST", path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})


@pytest.mark.parametrize("path", ["/v1/compositions", "/v1/layers"])
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"\ud800": 1}, r"half a character"),
        ([{"filter": "\ud800", "value": 1}], "half a character"),
        ([{"filter": "*[\ud800q]_proj", "value": 1}, {"value": 0}], "half a character"),  # takes q_proj
        ([{"\udfff": 1}], "unknown field"),
        ([{"layers": "9" * 5000, "value": 1}, {"value": 0}], "not a range of layers"),
        ([{"layers": "0-" + "9" * 5000, "value": 1}, {"value": 0}], "not a range of layers"),
    ],
)
def test_what_json_can_write_and_an_answer_cannot(api, path, spec, says):
    error = refused(raw(api, path, weights={"spam": spec}), 400, says, code="invalid_weights")
    assert error["param"].startswith("weights.spam") and len(error["message"]) < 300


def test_a_rank_is_a_whole_number(api):
    for rank in (True, 2.0):
        refused(raw(api, "/v1/compositions", weights={"spam": 1}, rank=rank), 400, "valid integer")
