"""The laws of ties, dare_linear, dare_ties and magnitude_prune, in delta and factors space (see entry_scenes.py)."""

from __future__ import annotations

import pytest
import torch
from entry_scenes import ALL_SPACES, ANY_RULE, SPACES, TRIMMED, close, expected, merged, scenes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers import adapter, relative
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.factors import LoraFactors
from loralloy.merging import (
    RULES,
    DareLinear,
    DareTies,
    MagnitudePrune,
    Ties,
    merge,
    merge_factors,
    spaces,
)
from loralloy.weights import Weights


@settings(max_examples=150)
@given(st.data(), ANY_RULE)
def test_delta_space_is_the_papers(data, rule):
    # the sum of adapters comes from factors scaled by roots: equal entries of dW differ in the last bit there
    grid = False if rule.values.get("prune") == "merged" else None
    scene = data.draw(scenes("delta", grid=grid))
    close(scene.merged(rule, "delta"), expected(scene, rule, "delta"), scene.near)


@settings(max_examples=150)
@given(st.data(), ANY_RULE)
def test_factors_space_is_the_same_on_A_and_on_B(data, rule):
    # weighted votes there are multiplied with roots, so that exact cancellation is left to rounding
    grid = False if rule.values.get("vote") == "weighted" or rule.values.get("prune") == "merged" else None
    scene = data.draw(scenes("factors", grid=grid))
    close(scene.merged(rule, "factors"), expected(scene, rule, "factors"), scene.near)


@pytest.mark.parametrize("space", SPACES)
@settings(max_examples=100)
@given(st.data(), TRIMMED)
def test_trim_all_is_of_the_concatenation(space, data, rule):
    """Exactly int(density n) of all of an adapter's entries; among equals the first module's, A before B, stay."""
    scene = data.draw(scenes(space, grid=rule.values.get("prune") != "merged"))
    close(scene.merged(rule, space), expected(scene, rule, space), scene.near)


def test_exactly_k_are_kept(monkeypatch):
    """int(density n): of each tensor, or of all entries of an adapter together; in both spaces, in any blocks."""
    g = torch.Generator().manual_seed(0)
    shapes = {"p": (7, 11), "q": (5, 3), "r": (7, 11), "s": (1, 2)}
    parts = {
        m: LoraFactors(torch.randn(3, i, generator=g), torch.randn(o, 3, generator=g), 2.0)
        for m, (o, i) in shapes.items()
    }
    b = Bank([adapter(parts, "a")])
    for block in (1 << 22, 20):
        monkeypatch.setattr(spaces, "_BLOCK", block)
        for density in (0.0, 0.03, 0.29, 0.5, 0.999, 1.0):
            got = merged(b, {"a": 1.0}, MagnitudePrune(density=density), "delta")
            counts = {m: int((x != 0).sum()) for m, x in got.items()}
            assert counts == {m: int(density * o * i) for m, (o, i) in shapes.items()}
            got = merged(b, {"a": 1.0}, MagnitudePrune(density=density, trim="all"), "delta")
            assert sum(int((x != 0).sum()) for x in got.values()) == int(
                density * sum(o * i for o, i in shapes.values())
            )
            for m, f in merge(b, Weights({"a": 1.0}), MagnitudePrune(density=density), "factors").adapter.items():
                assert int((f.A != 0).sum()) == int(density * f.A.numel()), m
                assert int((f.B != 0).sum()) == int(density * f.B.numel()), m
            whole = merge(b, Weights({"a": 1.0}), MagnitudePrune(density=density, trim="all"), "factors").adapter
            kept = sum(int((f.A != 0).sum() + (f.B != 0).sum()) for f in whole.values())
            assert kept == int(density * sum(3 * (o + i) for o, i in shapes.values()))


# -- laws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ALL_SPACES)
@settings(max_examples=15)
@given(st.data(), st.integers(0, 99))
def test_density_1_drops_nothing(space, data, seed):
    """ties and dare_ties are sign election alone; magnitude_prune and dare_linear the sum (in factors space, of A and of B)."""
    scene = data.draw(scenes(space))
    elected, other = (scene.merged(r, space) for r in (Ties(density=1), DareTies(density=1, seed=seed)))
    assert set(elected) == set(other) and all(torch.equal(elected[m], other[m]) for m in other)
    linear = scene.merged(RULES["linear"], space if space == "factors" else "delta")
    for rule in (MagnitudePrune, MagnitudePrune(trim="all"), DareLinear(seed=seed)):
        for m, x in scene.merged(rule(density=1), space).items():
            # against the parts: a sum may cancel
            size = sum(
                abs(scene.weights[n]) * float(f.dense().norm())
                for n, f in scene.bank.factors(m).items()
                if n in scene.weights
            )
            assert float((x - linear[m]).norm()) <= scene.near * max(size, float(linear[m].norm()))


