"""From signals to weights: the formulas of gating, the ablations, and what the depth slope says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralloy.errors import LoralloyError
from loralloy.weighting.contrasts import depths, projection_of
from loralloy.weighting.gate_view import by_projection, draw, table
from loralloy.weighting.gating import BY, KINDS, REFERENCES, STANDARDISE, Gate, depth_slope
from loralloy.weighting.probed import Readings

LAYERS, KINDS_OF = 6, ("attn.q", "mlp.up")
MODULES = tuple(f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS_OF)


def readings(n: int = 2, inputs: int = 4, seed: int = 0, trend: float = 0.0, noise: float = 0.3) -> Readings:
    """Signals exp(noise + trend * depth for all adapters but the first)."""
    rng = np.random.default_rng(seed)
    names = ("task", "domain", "other", "fourth")[:n]
    level = rng.normal(size=(len(MODULES), n)) * noise
    level[:, 1:] += trend * depths(MODULES)[:, None]
    tokens = rng.integers(3, 9, (inputs, len(MODULES))).astype(float)
    each = np.exp(level + rng.normal(size=(inputs, len(MODULES), n)) * 0.05)
    sums = {
        name: factor * each * tokens[..., None] for name, factor in (("response", 0.1), ("norm", 2.0), ("base", 1.0))
    }
    return Readings(names, MODULES, sums, tokens)


def plain(**given) -> Gate:
    return Gate(**{"reference": "none", "smooth": 0.0, "temperature": 1.0, **given})


# -- the formula -------------------------------------------------------------------------------------------------------


def test_two_adapters_are_a_sigmoid_of_the_log_ratio():
    seen, general = readings(), readings(seed=1)
    ratio = np.log(seen.mean()[:, 1] / seen.mean()[:, 0])
    sigmoid = 1 / (1 + np.exp(-ratio / 0.7))
    np.testing.assert_allclose(plain(standardise="none", temperature=0.7).shares(seen)[:, 1], sigmoid)
    centred = ratio - ratio.mean()
    np.testing.assert_allclose(plain(standardise="centre").shares(seen)[:, 1], 1 / (1 + np.exp(-centred)))
    np.testing.assert_allclose(plain().shares(seen)[:, 1], 1 / (1 + np.exp(-centred / centred.std())))
    against = ratio - np.log(general.mean()[:, 1] / general.mean()[:, 0])
    got = plain(standardise="none", reference="general").shares(seen, general)[:, 1]
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-against)))


@settings(max_examples=25)
@given(
    st.integers(1, 4), st.sampled_from(list(BY)), st.sampled_from(list(STANDARDISE)), st.floats(0.2, 5), st.floats(0, 3)
)
def test_shares_sum_to_one_and_weights_to_n(n, by, standardise, temperature, smooth):
    seen = readings(n)
    gate = plain(by=by, standardise=standardise, temperature=temperature, smooth=smooth)
    shares = gate.shares(seen)
    np.testing.assert_allclose(shares.sum(1), 1)
    weights = gate.weights(seen)
    assert weights.names == list(seen.adapters) and weights.source == "probed"
    for module in MODULES:
        assert sum(weights.of(name, module) for name in seen.adapters) == pytest.approx(n)
    if n == 1:
        assert all(weights.of("task", m) == 1 for m in MODULES)


@settings(max_examples=25)
@given(st.integers(2, 4), st.randoms(use_true_random=False), st.sampled_from(list(BY)))
def test_the_order_of_adapters_does_not_matter(n, random, by):
    seen = readings(n)
    order = random.sample(range(n), n)
    turned = Readings(
        tuple(seen.adapters[i] for i in order), MODULES, {k: v[..., order] for k, v in seen.sums.items()}, seen.tokens
    )
    for gate in (Gate(reference="none", by=by), Gate(reference="base", by=by), plain(kind="norm")):
        np.testing.assert_allclose(gate.shares(turned), gate.shares(seen)[:, order])


def test_a_level_is_taken_out_and_the_task_stays_near_one():
    """A domain adapter that answers ten times as strongly everywhere gets no more than before."""
    seen = readings()
    loud = Readings(seen.adapters, MODULES, {k: v * np.array([1.0, 10.0]) for k, v in seen.sums.items()}, seen.tokens)
    for standardise in ("spread", "centre"):
        gate = plain(standardise=standardise)
        np.testing.assert_allclose(gate.shares(loud), gate.shares(seen))
        assert gate.shares(seen)[:, 0].mean() == pytest.approx(0.5, abs=0.03)
    assert plain(standardise="none").shares(loud)[:, 1].min() > 0.7


def test_forms_and_scales():
    seen = readings()
    share = plain().weights(seen)
    anchor = plain(form="anchor", scale=(1.5, 0.5)).weights(seen)
    for m in MODULES:
        assert anchor.of("task", m) == 1.5
        assert anchor.of("domain", m) == pytest.approx(0.5 * share.of("domain", m))


def test_granularity_and_smoothing():
    seen = readings()
    layer = plain(by="layer").shares(seen)[:, 1].reshape(LAYERS, 2)
    projection = plain(by="projection").shares(seen)[:, 1].reshape(LAYERS, 2)
    assert np.ptp(layer, 1).max() == 0 < np.ptp(layer, 0).min()
    assert np.ptp(projection, 0).max() == 0 < np.ptp(projection, 1).min()
    assert np.ptp(plain(by="adapter").shares(seen)[:, 1]) == 0
    rough, fine = (plain(smooth=s).shares(seen)[:, 1].reshape(LAYERS, 2) for s in (0.0, 1.5))
    assert (np.abs(np.diff(fine, axis=0)).sum(0) < np.abs(np.diff(rough, axis=0)).sum(0)).all()
    flat = plain(smooth=1e6).contrast(seen)[:, 1].reshape(LAYERS, 2)
    np.testing.assert_allclose(flat, plain().contrast(seen)[:, 1].reshape(LAYERS, 2).mean(0)[None].repeat(LAYERS, 0))


def test_each_projection_is_smoothed_by_itself():
    seen = readings()
    for values in seen.sums.values():
        values[:, ::2, 1] *= 3  # attn.q alone
    got = plain(smooth=2.0, standardise="none").contrast(seen)[:, 1].reshape(LAYERS, 2)
    before = plain(smooth=2.0, standardise="none").contrast(readings())[:, 1].reshape(LAYERS, 2)
    np.testing.assert_allclose(got[:, 1], before[:, 1])
    np.testing.assert_allclose(got[:, 0], before[:, 0] + np.log(3) / 2)


# -- ablations ---------------------------------------------------------------------------------------------------------


def test_kinds():
    seen = readings(trend=1.0)
    assert (plain(kind="uniform").shares(seen) == 0.5).all()
    ramp, falling = (plain(kind=k).shares(seen)[:, 1] for k in ("ramp", "falling"))
    np.testing.assert_allclose(ramp[[0, 1, -2, -1]], [0.3, 0.3, 0.7, 0.7])
    np.testing.assert_allclose(falling, ramp[::-1])
    mine = plain().shares(seen)
    shuffled = plain(kind="shuffled", seed=3).shares(seen)
    assert not np.allclose(shuffled, mine)
    np.testing.assert_allclose(np.sort(shuffled, 0), np.sort(mine, 0))
    np.testing.assert_array_equal(shuffled, plain(kind="shuffled", seed=3).shares(seen))
    assert not np.array_equal(shuffled, plain(kind="shuffled", seed=4).shares(seen))
    norm = plain(kind="norm", standardise="none").shares(seen)
    s = seen.mean("norm")
    np.testing.assert_allclose(norm, s / s.sum(1, keepdims=True))


def test_flat_signals_give_uniform_gates():
    seen = readings(noise=0.0)
    for values in seen.sums.values():
        values[:] = seen.tokens[..., None]
    np.testing.assert_allclose(plain().shares(seen), 0.5)


def test_wrong_settings_are_refused():
    for field, values in (("kind", KINDS), ("reference", REFERENCES), ("by", BY), ("standardise", STANDARDISE)):
        with pytest.raises(LoralloyError, match=f"{field} of the gate is 'x'; choose one of {', '.join(values)}"):
            Gate(**{field: "x"})
    for field, value in (
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("smooth", -1.0),
        ("scale", (float("inf"),)),
    ):
        with pytest.raises(LoralloyError, match=f"{field} of the gate"):
            Gate(**{field: value})
    with pytest.raises(LoralloyError, match="needs readings of general inputs"):
        Gate(reference="general").weights(readings())
    with pytest.raises(LoralloyError, match="other adapters or modules"):
        Gate(reference="general").weights(readings(), readings(3))
    with pytest.raises(LoralloyError, match="scale of the gate has 3 numbers for 2 adapters"):
        plain(scale=(1.0, 1.0, 1.0)).weights(readings())
    silent = readings()
    silent.sums["response"][:, 0, 0] = 0
    with pytest.raises(LoralloyError, match="the response signal is 0"):
        plain().weights(silent)


# -- depth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trend", [-0.8, 0.0, 0.8])
def test_the_slope_finds_the_trend(trend):
    seen = readings(trend=trend, noise=0.0, inputs=16)
    found = depth_slope(plain(), seen)
    assert found.low < found.slope < found.high
    assert found.slope == pytest.approx(trend, abs=0.06) and found.high - found.low < 0.2
    assert (found.low > 0) == (trend > 0) and (found.high < 0) == (trend < 0)
    general = readings(trend=trend, noise=0.0, inputs=16, seed=9)
    assert depth_slope(plain(reference="general"), seen, general).slope == pytest.approx(0, abs=0.06)


def test_halves_agree_where_there_is_a_signal():
    assert depth_slope(plain(), readings(inputs=32)).agreement > 0.95
    assert abs(depth_slope(plain(), readings(inputs=8, noise=0.0)).agreement) < 0.8
    assert np.isnan(depth_slope(plain(), readings(inputs=1)).low)


# -- to look at --------------------------------------------------------------------------------------------------------


def test_views(tmp_path):
    seen = readings(trend=1.0)
    weights = plain().weights(seen)
    rows = by_projection(weights, MODULES)
    assert [r["projection"] for r in rows] == ["model.layers.*.attn.q", "model.layers.*.mlp.up"]
    assert projection_of("h.3.mlp.experts.7.w1") == "h.*.mlp.experts.7.w1" and projection_of("lm_head") == "lm_head"
    for row in rows:
        mean = row["weights"]["domain"]
        assert mean["first third"] < mean["all"] < mean["last third"]
        mine = [weights.of("domain", m) for m in MODULES if projection_of(m) == row["projection"]]
        assert mean["all"] == pytest.approx(np.mean(mine)) and mean["middle"] == pytest.approx(np.mean(mine[2:4]))
    assert table(weights, MODULES).row_count == 4
    draw(weights, MODULES, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LoralloyError, match="exists already"):
        draw(weights, MODULES, tmp_path / "gates.png")
    with pytest.raises(LoralloyError, match="not a PNG file"):
        draw(weights, MODULES, tmp_path / "gates.pdf")
