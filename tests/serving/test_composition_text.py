"""Compositions as data: what is routed fits into a text that is read back, and what asks for one merge has one text."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_grammar import compositions, names, same

from loralloy.serving import composition
from loralloy.serving.composition import MAX_ROUTED
from loralloy.serving.grammar import MAX_TERMS, Composition, canonical, parse, with_terms

routed = st.dictionaries(names, st.floats(-1e6, 1e6, allow_nan=False), max_size=8).map(lambda d: tuple(d.items()))
autos = compositions().map(lambda made: Composition((), True, made.rule, made.arguments, made.space, made.rank))


@settings(max_examples=300)
@given(autos, routed)
@example(Composition((), True), (("a", 1 / 3), ("b", 1.17549435e-38), ("c", -0.0), ("d", 1e-320), ("e", 0.1 + 0.2)))
def test_a_routed_composition_is_read_back_as_itself(asked, terms):
    made = with_terms(asked, terms)
    assert same(parse(str(made)), made) if made.terms else made == parse("base")
    assert not made.auto and (made.rule, made.space, made.rank) == (
        (asked.rule, asked.space, asked.rank) if made.terms else ("linear", None, None)
    )
    given = dict(terms)
    assert all(np.float32(w) == np.float32(given[name]) for name, w in made.terms)
    assert {n for n, w in given.items() if np.float32(w)} == {n for n, _ in made.terms}


def test_routed_weights_are_printed_short():
    made = with_terms(parse("auto @ ties"), [("a", 1 / 3), ("b", 0.5714285714285714), ("c", 0.09523809523809523)])
    assert str(made) == "0.33333334*a + 0.5714286*b + 0.0952381*c @ ties"


@pytest.mark.parametrize(
    ("count", "length", "kept"),
    [(100, 60, 100), (1000, 12, 1000), (MAX_TERMS, 10, MAX_TERMS), (MAX_TERMS + 500, 10, MAX_TERMS), (600, 200, None)],
)
@pytest.mark.parametrize("rule", ["auto", "auto @ ties(density=0.3, rank=16)"])
def test_what_is_routed_fits(count, length, kept, rule):
    """As it is where the grammar takes it; else the largest, with the sum that all had."""
    weights = {f"t{i:0{length - 1}}": 2.0 * (i + 1) / (count * (count + 1)) for i in range(count)}
    made = with_terms(parse(rule), weights.items())
    text = str(made)
    assert same(parse(text), made) and len(text) <= MAX_ROUTED
    if kept is None:
        assert len(text) > MAX_ROUTED * 0.9
    else:
        assert len(made.terms) == kept
    assert [n for n, _ in made.terms] == list(weights)[-len(made.terms) :]
    assert sum(w for _, w in made.terms) == pytest.approx(1.0, rel=1e-6)
    (_, first), *_, (_, last) = made.terms
    names_ = [n for n, _ in made.terms]
    assert last / first == pytest.approx(weights[names_[-1]] / weights[names_[0]], rel=1e-6)


@settings(max_examples=100)
@given(st.lists(names, min_size=1, max_size=12, unique=True), st.integers(100, 400), st.randoms(use_true_random=False))
def test_what_does_not_fit_is_cut_until_it_does(some, room, random):
    terms = [(name, random.uniform(1e-12, 1)) for name in some]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "MAX_ROUTED", room)
        made = with_terms(parse("auto @ svd(rank=4)"), terms)
    assert made.terms and same(parse(str(made)), made) and len(str(made)) <= room
    assert math.fsum(w for _, w in made.terms) == pytest.approx(math.fsum(w for _, w in terms), rel=1e-6)


@pytest.mark.parametrize(
    "texts",
    [
        ("0.5*a", "0.50*a", " .5 * a", '0.5*"a"', "0.5*a @ linear"),
        ("a + 0.25*b", "0.250*b + a", "1.0*a+0.25*b"),
        ("a + b @ ties", "b + a @ ties()", "a + b @ ties(density=0.20)", "a + b @ ties(space=delta)"),
        ("a + b @ ties(density=0.3, rank=8)", "b + a @ ties(rank=8, density=0.30)"),
        ("[0.2, 0.8]*b + a @ ties", "a + [.2, 8e-1]*b @ ties()"),
        ("0.5*a", "[0.5]*a", "[0.5, 0.5]*a"),
        ("{p: 1, q: 2}*a", '{"q": 2.0, "p": 1}*a'),
    ],
)
def test_one_text_for_all_that_ask_for_the_same(texts):
    made = [canonical(parse(text)) for text in texts]
    assert len({str(m) for m in made}) == 1
    assert all(m.bound.values == parse(t).bound.values for m, t in zip(made, texts, strict=True))


def test_what_differs_keeps_its_own_text():
    texts = ("a", "0.5*a", "-a", "a + b", "a - b", "a + b @ svd", "a + b @ ties(density=0.3)", "a + b @ ties(space=factors)",
             "a + b @ ties(rank=8)", "a + b @ ties(rank=full)", "[0.2, 0.8]*a", "[0.8, 0.2]*a", "[{value: 1}]*a",
             "[{filter: q, value: 1}, {value: 0}]*a", "{q: 1}*a", '{"*": 1}*a')  # fmt: skip
    assert len({str(canonical(parse(text))) for text in texts}) == len(texts)
