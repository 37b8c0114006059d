"""The composition grammar: what is written is read back, and what cannot be read is told with its place."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loralloy.merging import RULES
from loralloy.serving.by_module import MAX_ENTRIES, ByModule
from loralloy.serving.grammar import (
    MAX_LENGTH,
    MAX_TERMS,
    Composition,
    GrammarError,
    parse,
    quoted,
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


gradients = st.lists(weights, min_size=1, max_size=4)
entries = st.fixed_dictionaries(
    {"value": weights | gradients},
    optional={"filter": names, "layers": st.integers(0, 99) | st.just("3-17")},
)
by_module = st.one_of(
    gradients,
    st.tuples(st.lists(entries.filter(lambda e: len(e) > 1), max_size=3), entries).map(lambda t: [*t[0], t[1]]),
    st.dictionaries(names.filter(lambda n: n not in ("filter", "value", "layers")), weights, min_size=1, max_size=4),
).map(ByModule.of)


@st.composite
def compositions(draw):
    auto = draw(st.booleans())
    each = st.dictionaries(names, weights | by_module, min_size=1, max_size=5)
    terms = () if auto else tuple(draw(each).items())
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
    return a == b and _signs(a) == _signs(b)


def _signs(made):
    return [str(w) if isinstance(w, ByModule) else math.copysign(1, w) for _, w in made.terms]


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
    for sign in "*(),=@[]{}:":
        if '"' not in text:
            text = text.replace(sign, random.choice(["", " ", "\t"]) + sign + random.choice(["", "  ", "\n"]))
    assert same(parse(text), made)


@settings(max_examples=400)
@given(st.one_of(st.text(max_size=60), st.text('ab-+*.@(),="\\0123 []{}:', max_size=40)))
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


@pytest.mark.parametrize(
    ("text", "spec", "canonical_text"),
    [
        ("[0.2, .8]*a", [0.2, 0.8], "[0.2, 0.8]*a"),
        ("[ 0.2,8e-1 ] * a", [0.2, 0.8], "[0.2, 0.8]*a"),
        ("-[1, -2]*a", [-1.0, 2.0], "[-1.0, 2.0]*a"),
        ("[{filter: q_proj, value: 0.9}, {value: [0, 1]}]*a", [{"filter": "q_proj", "value": 0.9}, {"value": [0.0, 1.0]}],
         "[{filter: q_proj, value: 0.9}, {value: [0.0, 1.0]}]*a"),
        ('[{"filter": "*.mlp.*", "layers": 7, "value": 1}, {"layers": "0-3", "value": -2}]*a',
         [{"filter": "*.mlp.*", "layers": "7", "value": 1.0}, {"layers": "0-3", "value": -2.0}],
         '[{filter: "*.mlp.*", layers: "7", value: 1.0}, {layers: "0-3", value: -2.0}]*a'),
        ('{model.layers.0.mlp: 2, "*": 0.3}*a', {"*": 0.3, "model.layers.0.mlp": 2.0}, '{"*": 0.3, model.layers.0.mlp: 2.0}*a'),
    ],
)  # fmt: skip
def test_weights_by_module(text, spec, canonical_text):
    ((name, weight),) = parse(text).terms
    assert name == "a" and weight.spec == spec and str(parse(text)) == canonical_text
    assert parse(text).live and parse(canonical_text) == parse(text)
    both = parse(f"b - {text.removeprefix('-')} @ ties")
    assert both.terms[1][1] == ByModule.of(spec, 1.0 if text[0] == "-" else -1.0) and list(both.by_module) == ["a"]


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
        ("[]*a", 0, "the gradient is empty"),
        ("{}*a", 0, "the weight is empty"),
        ("[0.2 0.8]*a", 5, "expected ',' or ']', found '0.8'"),
        ("[0.2,]*a", 5, "expected another after the comma"),
        ("[0.2, 0.8", 9, "expected ',' or ']', found the end"),
        ("[0.2, 0.8]a", 10, "expected '*' and an adapter's name, found 'a'"),
        ("[0.2, 0.8]*auto", 11, "auto stands alone"),
        ("b + [0.2, x]*a", 10, "'x' is not a weight; give a number"),
        ("[0.2, -x]*a", 7, "expected a number, found 'x'"),
        ("[1e7]*a", 1, "too large"),
        ("[[1]]*a", 1, "is not a weight"),
        ("[[[[[[1]]]]]]*a", 5, "nested too deeply"),
        ("[{filter: q}]*a", 1, "no `value`"),
        ("[{filter: 3, value: 1}]*a", 10, "3 is not a part of a module's name"),
        ("[{fitler: q, value: 1}]*a", 10, "did you mean `filter`?"),
        ("[{value: 1}, {filter: q, value: 1}]*a", 1, "put it last"),
        ("[{layers: 3-1, value: 1}]*a", 11, "expected ',' or '}', found '-'"),
        ('[{layers: "3-1", value: 1}]*a', 10, "is not a range of layers"),
        ("[{value: 1, value: 2}]*a", 12, "'value' is given twice"),
        ("{filter: q, value: 1}*a", 0, "stands in a list"),
        ("{q 1}*a", 3, "expected ':'"),
        ("{q: [1]}*a", 4, "is not a weight"),
        ("{3: 1}*a", 1, "expected a field, or a module's name, found '3'"),
        ("[{filter: " + "q" * 401 + ", value: 1}]*a", 10, "at most 400 characters"),
        (
            "[" + ", ".join(["{filter: q, value: 1}"] * (MAX_ENTRIES + 1)) + "]*a",
            1 + 23 * MAX_ENTRIES,
            "at most 256 entries",
        ),
        (
            " + ".join(["[" + ", ".join(["{filter: q, value: 1}"] * 200) + f"]*{n}" for n in "ab"]),
            4605,
            "at most 256 entries",
        ),
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
