"""Sampling by row, and a row's text as its tokens come."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loralloy.serving.sampling import Sampling, TextBuffer, choose


def draws(logits, n, **how):
    """How often each token is drawn in n rows of these logits."""
    rows = torch.tensor([logits]).repeat(n, 1)
    source = random.Random(0)
    made = choose(rows, [Sampling(**how)] * n, [source] * n)
    return torch.bincount(torch.tensor([c.token for c in made]), minlength=len(logits)) / n


def test_draws_follow_the_distribution():
    logits = [0.0, 1.0, -1.0, 2.0, float("-inf")]
    for temperature in (0.5, 1.0, 2.0):
        want = (torch.tensor(logits) / temperature).softmax(-1)
        assert draws(logits, 20000, temperature=temperature) == pytest.approx(want, abs=0.012)  # 3.4 standard errors


@pytest.mark.parametrize("wide", [False, True])
def test_top_p_keeps_the_fewest_that_reach_it(wide):
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = probabilities.log().tolist()
    if wide:  # the same with a long tail, so that the head of 1,024 is not all
        logits += [-30.0] * 3000
    for p, kept in ((0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.75, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        got = draws(logits, 1500, temperature=1.0, top_p=p - 1e-6)
        assert got.nonzero()[:, 0].tolist() == kept
        assert got[kept] == pytest.approx(probabilities[kept] / probabilities[kept].sum(), abs=0.05)


def test_top_p_beyond_the_head():
    logits = torch.zeros(5000)
    seen = draws(logits.tolist(), 1500, temperature=1.0, top_p=0.9)
    assert int((seen > 0).sum()) > 1024 and not seen[4501:].any()  # equal tokens: the lowest ids


@given(st.integers(0, 2**31), st.integers(1, 5), st.floats(0.05, 2), st.floats(0.05, 1))
def test_a_seeded_row_draws_the_same_in_any_batch(seed, place, temperature, top_p):
    mine = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
    others = torch.randn(5, 50, generator=torch.Generator().manual_seed(seed + 1))
    how = Sampling(temperature=temperature, top_p=top_p)
    alone = choose(mine, [how], [random.Random(seed)])[0]
    batch = torch.cat([others[:place], mine, others[place:]])
    settings_ = [Sampling(temperature=i % 2) for i in range(place)] + [how] + [Sampling()] * (5 - place)
    sources = [random.Random(i) for i in range(place)] + [random.Random(seed)] + [random.Random(9)] * (5 - place)
    assert choose(batch, settings_, sources)[place] == alone


def test_greedy_and_logprobs():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    logits[2] = float("nan")
    how = [Sampling(logprobs=3), Sampling(), Sampling(logprobs=0)]
    first, second, third = choose(logits, how, [random.Random()] * 3)
    logp = logits[0].log_softmax(-1)
    assert first.token == int(logits[0].argmax()) and first.logprob == pytest.approx(float(logp.max()))
    assert [t for t, _ in first.top] == logp.topk(3).indices.tolist()
    assert second.token == int(logits[1].argmax()) and second.logprob is None and third is None
    (only,) = choose(torch.tensor([[0.0, float("-inf")]]), [Sampling(logprobs=2)], [random.Random()])
    assert only.top == ((0, 0.0), (1, -9999.0)) and only.logprob == 0


class Bytes:
    """A tokenizer of one token a byte."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def pieces(text, stop=()):
    buffer, shown = TextBuffer(Bytes(), stop), []
    for token in text.encode():
        shown.append(buffer.push(token))
        if buffer.stopped:
            break
    shown.append(buffer.finish())
    return shown, buffer


@settings(max_examples=150)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_make_the_text_up_to_the_first_stop(text, stop):
    shown, buffer = pieces(text, stop)
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    whole = "".join(shown)
    if not ends:
        assert whole == text and not buffer.stopped
    else:  # the stop string that is complete first ends the row
        first = min(text.find(s) + len(s) for s in stop if s in text)
        cut = min(at for s in stop if (at := text.find(s)) >= 0 and at + len(s) <= first)
        assert whole == text[:cut] and buffer.stopped
    assert "\ufffd" not in whole.replace("\ufffd" if "\ufffd" in text else "", "")


@settings(max_examples=100)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_shown(text, stop):
    shown, _ = pieces(text, stop)
    for i in range(len(shown) - 1):
        so_far = "".join(shown[: i + 1])
        assert text.startswith(so_far) and not any(s in so_far for s in stop)


def test_whole_characters_only():
    shown, _ = pieces("né的🙂!")
    assert shown == ["n", "", "é", "", "", "的", "", "", "", "🙂", "!", ""]
    buffer = TextBuffer(Bytes())
    assert [buffer.push(b) for b in b"a\xf0\x9f"] == ["a", "", ""] and buffer.finish() == "\ufffd"
