"""Coefficients: ranges, starts, granularities, and the weights they become."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.weighting.learned import Coefficients

NAMES = ["a", "b", "c"]
MODULES = ["embed", "model.layers.0.q", "model.layers.0.v", "model.layers.1.q", "decoder.layers.1.q"]
FORMS = ["sigmoid", "signed", "softmax"]


def made(*args, **more) -> Coefficients:
    return Coefficients(NAMES, MODULES, *args, **more)


@pytest.mark.parametrize("b_max", [1.0, 3.0, 5.0])
def test_the_posters_start(b_max):
    """c = b_raw = 0: alpha_0 = .5 (1 + .5 (b_max - 1)), .5 / 1 / 1.5 for b_max 1 / 3 / 5."""
    start = made(b_max=b_max)
    assert not start.c.any() and not start.b_raw
    assert torch.allclose(start(), torch.full((5, 3), 0.5 * (1 + 0.5 * (b_max - 1))))
    assert torch.allclose(made("signed", b_max=b_max)(), start())
    assert torch.allclose(made("softmax", b_max=b_max)(), 2 * start() / 3)  # b in equal parts


@given(st.sampled_from(FORMS), st.floats(0.1, 9.0), st.lists(st.floats(-8, 8), min_size=4, max_size=4))
def test_weights_stay_within_the_range(form, b_max, values):
    """Whatever is learned: within (0, b_max), signed within (-b_max, b_max); softmax sums to b."""
    one = made(form, b_max=b_max)
    one.restore(torch.tensor(values))
    alpha = one().detach()
    low = -b_max if form == "signed" else 0.0
    assert bool((alpha > low).all()) and bool((alpha < b_max * (1 + 1e-6)).all())
    if form == "sigmoid" and b_max > 1.01:
        assert bool((alpha < b_max).all())
    if form == "softmax":
        assert torch.allclose(alpha.sum(1), one.b.detach().expand(5))
        assert min(1.0, b_max) * (1 - 1e-6) <= float(one.b.detach()) <= b_max * (1 + 1e-6)


def test_the_poster_formula():
    one = made(b_max=3.0)
    one.restore(torch.tensor([0.3, -1.0, 2.0, 0.7]))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    b = 1 + 2 * sigmoid(0.7)
    assert one()[2].tolist() == pytest.approx([sigmoid(c) * b for c in (0.3, -1.0, 2.0)])


@given(st.sampled_from(FORMS), st.floats(0.2, 9.0), st.floats(0.02, 0.98))
def test_a_uniform_start(form, b_max, fraction):
    low, high = made(form, b_max=b_max).range
    if low == high:  # softmax without room: b is b_max
        return
    scale = low + fraction * (high - low)
    one = made(form, b_max=b_max, start=scale)
    assert torch.allclose(one(), torch.full((5, 3), scale), rtol=1e-4)
    one().sum().backward()
    if form != "softmax":  # it can move: not at the flat end of its sigmoid
        slope = one.c.grad / (5 * scale)
        assert float(slope.min()) > 0.01


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("around", [1e-3, 0.07, 0.4, 1.0])
@pytest.mark.parametrize("b_max", [0.01, 0.4, 1.0, 1.001, 1.02, 1.04, 3.0])
def test_every_scale_of_the_grid_can_be_started_from(form, b_max, around):
    """However little room there is above 1, and wherever the merge is as long as the adapters are."""
    one = made(form, b_max=b_max)
    scales = one.scales(around)
    assert scales == sorted(set(scales))
    for scale in scales:
        one.reset(scale)
        assert torch.allclose(one(), torch.full((5, 3), scale), rtol=1e-4)


def test_the_grid_lies_around_a_scale():
    one = made(b_max=3.0)
    assert one.scales(0.4) == pytest.approx([0.16, 0.22, 0.3, 0.4, 0.54, 0.72])
    assert made(b_max=0.5).scales(0.4) == pytest.approx([0.16, 0.22, 0.3, 0.4, 0.45])
    assert made(b_max=0.3).scales(1.0) == pytest.approx([0.09, 0.18, 0.27])  # it lies beyond the range: all over that


def test_starts_outside_the_range_are_refused():
    for form, scale, said in (
        ("sigmoid", 3.0, r"\(0, 3\)"),
        ("signed", -1.0, r"\(0, 3\)"),
        ("softmax", 1.0, r"\(0.333333, 1\)"),
    ):
        with pytest.raises(LoralloyError, match=said):
            made(form, start=scale)
    with pytest.raises(LoralloyError, match="give a scale between them, or 'zero'"):
        made(start="one")
    assert float(made(start=2.999)().detach()[0, 0]) == pytest.approx(2.999)


@pytest.mark.parametrize(("granularity", "rows"), [("adapter", 1), ("layer", 4), ("module", 5)])
def test_granularity(granularity, rows):
    """One c an adapter; an adapter and layer (each stack's own; a module without a number is one); an adapter and module."""
    one = made(granularity=granularity)
    assert one.c.shape == (rows, 3) and one().shape == (5, 3)
    one.restore(torch.arange(3.0 * rows + 1))
    same = {(i, j) for i in range(5) for j in range(5) if torch.equal(one()[i], one()[j]) and i < j}
    assert (
        same
        == {"adapter": {(i, j) for i in range(5) for j in range(i + 1, 5)}, "layer": {(1, 2)}, "module": set()}[
            granularity
        ]
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("granularity", ["adapter", "layer", "module"])
def test_weights_are_the_table(form, granularity):
    present = torch.ones(5, 3, dtype=torch.bool)
    present[0, 1] = present[3, 2] = False
    one = made(form, granularity, present=present)
    one.restore(torch.linspace(-1, 2, one.state().numel()))
    weights = one.weights({"more": 1})
    for i, name in enumerate(NAMES):
        for j, module in enumerate(MODULES):
            want = float(one().detach()[j, i])
            assert weights.of(name, module) == pytest.approx(want) if present[j, i] else want == 0
            value = weights.coefficients[name]
            assert isinstance(value, float) or (module in value) == bool(present[j, i])
    assert weights.source == "learned"
    assert {"form": form, "granularity": granularity, "b_max": 3.0, "more": 1}.items() <= weights.explain.items()
    assert weights.explain["alpha"] == pytest.approx(
        [float(one().detach()[present].min()), float(one().detach()[present].max())]
    )
    if granularity == "adapter" and form != "softmax":
        assert not weights.per_module
    if form == "softmax":  # over the adapters that have the module
        assert torch.allclose(one().sum(1), one.b.expand(5))


def test_state_is_given_back():
    one, other = made(granularity="layer", start=0.7), made(granularity="layer")
    other.restore(one.state())
    assert torch.equal(other(), one())
    kept = one.state()
    one.reset("zero")
    assert not torch.equal(kept, one.state())


def test_b_max_of_one_and_below():
    """b is b_max then, and nothing learns it."""
    for b_max in (1.0, 0.4):
        one = made(b_max=b_max)
        assert not one.b_raw.requires_grad and float(one.b) == pytest.approx(b_max)
        assert torch.allclose(one(), torch.full((5, 3), b_max / 2))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"form": "tanh"}, "form 'tanh' is not known; choose sigmoid, signed, softmax"),
        ({"granularity": "row"}, "granularity 'row' is not known; choose adapter, layer, module"),
        ({"b_max": 0}, "b_max 0 is not valid; give a number above 0"),
        ({"b_max": math.inf}, "b_max inf is not valid"),
        ({"b_max": True}, "b_max True is not valid"),
    ],
)
def test_refusals(more, said):
    with pytest.raises(LoralloyError, match=said):
        made(**more)
