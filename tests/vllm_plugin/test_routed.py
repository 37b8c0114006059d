"""Routed weights in steps, and which names ask the router."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.serving.grammar import GrammarError, parse
from loralloy.vllm_plugin.routed import asks_router, composed, one_name, rounded

WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), max_size=8)


@given(WEIGHTS, st.sampled_from((0.05, 0.1, 0.25, 1.0)), st.integers(1, 5))
def test_rounding(weights, step, top):
    found = rounded(weights, step, top)
    total = sum(weights.values())
    if total <= 0:
        assert found == {}
        return
    assert len(found) <= top and set(found) <= {n for n, w in weights.items() if w > 0}
    assert sum(found.values()) == pytest.approx(max(step, round(total / step) * step))
    assert all(w > 0 and abs(w / step - round(w / step)) < 1e-6 for w in found.values())
    kept = sorted(weights.values(), reverse=True)[:top]
    scale = sum(found.values()) / sum(kept)
    assert all(abs(found.get(n, 0) - weights[n] * scale) < step + 1e-9 for n in found)
    assert all(weights[n] >= sorted(kept)[0] for n in found)


@given(WEIGHTS, st.integers(1, 5))
def test_near_weights_share_a_composition(weights, top):
    """What has been rounded stays: the compositions are a grid."""
    once = rounded(weights, 0.1, top)
    assert rounded(once, 0.1, top) == once


def test_examples():
    assert rounded({"a": 0.62, "b": 0.29, "c": 0.09}, 0.1, 2) == {"a": 0.7, "b": 0.3}
    assert rounded({"a": 0.97, "b": 0.03}, 0.1, 3) == {"a": 1.0}
    assert rounded({"a": 0.0}, 0.1, 3) == {}
    for step, top in ((0.0, 1), (1.5, 1), (0.1, 0)):
        with pytest.raises(LoralloyError):
            rounded({}, step, top)


@pytest.mark.parametrize(
    "model, means",
    [
        ("auto", "auto"),
        (" auto ", "auto"),
        ("auto:", "auto"),
        ("auto: ties", "auto @ ties"),
        ("auto:ties(density=0.2)", "auto @ ties(density=0.2)"),
        ("auto : @ ties", "auto @ ties"),
        ("auto @ ties(space=factors)", "auto @ ties(space=factors)"),
    ],
)
def test_auto(model, means):
    assert str(asks_router(model)) == str(parse(means))


@pytest.mark.parametrize("model", ["a", "0.5*a", "automatic", '"auto"', "auto.x", "", None, 3, ["auto"]])
def test_other_names_pass(model):
    assert asks_router(model) is None


@pytest.mark.parametrize("model", ["auto @", "auto: 3", "auto @ nosuch", "auto: ties(density=x)"])
def test_an_auto_that_cannot_be_read(model):
    with pytest.raises(GrammarError):
        asks_router(model)


def test_composed_is_one_text_for_one_grid_point():
    asked = parse("auto @ ties")
    assert str(composed(asked, {"b": 0.3, "a": 0.7})) == str(composed(asked, {"a": 0.7, "b": 0.3}))
    assert composed(asked, {}) is None


BANK = frozenset(("a", "b", "20 questions", "auto", "0.5*c", "c", "a+b"))


@pytest.mark.parametrize(
    "model, name",
    [
        ("0.50*a", "0.5*a"), (" 0.5 * a", "0.5*a"), ("0.4*b+0.60*a", "0.6*a + 0.4*b"), ("1.0*a", "a"), ("a @ linear", "a"),
        ("a + b @ ties(density=0.2)", "a + b @ ties"), ('"a"', "a"), ('"20 questions"', "20 questions"), ('"auto"', '"auto"'),
        # as they are
        ("0.5*a", "0.5*a"), ("a+b", "a+b"), ("0.50*c", "0.50*c"), ("a + nobody", "a + nobody"), ("a +", "a +"), ("base", "base"),
        ("org/model-1", "org/model-1"), ("my model", "my model"), ("", ""), ("auto", "auto"), ("auto @ ties()", "auto @ ties()"),
    ],
)  # fmt: skip
def test_one_name_for_one_folder(model, name):
    assert one_name(model, BANK) == name == one_name(name, BANK)


def test_without_a_bank_all_names_stay():
    assert one_name("0.50*a", frozenset()) == "0.50*a"
