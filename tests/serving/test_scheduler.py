"""The decoder: a row of a mixed batch, joining and leaving as it may, has the logits of PEFT's merged adapter alone."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_scenes import drain, row

from loralloy.errors import LoralloyError
from loralloy.serving.scheduler import Scheduler

COMPOSITIONS = [
    {"spam": 1.0},
    {"spam": 0.6, "weather": -0.5, "cooking": 1.2},
    {"cooking": 0.7},
    {"weather": 0.0},
    {"weather": 0.3, "cooking": 0.3},
]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(40, 200), k=length)


class Spy:
    """Keeps the logits that each row got."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.batches: list[int] = []
        take = scheduler._take

        def spied(rows, logits):
            self.batches.append(len(rows))
            for r, line in zip(rows, logits, strict=True):
                self.seen.setdefault(id(r), []).append(line.clone())
            return take(rows, logits)

        scheduler._take = spied


def check(tiny, spy, requests):
    for (made, heard), weights, ids in requests:
        tokens = heard.tokens
        steps = spy.seen[id(made)]
        want = tiny.scores(made.weights, ids + tokens)[len(ids) - 1 :][: len(steps)]
        got = torch.stack(steps)
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 1e-4, weights
        assert tokens == got.argmax(-1).tolist()[: len(tokens)]


@settings(max_examples=12)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 9), st.sampled_from(range(len(COMPOSITIONS))), st.integers(0, 6)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 5),
)
def test_rows_that_join_and_leave_have_the_logits_of_each_alone(tiny, paged, requests, most):
    """Left-padded prompts of different lengths, each its own composition, arriving while others run."""
    scheduler = Scheduler(tiny.model, tiny.tokenizer, paged, max_rows=most, prefill_tokens=60)
    spy, made = Spy(scheduler), []
    scheduler.ends = set()
    for i, (length, tokens, which, after) in enumerate(requests):
        one = row(prompt(i, length), COMPOSITIONS[which], max_tokens=tokens)
        scheduler.submit(one[0])
        made.append((one, COMPOSITIONS[which], prompt(i, length)))
        for _ in range(after):
            scheduler.step()
    drain(scheduler)
    check(tiny, spy, made)
    for ((_, heard), _, _), (_, tokens, _, _) in zip(made, requests, strict=True):
        assert heard.end.finish == "length" and len(heard.tokens) == tokens
    assert max(spy.batches) <= most


def test_the_cache_grows_past_its_spare_room_and_shrinks(tiny, paged):
    scheduler = Scheduler(tiny.model, tiny.tokenizer, paged)
    scheduler.ends = set()
    spy = Spy(scheduler)
    long, short = (
        row(prompt(1, 100), COMPOSITIONS[1], max_tokens=90),
        row(prompt(2, 3), COMPOSITIONS[0], max_tokens=120),
    )
    for one in (long, short):
        scheduler.submit(one[0])
    while len(scheduler.running) != 1:
        scheduler.step()
    assert scheduler._rows.columns == 3 + 89  # the last token is not in it yet; the long row's columns are given back
    drain(scheduler)
    check(tiny, spy, [(long, 1, prompt(1, 100)), (short, 0, prompt(2, 3))])
    assert scheduler._rows is None


def test_a_cancelled_row_leaves_and_the_others_go_on(tiny, scheduler):
    scheduler.ends = set()
    spy = Spy(scheduler)
    rows = [row(prompt(i, 5 + i), COMPOSITIONS[i], max_tokens=12) for i in range(4)]
    for one, _ in rows:
        scheduler.submit(one)
    scheduler.step()
    waits = row(prompt(9, 4), COMPOSITIONS[0], max_tokens=12)
    scheduler.submit(waits[0])
    rows[1][0].cancelled = waits[0].cancelled = True
    drain(scheduler)
    assert len(rows[1][1]) == 2 and waits[1] == []  # a prefill and a decode in the first step, then nothing
    rest = [i for i in range(4) if i != 1]
    check(tiny, spy, [(rows[i], i, prompt(i, 5 + i)) for i in rest])
    assert all(len(rows[i][1].tokens) == 12 for i in rest)


def test_late_rows_end_with_a_timeout(tiny, paged):
    now = [0.0]
    scheduler = Scheduler(tiny.model, tiny.tokenizer, paged, max_rows=1, clock=lambda: now[0])
    scheduler.ends = set()
    (one, heard), (two, waiting) = (row(prompt(i, 4), COMPOSITIONS[i], max_tokens=50) for i in range(2))
    one.deadline = two.deadline = 5.0
    scheduler.submit(one)
    scheduler.submit(two)
    scheduler.step()
    now[0] = 6.0
    drain(scheduler)
    assert heard.end.error == "timeout" and len(heard.tokens) == 2
    assert waiting.end.error == "timeout" and waiting.tokens == []