@pytest.mark.parametrize("space", ALL_SPACES)
@settings(max_examples=15)
@given(st.data())
def test_one_adapter_is_itself(space, data):
    scene = data.draw(scenes(space))
    for name in list(scene.bank)[:2]:
        want = {m: f.dense() for m, f in scene.bank[name].items()}
        for rule in (Ties, Ties(trim="all"), Ties(normaliser="weights", vote="weighted"), MagnitudePrune,
                     MagnitudePrune(prune="merged"), DareLinear, DareTies, DareTies(majority="frequency")):  # fmt: skip
            close(scene.merged(rule(density=1), space, {name: 1.0}), want, scene.near)
        for rule in (RULES["linear"], RULES["cat"], RULES["svd"]):
            if space in rule.spaces:
                close(scene.merged(rule, space, {name: 1.0}), want, scene.near)


@pytest.mark.parametrize("space", SPACES)
@settings(max_examples=40)
@given(st.data(), ANY_RULE)
def test_order_and_names_do_not_matter(space, data, rule):
    """DARE's masks are keyed by an adapter's content and the module, not by its place or name."""
    scene = data.draw(scenes(space, least=2, grid=False))
    order = data.draw(st.permutations(list(scene.weights)))
    renamed = [Adapter(f"x{n}", dict(scene.bank[n]), scene.bank[n].config, scene.bank[n].base) for n in order]
    again = merged(Bank(renamed), {f"x{n}": scene.weights[n] for n in order}, rule, space)
    first = scene.merged(rule, space)
    assert set(again) == set(first)
    close(again, first, scene.near)


@settings(max_examples=40)
@given(st.data(), ANY_RULE)
def test_gauge(data, rule):
    """In delta space (A, B) and (G A, B G^-1) are one adapter. (DARE's keys here are the adapters' places: content differs.)"""
    scene = data.draw(scenes("delta", grid=False))
    names = [n for n in scene.weights if scene.weights[n]]
    plain: list[dict[str, LoraFactors]] = []
    turned: list[dict[str, LoraFactors]] = []
    g = torch.Generator().manual_seed(0)
    for n in names:
        wide = {m: f.to(torch.float64) for m, f in scene.bank[n].items()}
        plain.append(wide), turned.append({})
        for m, f in wide.items():
            q = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=g, dtype=torch.float64)).Q
            turn = q * (0.5 + torch.rand(f.rank, generator=g, dtype=torch.float64))
            turned[-1][m] = LoraFactors(turn @ f.A, f.B @ torch.linalg.inv(turn), f.scaling)
    ws = [scene.weights[n] for n in names]
    one, two = ({m: f.dense() for m, f in merge_factors(x, ws, rule, "delta", "full").items()} for x in (plain, turned))
    close(two, one, 1e-9)


@pytest.mark.parametrize("space", ["delta", "knots", "core"])
@settings(max_examples=20)
@given(st.data(), ANY_RULE)
def test_zero_weight_is_absence(space, data, rule):
    """To the bit."""
    scene = data.draw(scenes(space, least=2, weights=[0.0, 0.0, 0.7, -1.0]))
    present = {n: w for n, w in scene.weights.items() if w}
    assume(len(present) < len(scene.weights))
    one, two = (merge(scene.bank, Weights(w), rule, space, "full").adapter for w in (scene.weights, present))
    assert list(one) == list(two) and one.dtype == two.dtype
    assert all(torch.equal(one[m].dense(), two[m].dense()) for m in one)


def ones(sign: float, n: int = 4) -> LoraFactors:
    return LoraFactors(torch.ones(1, n) * abs(sign) ** 0.5, torch.ones(n, 1) * sign / abs(sign) ** 0.5)


def test_zero_weight_votes_in_factors_space_as_in_peft():
    b = Bank(
        [adapter({"m": ones(1)}, "plus"), adapter({"m": LoraFactors(-3 * torch.ones(1, 4), torch.ones(4, 1))}, "z")]
    )
    alone = merged(b, {"plus": 1.0}, Ties(density=1), "factors")["m"]
    assert torch.equal(alone, torch.ones(4, 4).double())
    result = merge(b, Weights({"plus": 1.0, "z": 0.0}), Ties(density=1), "factors")
    assert float(result.adapter["m"].dense().abs().max()) == 0  # A's elected sign is z's, and z adds nothing
    assert any("weight 0 still votes" in note for note in result.report.notes)
    half = merged(b, {"plus": 1.0, "z": 0.0}, Ties(density=1, vote="weighted"), "factors")["m"]
    assert torch.allclose(half, torch.full((4, 4), 1.0).double())  # not where votes are weighted
    b = Bank([adapter({"m": ones(1)}, "plus"), adapter({"m": ones(1)}, "z")])
    counted = merged(b, {"plus": 1.0, "z": 0.0}, Ties(density=1), "factors")["m"]
    assert torch.allclose(counted, torch.full((4, 4), 0.25).double())  # and it counts, once on each side


