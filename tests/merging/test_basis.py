"""A basis is the merge as a function of its coefficients: equal to `merge` everywhere, with the right gradients."""

from __future__ import annotations

import engine_scenes
import pytest
import torch

from helpers import adapter, delta, factors, relative
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.merging import RULES, DareLinear, DareTies, MagnitudePrune, Rule, Svd, Ties, TsvM, merge
from loralloy.merging.basis import Basis, learnable, make_basis
from loralloy.weights import Weights

LEARNED = [
    RULES["linear"], RULES["cat"], RULES["svd"],
    Ties(density=0.5), Ties(density=0.3, trim="all"), Ties(majority="frequency"),
    Ties(density=0.6, normaliser="weights"), Ties(density=0.5, vote="weighted"),
    Ties(density=0.6, vote="weighted", normaliser="weights", majority="frequency"),
    DareLinear(density=0.4, seed=3), DareTies(density=0.7), DareTies(density=0.7, vote="weighted", normaliser="weights"),
    MagnitudePrune(density=0.4), MagnitudePrune(density=0.4, trim="all"), MagnitudePrune(density=0.4, prune="merged"),
]  # fmt: skip
EVERYWHERE = [
    (rule, space)
    for rule in LEARNED
    for space in rule.spaces
    if not (rule.values.get("prune") == "merged" and space in ("knots", "core"))
]
KINDS = [
    (RULES["linear"], "delta"),
    (RULES["linear"], "factors"),
    (Ties(density=0.5), "delta"),
    (Ties(density=0.5), "factors"),
    (Ties(density=0.5), "knots"),
    (Ties(density=0.5), "core"),
]


def made(rule: Rule, space: str, dtype: torch.dtype = torch.float64) -> Bank:
    """Adapters that differ in modules and scalings, and in rank where the space allows it."""
    same = space == "factors" and space not in rule.sums
    return engine_scenes.bank(dtype, dict.fromkeys(engine_scenes.RANKS, 4) if same else engine_scenes.RANKS)


