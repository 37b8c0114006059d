"""Weights by module: what a number, a gradient and filters come to, and what is said when they cannot."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloy import layerwise
from loralloy.errors import LoralloyError
from loralloy.layerwise import GRANULARITIES, SpecError, coefficients, group_of, layer_of, matches, parse, select

PROJECTIONS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]
LAYERS = 12
MODULES = [f"model.layers.{n}.{p}" for n in range(LAYERS) for p in PROJECTIONS]
ENDS = ["model.embed_tokens", "lm_head"]
numbers = st.floats(-10, 10, allow_nan=False)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3.self_attn.q_proj", 3),
        ("model.layers.11.mlp.experts.7.w1", 11),
        ("transformer.h.0.attn.c_attn", 0),
        ("encoder.block.5.layer.0.SelfAttention.q", 5),
        ("4.weight", 4),
        ("down_blocks.2", 2),
        ("lm_head", None),
        ("conv2d.layer1.proj", None),
        ("model.layers.q4.proj", None),
    ],
)
def test_the_layer_of_a_module(module, layer):
    assert layer_of(module) == layer


def test_a_number_stays_one():
    assert coefficients(0.5, MODULES) == 0.5
    assert coefficients(-2, MODULES) == -2.0


@given(st.lists(numbers, min_size=1, max_size=6))
def test_a_gradient_interpolates_its_anchors(anchors):
    """Against the definition: anchor k stands at layer k * (L - 1) / (n - 1); between two, the straight line."""
    got = coefficients(anchors, MODULES)
    assert list(got) == MODULES
    for module, value in got.items():
        layer, n = layer_of(module), len(anchors)
        if n == 1:
            assert value == anchors[0]
            continue
        stops = [k * (LAYERS - 1) / (n - 1) for k in range(n)]
        k = max(i for i in range(n - 1) if stops[i] <= layer)
        share = (layer - stops[k]) / (stops[k + 1] - stops[k])
        assert value == pytest.approx((1 - share) * anchors[k] + share * anchors[k + 1], abs=1e-9)
    assert min(anchors) - 1e-9 <= min(got.values()) and max(got.values()) <= max(anchors) + 1e-9


def test_both_ends_of_a_gradient_are_its_first_and_last_anchor():
    got = coefficients([0.3, 9.0, -1.5], [*ENDS, *MODULES])
    assert {got[m] for m in MODULES if layer_of(m) == 0} == {0.3}
    assert {got[m] for m in MODULES if layer_of(m) == LAYERS - 1} == {-1.5}


def test_what_stands_before_and_after_the_layers():
    """An embedding takes the first anchor, any other module without a layer the last."""
    modules = ["model.embed_tokens", "transformer.wte", "bert.embeddings.word", *MODULES, "lm_head", "score"]
    got = coefficients([1, 2, 3], modules)
    assert [got[m] for m in modules if layer_of(m) is None] == [1, 1, 1, 3, 3]


def test_each_stack_of_layers_has_its_own_gradient():
    encoder = [f"encoder.block.{n}.q" for n in range(4)]
    decoder = [f"decoder.block.{n}.q" for n in range(10, 12)]
    got = coefficients([0, 3], encoder + decoder)
    assert [got[m] for m in encoder] == pytest.approx([0, 1, 2, 3])
    assert [got[m] for m in decoder] == pytest.approx([0, 3])


def test_two_gradients_that_cross_sum_to_one_over_adapters_of_other_layers():
    """The layers of all adapters say where first and last are, not those of each."""
    early = [m for m in MODULES if layer_of(m) < 8]
    late = [m for m in MODULES if layer_of(m) >= 4]
    fading, rising = coefficients([1, 0], early, MODULES), coefficients([0, 1], late, MODULES)
    both = set(early) & set(late)
    assert both and all(fading[m] + rising[m] == pytest.approx(1) for m in both)
    assert 0.2 < fading[early[-1]] < 0.5


def test_one_layer_takes_the_first_anchor():
    assert coefficients([2, 5], ["layers.7.q"]) == {"layers.7.q": 2}


def test_the_first_filter_wins_and_the_last_entry_is_the_default():
    spec = [
        {"filter": "q_proj", "layers": "0-3", "value": 0.1},
        {"filter": "q_proj", "value": [0, 11]},
        {"filter": "*.mlp.*", "value": -1},
        {"layers": 5, "value": 5},
        {"value": 9},
    ]
    got = coefficients(spec, MODULES)
    for module, value in got.items():
        layer = layer_of(module)
        if "q_proj" in module:
            want = 0.1 if layer <= 3 else layer
        elif ".mlp." in module:
            want = -1
        else:
            want = 5 if layer == 5 else 9
        assert value == pytest.approx(want), module


def test_full_names():
    spec = {MODULES[0]: 1.5, "*": 0.25}
    assert coefficients(spec, MODULES) == {m: 1.5 if m == MODULES[0] else 0.25 for m in MODULES}
    assert coefficients({MODULES[0]: 1.5}, MODULES[:2]) == {MODULES[0]: 1.5, MODULES[1]: 0.0}


def test_a_pattern_is_a_part_or_a_glob():
    assert matches("layers.1", "model.layers.11.q")  # a part, as in mergekit
    assert not matches("*.layers.1.*", "model.layers.11.q") and matches("*.layers.1.*", "model.layers.1.q")
    assert not matches("q?", "model.q1") and matches("*q[12]", "model.q1")


def test_patterns_are_not_kept():
    """A server matches what its clients make up, and fnmatch's own functions keep the last 32,768."""
    before = fnmatch._compile_pattern.cache_info().currsize
    for n in range(300):
        assert matches(f"*.q_pro[j{n}]", "model.q_proj")
    assert fnmatch._compile_pattern.cache_info().currsize == before
    assert layerwise._glob.cache_info().currsize <= 256