@pytest.mark.parametrize("space", SPACES)
@settings(max_examples=40)
@given(st.data(), ANY_RULE, st.sampled_from([0.01, 0.5, 3.0, 1000.0]))
def test_scaling_the_weights_scales_the_result(space, data, rule, c):
    """All rules but those that divide by the weights' sum: there a common factor has no effect."""
    scene = data.draw(scenes(space, grid=False))
    scaled = scene.merged(rule, space, {n: c * w for n, w in scene.weights.items()})
    close(scaled, scene.merged(rule, space), scene.near, 1.0 if rule.values.get("normaliser") == "weights" else c)


@pytest.mark.parametrize(
    "rule", [Ties(density=0.5), DareTies(density=0.5), Ties(density=1, majority="frequency")], ids=str
)
def test_normaliser_weights_does_not_shrink(rule):
    """Equal weights that sum to 1: the plain mean over those that agree, T times what `count` gives."""
    g = torch.Generator().manual_seed(2)
    adapters = [
        adapter({"m": LoraFactors(torch.randn(3, 9, generator=g), torch.randn(8, 3, generator=g))}, n) for n in "abcd"
    ]
    b, quarter = Bank(adapters), dict.fromkeys("abcd", 0.25)
    mean = merged(b, quarter, rule(normaliser="weights"), "delta")["m"]
    assert relative(mean, 4 * merged(b, quarter, rule, "delta")["m"]) < 1e-6
    assert (
        relative(mean, merged(b, dict.fromkeys("abcd", 1.0), rule, "delta")["m"]) < 1e-6
    )  # unit weights: TIES's own mean
    same = Bank([Adapter(n, dict(adapters[0]), adapters[0].config, adapters[0].base) for n in "abcd"])
    for space in SPACES:
        whole = merged(same, quarter, rule(normaliser="weights", density=1), space)["m"]
        assert relative(whole, adapters[0]["m"].dense()) < 1e-6  # four of the same are that one, at its full size
        shrunk = merged(same, quarter, rule(density=1), space)["m"]
        assert relative(shrunk, adapters[0]["m"].dense() / 4) < 1e-6


def test_weighted_votes_count_a_negative_weight_against():
    """x = (1, 3, -1) with weights (1, -1, 1): plain votes elect +, weighted ones (1, -3, -1) elect -."""
    b = Bank([adapter({"m": ones(1)}, "a"), adapter({"m": ones(3)}, "b"), adapter({"m": ones(-1)}, "c")])
    weights = {"a": 1.0, "b": -1.0, "c": 1.0}

    def value(**more: str) -> float:
        got = merged(b, weights, Ties(density=1, **more), "delta")["m"]
        assert float(got.std()) < 1e-6
        return float(got[0, 0])

    assert value() == pytest.approx((1 - 3) / 2)  # a and b agree with +
    assert value(vote="weighted") == pytest.approx((-3 - 1) / 2)  # b's -3 and c's -1 agree with -
    assert value(majority="frequency") == pytest.approx((1 - 3) / 2)
    assert value(majority="frequency", vote="weighted") == pytest.approx((-3 - 1) / 2)
    assert value(normaliser="weights", vote="weighted") == pytest.approx((-3 - 1) / 2)
    assert value(normaliser="weights") == pytest.approx((1 - 3) / 2)


def test_prune_merged_is_not_prune_each():
    """Where adapters cancel, the entry that is large in each is not in the sum."""
    a, c = (LoraFactors(torch.tensor([[2.0, x, 0.1]]), torch.ones(1, 1)) for x in (1.0, 1.2))
    b = Bank([adapter({"m": a}, "a"), adapter({"m": c}, "b")])
    weights, third = {"a": 1.0, "b": -1.0}, 1 / 3 + 1e-9
    assert merged(b, weights, MagnitudePrune(density=third), "delta")["m"].abs().max() == 0
    got = merged(b, weights, MagnitudePrune(density=third, prune="merged"), "delta")["m"]
    assert got[0].tolist() == pytest.approx([0, -0.2, 0], abs=1e-6)
    b = Bank([adapter({"m": LoraFactors(f.A, torch.tensor([[2.0], [1], [1]]))}, n) for n, f in (("a", a), ("b", c))])
    got = merged(b, {"a": 1.0, "b": 1.0}, MagnitudePrune(density=third, prune="merged"), "factors")["m"]
    want = torch.zeros(3, 3).double()
    want[0, 0] = 4.0 * 4.0  # A is (4, 2.2, 0.2), B is (4, 2, 2)
    assert torch.allclose(got, want)