def named(value: object) -> str | None:
    return str(value).replace("(", " ").replace(")", "") if isinstance(value, Rule) else None


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=named)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["f64", "f32"])
def test_it_is_the_merge(rule, space, dtype, within):
    bank = made(rule, space, dtype)
    basis = make_basis(bank, None, rule, space)
    for seed in range(2):
        w = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        want = delta(
            merge(bank, Weights(dict(zip(bank.names, w.tolist(), strict=True))), rule, space, "full", dtype).adapter
        )
        assert set(want) == set(basis) == set(bank.modules)
        for module, dense in want.items():
            assert relative(basis[module].combine(w), dense) < within, module


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=named)
def test_gradients(rule, space):
    """Of dW in the coefficients and of dW x in both, against finite differences, float64."""
    bank = made(rule, space)
    basis = make_basis(bank, ["k", "mlp"], rule, space)
    w = torch.tensor([0.7, -0.4, 1.3], dtype=torch.float64, requires_grad=True)
    for one in basis.values():
        x = torch.randn(2, one.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.autograd.gradcheck(one.combine, (w,))
        assert torch.autograd.gradcheck(one.apply, (x.requires_grad_(), w))
        assert torch.allclose(one.apply(x, w), x @ one.combine(w).T, atol=1e-12)
        onto = torch.randn(one.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert torch.allclose(one.combine(w, onto), onto + one.combine(w), atol=1e-12)
        assert torch.autograd.gradcheck(lambda c, one=one, onto=onto: one.combine(c, onto), (w,))


@pytest.mark.parametrize(("rule", "space"), KINDS, ids=named)
def test_kinds(rule, space):
    bank = made(rule, space)
    one = make_basis(bank, ["mlp"], rule, space)["mlp"]
    kinds = {"delta": "dense", "factors": "low_rank_factors", "knots": "low_rank_shared", "core": "low_rank_shared"}
    assert one.kind == ("low_rank_delta" if space in rule.sums else kinds[space])
    assert one.low_rank == (one.kind != "dense") and one.shape == (10, 22)
    assert one.who.tolist() == [0, 1]  # c has no such module, so its coefficient does nothing
    w = torch.tensor([0.7, -0.4, 1.3], dtype=torch.float64, requires_grad=True)
    one.combine(w).square().sum().backward()
    assert w.grad[2] == 0 and bool((w.grad[:2] != 0).all())
    assert torch.equal(one.combine(w), one.combine(torch.tensor([0.7, -0.4, 99.0], dtype=torch.float64)))


def test_the_dense_terms_are_linear_in_the_coefficients():
    """With PEFT's defaults no mask depends on them: what makes the gradient exact and the terms worth keeping."""
    for rule in (Ties(density=0.5), DareTies(density=0.7), MagnitudePrune(density=0.4), DareLinear()):
        for one in make_basis(made(rule, "delta"), None, rule, "delta").values():
            v, w = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            assert torch.allclose(one.combine(2 * v - w), 2 * one.combine(v) - one.combine(w), atol=1e-12)


def test_masks_that_depend_on_the_coefficients_are_held():
    """At an entry that is about to change sides the gradient is that of the masks as they are."""
    a = adapter({"m": factors(6, 5, 2, 1, 1.0, torch.float64)}, "a")
    b = adapter({"m": factors(6, 5, 2, 2, 1.0, torch.float64)}, "b")
    one = make_basis([a, b], None, Ties(density=1.0, vote="weighted"), "delta")["m"]
    x, y = a["m"].dense(), b["m"].dense()
    at = tuple(((x * y) < 0).nonzero()[0].tolist())  # they disagree there
    tie = float(-x[at] / y[at])  # with coefficients (1, tie) the vote there is 0, and + is elected
    w = torch.tensor([1.0, tie], dtype=torch.float64, requires_grad=True)
    one.combine(w)[at].backward()
    voters = [float(t[at]) if float(t[at]) > 0 else 0.0 for t in (x, y)]
    got, other = w.grad.tolist(), [float(t[at]) if float(t[at]) < 0 else 0.0 for t in (x, y)]
    assert got == pytest.approx(voters) or got == pytest.approx(other)  # one side, whole: the vote is 0 to rounding


@pytest.mark.parametrize(("rule", "space"), KINDS, ids=named)
def test_16_bit_terms(rule, space):
    """Stored in 16 bits, added in 32: an error of rounding the terms, 2^-9 of each, and gradients that are as near."""
    bank = made(rule, space, torch.float32)
    exact, small = (make_basis(bank, ["k"], rule, space, dtype=d)["k"] for d in (torch.float32, torch.bfloat16))
    assert small.nbytes == exact.nbytes / 2
    grads = []
    for one in (exact, small):
        w = torch.tensor([0.7, -0.4, 1.3], requires_grad=True)
        dense = one.combine(w)
        (dense * torch.linspace(-1, 1, dense.numel()).view_as(dense)).sum().backward()
        grads.append(w.grad)
    assert relative(small.combine(w.detach()), exact.combine(w.detach())) < 2**-7
    assert relative(grads[1], grads[0]) < 2**-6
    onto = torch.ones(exact.shape, dtype=torch.bfloat16)
    assert exact.combine(w, onto).dtype == small.combine(w, onto).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_coefficients(dtype):
    """An image model runs under it; in 16 bits 0.7 and 0.7003 are one number."""
    one = make_basis(made(Ties, "factors", torch.float32), ["k"], Ties, "factors", dtype=dtype)["k"].terms[0]
    got = []
    for on in (False, True):
        u = torch.tensor([0.7003, -0.4001], requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = one.at(u)
            out.sum().backward()
        got.append((out.detach(), u.grad))
    assert torch.equal(got[0][0], got[1][0]) and torch.equal(got[0][1], got[1][1]) and got[0][0].dtype == torch.float32


def test_a_coefficient_of_zero_has_a_finite_gradient():
    """In factors space a root's is infinite there; 0 is taken, so that a step cannot be NaN."""
    bank = made(RULES["linear"], "factors")
    one = make_basis(bank, ["k"], "linear", "factors")["k"]
    w = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    one.combine(w).sum().backward()
    assert bool(torch.isfinite(w.grad).all())
    assert not one.combine(torch.zeros(3, dtype=torch.float64)).any()


def test_order_and_choice_of_modules():
    """`trim=all` counts every module whatever is asked for; `names` orders the coefficients."""
    rule = Ties(density=0.3, trim="all")
    bank = made(rule, "delta")
    every = make_basis(bank, None, rule, "delta")
    some = make_basis(list(bank.values()), ["v"], rule, "delta", names=["c", "b", "a"])
    assert list(some) == ["v"] and list(every) == bank.modules
    w = torch.tensor([0.7, -0.4, 1.3], dtype=torch.float64)
    assert torch.allclose(some["v"].combine(w.flip(0)), every["v"].combine(w), atol=1e-12)
    with pytest.raises(LoralloyError, match="no adapter has module 'z'"):
        make_basis(bank, ["z"], rule)


@pytest.mark.parametrize("rule", ["tsv_m", "iso_c", "iso_cts"])
def test_other_rules_are_refused_with_the_way_out(rule):
    with pytest.raises(LoralloyError, match=f"rule '{rule}' cannot be learned .*linear, ties, .*search strategy"):
        learnable(rule)


def test_what_else_is_refused():
    with pytest.raises(LoralloyError, match=r"prune=merged.* in knots space cannot be learned"):
        learnable(MagnitudePrune(prune="merged"), "knots")
    with pytest.raises(LoralloyError, match=r"trim=all\) in delta space cannot be learned"):
        learnable(MagnitudePrune(prune="merged", trim="all"), "delta")
    with pytest.raises(LoralloyError, match="ranks must be equal"):
        make_basis(engine_scenes.bank(), None, "linear", "factors")
    with pytest.raises(LoralloyError, match="defined on delta only"):
        learnable(Svd, "knots")
    assert learnable("ties")[1] == "delta" and isinstance(make_basis(made(Svd, "delta"), None, Svd)["q"], Basis)
    assert TsvM.acts_on == "stack"