def test_select():
    assert select(MODULES, ["q_proj", "v_proj"], ["*.layers.0.*"]) == [
        m for m in MODULES if "self_attn" in m and layer_of(m) > 0
    ]
    assert select(MODULES) == MODULES


BAD = {
    "text": ("much", (), ["'much'", "a number, a list of numbers (a gradient)"]),
    "yes": (True, (), ["True", "a number"]),
    "infinite": (float("inf"), (), ["inf", "finite"]),
    "beyond any float": (10**400, (), ["not a weight", "finite"]),
    "text in a gradient": ([0, "1e-3"], (1,), ["'1e-3'", "write 0.001"]),
    "empty gradient": ([], (), ["empty"]),
    "empty mapping": ({}, (), ["empty"]),
    "entry without list": ({"filter": "q", "value": 1}, (), ["stands in a list"]),
    "number among entries": ([{"value": 1}, 3], (1,), ["3 stands among entries"]),
    "misspelt": ([{"fliter": "q", "value": 1}], (0, "fliter"), ["unknown field", "did you mean `filter`"]),
    "no value": ([{"filter": "q_proj"}, {"value": 0}], (0,), ["no `value`"]),
    "value is text": ([{"value": "half"}], (0, "value"), ["'half'", "a number or a list of numbers"]),
    "empty filter": ([{"filter": "", "value": 1}], (0, "filter"), ["not a part of a module's name"]),
    "backward layers": ([{"layers": "5-2", "value": 1}], (0, "layers"), ["'5-2'", "0-11"]),
    "layers as a word": ([{"layers": "first", "value": 1}], (0, "layers"), ["'first'", "not a range of layers"]),
    "default first": ([{"value": 1}, {"filter": "q_proj", "value": 2}], (0,), ["put it last"]),
    "no such module": ([{"filter": "q_porj", "value": 1}, {"value": 0}], (0,), ["'q_porj'", "close names: q_proj"]),
    "no such layer": ([{"layers": "20-30", "value": 1}, {"value": 0}], (0,), ["layers 20-30", "0 to 11"]),
    "never reached": (
        [{"filter": "self_attn", "value": 1}, {"filter": "q_proj", "value": 2}, {"value": 0}],
        (1,),
        ["filter 'q_proj'", "never reached"],
    ),
    "no default": (
        [{"filter": "self_attn", "value": 1}],
        (),
        ["model.layers.0.mlp.up_proj", "11 more", "`- value: 0`"],
    ),
    "no such name": (
        {"model.layers.0.q_proj": 1.0},
        ("model.layers.0.q_proj",),
        ["no module", "close names: model.layers.0.self_attn.q_proj"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_specifications(case):
    spec, at, says = BAD[case]
    with pytest.raises(SpecError) as caught:
        coefficients(spec, MODULES)
    assert caught.value.at == at
    for part in says:
        assert part in str(caught.value), str(caught.value)
    assert isinstance(caught.value, LoralloyError)


def test_a_form_is_checked_without_modules():
    for spec, at, _ in (BAD["misspelt"], BAD["default first"], BAD["text in a gradient"]):
        with pytest.raises(SpecError) as caught:
            parse(spec)
        assert caught.value.at == at


def test_bad_selections():
    with pytest.raises(SpecError, match="close names: v_proj") as caught:
        select(MODULES, ["q_proj", "v_prj"])
    assert caught.value.at == ("include", 1)
    with pytest.raises(SpecError, match="no module is left"):
        select(MODULES, [], ["layers"])


def test_group_of():
    names = ["model.layers.3.mlp.up", "model.layers.3", "encoder.3.q", "3.q", "blocks.0.experts.7.w", "lm_head", "a3.b"]
    groups = {how: [group_of(name, how) for name in names] for how in GRANULARITIES}
    assert groups["adapter"] == [""] * 7 and groups["module"] == names
    assert groups["layer"] == ["model.layers.3", "model.layers.3", "encoder.3", "3", "blocks.0", "lm_head", "a3.b"]