def test_an_end_token_ends_a_row(tiny, scheduler):
    one, heard = row(prompt(0, 6), COMPOSITIONS[0], max_tokens=20)
    alone, first = row(prompt(0, 6), COMPOSITIONS[0], max_tokens=20)
    ends, scheduler.ends = scheduler.ends, set()
    scheduler.submit(alone)
    drain(scheduler)
    scheduler.ends = ends | {first.tokens[3]}
    scheduler.submit(one)
    drain(scheduler)
    stop = first.tokens.index(first.tokens[3])
    assert heard.end.finish == "stop" and heard.tokens == first.tokens[:stop]


def test_a_row_waits_until_the_cache_has_room(tiny, paged):
    scheduler = Scheduler(tiny.model, tiny.tokenizer, paged, cache_tokens=64)
    scheduler.ends = set()
    spy = Spy(scheduler)
    for i in range(6):
        scheduler.submit(row(prompt(i, 8), COMPOSITIONS[0], max_tokens=8)[0])  # 16 columns each: four at a time
    drain(scheduler)
    assert max(spy.batches) == 4
    with pytest.raises(LoralloyError, match=r"up to 60 \+ 8 tokens, the server takes 64"):
        scheduler.submit(row(prompt(0, 60), COMPOSITIONS[0], max_tokens=8)[0])


def test_refused_rows(scheduler):
    with pytest.raises(LoralloyError, match="prompt is empty"):
        scheduler.submit(row([], COMPOSITIONS[0])[0])
    with pytest.raises(LoralloyError, match="token 9999 is not in the vocabulary"):
        scheduler.submit(row([9999], COMPOSITIONS[0])[0])
    with pytest.raises(LoralloyError, match="the server takes 512"):
        scheduler.submit(row([1] * 500, COMPOSITIONS[0], max_tokens=13)[0])


def test_one_bad_composition_fails_alone(tiny, scheduler):
    scheduler.ends = set()
    good, bad = row(prompt(0, 5), COMPOSITIONS[0], max_tokens=4), row(prompt(1, 5), {"music": 1.0}, max_tokens=4)
    for one in (good, bad):
        scheduler.submit(one[0])
    drain(scheduler)
    assert "'music', which is not in the bank" in bad[1].end.error
    assert good[1].end.finish == "length" and len(good[1].tokens) == 4


def test_a_failing_model_ends_the_rows_and_not_the_scheduler(tiny, scheduler, monkeypatch):
    scheduler.ends = set()
    one, heard = row(prompt(0, 5), COMPOSITIONS[0], max_tokens=9)
    scheduler.submit(one)
    scheduler.step()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_forward", lambda *a: (_ for _ in ()).throw(RuntimeError("no memory")))
        scheduler.step()
    assert heard.end.error == "no memory" and scheduler.idle
    again, told = row(prompt(0, 5), COMPOSITIONS[0], max_tokens=3)
    scheduler.submit(again)
    drain(scheduler)
    assert told.end.finish == "length"


def test_what_memory_held_before_is_never_seen(tiny, paged):
    """Rows of different lengths join and leave while all new memory is full of NaN."""
    scheduler = Scheduler(tiny.model, tiny.tokenizer, paged, max_rows=3)
    scheduler.ends = set()
    spy, made = Spy(scheduler), []
    torch.use_deterministic_algorithms(True)  # then torch fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        for i, length in enumerate((3, 17, 8, 25, 1)):
            one = row(prompt(i, length), COMPOSITIONS[i], max_tokens=2 + 3 * (i % 2))
            scheduler.submit(one[0])
            made.append((one, COMPOSITIONS[i], prompt(i, length)))
            scheduler.step()
        drain(scheduler)
    finally:
        torch.use_deterministic_algorithms(False)
    check(tiny, spy, made)


def test_the_bytes_of_the_rows_that_run(tiny, scheduler):
    """As a gauge says them: keys and values [rows, heads, columns, d] of every layer; none without rows."""
    config, scheduler.ends = tiny.model.config, set()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    one = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head  # a token's, in float32
    for length in (3, 9):
        scheduler.submit(row(prompt(0, length), {"spam": 1.0}, max_tokens=5)[0])
    assert scheduler.cache_bytes == 0
    scheduler.step()
    assert scheduler.cache_bytes == one * 2 * (9 + 1)
    drain(scheduler)
    assert scheduler.cache_bytes == 0
