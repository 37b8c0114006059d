"""The composition grammar: what is written is read back, and what cannot be read is told with its place."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loralloy.merging import RULES
from loralloy.serving import grammar
from loralloy.serving.grammar import (
    MAX_LENGTH,
    MAX_TERMS,
    Composition,
    GrammarError,
    canonical,
    parse,
    quoted,
    with_terms,
)

names = st.one_of(
    st.from_regex(r"[a-z_][a-z0-9_]{0,5}([-./][a-z0-9]{1,4})?", fullmatch=True), st.text(min_size=1, max_size=8)
)
weights = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def arguments(draw, rule):
    given = {}
    for name, parameter in rule.parameters.items():
        if not draw(st.booleans()):
            continue
        if parameter.choices:
            given[name] = draw(st.sampled_from(parameter.choices))
        elif parameter.kind is bool:
            given[name] = draw(st.booleans())
        elif parameter.kind is int:
            given[name] = draw(st.integers(max(0, int(parameter.low)), int(min(parameter.high, 10**9))))
        else:
            low, high = max(parameter.low, 0.0), min(parameter.high, 1e6)
            given[name] = draw(st.floats(low, high, exclude_min=parameter.open_low))
    return tuple(sorted(given.items()))


@st.composite
def compositions(draw):
    auto = draw(st.booleans())
    terms = () if auto else tuple(draw(st.dictionaries(names, weights, min_size=1, max_size=5)).items())
    rule = draw(st.sampled_from(list(RULES.values())))
    return Composition(
        terms,
        auto,
        rule.name,
        draw(arguments(rule)),
        draw(st.none() | st.sampled_from(rule.spaces)),
        draw(st.none() | st.sampled_from(["max", "full"]) | st.integers(1, 65536)),
    )


def same(a, b):
    """Equal, and zeros of one sign."""
    return a == b and [math.copysign(1, w) for _, w in a.terms] == [math.copysign(1, w) for _, w in b.terms]


@settings(max_examples=300)
@given(compositions())
@example(Composition((("auto", 1.0), ("base", -0.0), ('a"b\\', 1.0))))
def test_what_is_written_is_read_back(made):
    text = str(made)
    assert same(parse(text), made)
    assert str(parse(text)) == text


@settings(max_examples=300)
@given(compositions(), st.randoms(use_true_random=False))
def test_spaces_do_not_matter_between_signs(made, random):
    text = str(made)
    for sign in "*(),=@":
        if '"' not in text:
            text = text.replace(sign, random.choice(["", " ", "\t"]) + sign + random.choice(["", "  ", "\n"]))
    assert same(parse(text), made)


@settings(max_examples=400)
@given(st.one_of(st.text(max_size=60), st.text('ab-+*.@(),="\\0123 ', max_size=40)))
def test_any_text_is_read_or_told_where_it_ends_to_make_sense(text):
    try:
        made = parse(text)
    except GrammarError as error:
        assert 0 <= error.position <= len(text) and f"character {error.position + 1}" in str(error)
    else:
        assert same(parse(str(made)), made)


@settings(max_examples=100)
@given(compositions(), st.integers(0, 200), st.characters())
def test_a_slip_of_the_pen_never_crashes(made, at, character):
    text = str(made)
    at = min(at, len(text))
    for slip in (text[:at] + character + text[at:], text[:at] + text[at + 1 :], text[:at]):
        try:
            parse(slip)
        except GrammarError as error:
            assert 0 <= error.position <= len(slip)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("piqa", [("piqa", 1)]),
        ("0.6*piqa + 0.4*csqa", [("piqa", 0.6), ("csqa", 0.4)]),
        ("-a - -b", None),
        ("a-b", [("a-b", 1)]),
        ("a - b", [("a", 1), ("b", -1)]),
        ("a -2*b", [("a", 1), ("b", -2)]),
        ("a +b", [("a", 1), ("b", 1)]),
        ("org/name.v2", [("org/name.v2", 1)]),
        ("2e-1*_x + .5*y + 3.*z", [("_x", 0.2), ("y", 0.5), ("z", 3)]),
        ('"20 news" + "auto"', [("20 news", 1), ("auto", 1)]),
        (r'"a\"b\\c"', [('a"b\\c', 1)]),
        ("größe + 的", [("größe", 1), ("的", 1)]),
    ],
)
def test_terms(text, terms):
    if terms is None:
        with pytest.raises(GrammarError):
            parse(text)
    else:
        assert list(parse(text).terms) == terms


def test_rules():
    made = parse("a + b @ ties(density=0.2, space=delta, rank=16)")
    assert (made.rule, made.arguments, made.space, made.rank) == ("ties", (("density", 0.2),), "delta", 16)
    assert made.bound.values["density"] == 0.2 and not made.live
    assert parse("a @ ties()") == parse("a @ ties") and parse("auto").auto and parse("auto @ svd").rule == "svd"
    assert parse("base") == Composition() and parse("base").live
    live = ["a", "a @ linear", "a @ cat(space=delta)", "a @ linear(rank=full)", "-a", "auto"]
    merged = ["a @ linear(rank=4)", "a @ linear(space=factors)", "a @ svd", "auto @ ties"]
    assert [parse(t).live for t in live + merged] == [True] * 6 + [False] * 4


@pytest.mark.parametrize(
    ("text", "position", "says"),
    [
        ("", 0, "expected an adapter's name or a weight, found the end"),
        ("   ", 3, "found the end"),
        ("0.6*piqa + @ ties", 11, "expected an adapter's name, found '@'"),
        ("0.6piqa", 3, "expected '*' and an adapter's name, found 'piqa'"),
        ("0.6 0.4*a", 4, "expected '*'"),
        ("a b", 2, "expected '+', '-', '@' or the end, found 'b'"),
        ("a + a", 4, "'a' is named twice"),
        ("a + auto", 4, "auto stands alone"),
        ("auto + a", 5, "the end, found '+'"),
        ("base @ ties", 5, "nothing to combine"),
        ("1e999*a", 0, "too large"),
        ("a$", 1, "'$' has no meaning"),
        ('a + "b', 4, "the quoted name does not end"),
        ('""', 0, "the name is empty"),
        ("a @", 3, "expected a rule's name, found the end"),
        ("a @ tie", 4, "did you mean ties?"),
        ("a @ delta", 4, "is a space, not a rule"),
        ("a @ ties(", 9, "expected a parameter, found the end"),
        ("a @ ties(density)", 16, "expected '='"),
        ("a @ ties(density=)", 17, "expected a value"),
        ("a @ ties(density=2)", 17, "density 2 of ties is not valid; give a number from 0 to 1"),
        ("a @ ties(density=-1)", 17, "-1 of ties is not valid"),
        ("a @ ties(density=-x)", 18, "expected a number, found 'x'"),
        ("a @ ties(density=0.1, density=0.2)", 22, "given twice"),
        ("a @ ties(density=0.1,)", 21, "expected a parameter"),
        ("a @ ties(density=0.1 rank=2)", 21, "expected ',' or ')'"),
        ("a @ ties(keep=1)", 9, "ties has no parameter 'keep'; it has density"),
        ("a @ ties(rank=0)", 14, "rank 0 is not valid"),
        ("a @ ties(rank=true)", 14, "rank True is not valid"),
        ("a @ ties(space=moon)", 4, "space 'moon' is not known"),
        ("a @ cat(space=core)", 4, "pass space=delta"),
        ("a @ ties b", 9, "expected the end"),
        ("+".join(f"a{i:04}" for i in range(MAX_TERMS + 1)), 6 * MAX_TERMS, f"at most {MAX_TERMS} adapters"),
        ("a" * (MAX_LENGTH + 1), MAX_LENGTH, f"at most {MAX_LENGTH} characters"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text, position, says):
    with pytest.raises(GrammarError, match=r"^composition ") as caught:
        parse(text)
    assert says in str(caught.value) and caught.value.position == position
    assert len(str(caught.value)) < 500


def test_quoting():
    assert [quoted(n) for n in ("a-b", "auto", "9a", 'x"', "a--b")] == ["a-b", '"auto"', '"9a"', '"x\\""', '"a--b"']


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
    assert same(parse(text), made) and len(text) <= MAX_LENGTH
    if kept is None:
        assert len(text) > MAX_LENGTH * 0.9
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
        patch.setattr(grammar, "MAX_LENGTH", room)
        made = with_terms(parse("auto @ svd(rank=4)"), terms)
        assert made.terms and same(parse(str(made)), made)  # parse holds it to the limit
    assert math.fsum(w for _, w in made.terms) == pytest.approx(math.fsum(w for _, w in terms), rel=1e-6)


@pytest.mark.parametrize(
    "texts",
    [
        ("0.5*a", "0.50*a", " .5 * a", '0.5*"a"', "0.5*a @ linear"),
        ("a + 0.25*b", "0.250*b + a", "1.0*a+0.25*b"),
        ("a + b @ ties", "b + a @ ties()", "a + b @ ties(density=0.20)", "a + b @ ties(space=delta)"),
        ("a + b @ ties(density=0.3, rank=8)", "b + a @ ties(rank=8, density=0.30)"),
    ],
)
def test_one_text_for_all_that_ask_for_the_same(texts):
    made = [canonical(parse(text)) for text in texts]
    assert len({str(m) for m in made}) == 1
    assert all(m.bound.values == parse(t).bound.values for m, t in zip(made, texts, strict=True))


def test_what_differs_keeps_its_own_text():
    texts = ("a", "0.5*a", "-a", "a + b", "a - b", "a + b @ svd", "a + b @ ties(density=0.3)", "a + b @ ties(space=factors)",
             "a + b @ ties(rank=8)", "a + b @ ties(rank=full)")  # fmt: skip
    assert len({str(canonical(parse(text))) for text in texts}) == len(texts)
