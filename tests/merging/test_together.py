"""Bases under one table at once: what each makes of its own row, and the gradients of that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import adapter, factors, relative
from loralloy.bank import Bank
from loralloy.merging import RULES, DareTies, MagnitudePrune, Rule, Ties
from loralloy.merging import basis as basis_file
from loralloy.merging.basis import make_basis
from loralloy.merging.together import Pick, Together, _inverse

SHAPES = {"p": (7, 5), "q": (7, 5), "r": (7, 5), "s": (7, 5), "t": (4, 9), "u": (4, 9)}
HAVE = {"a": "prtq", "b": "prt", "c": "qrstu"}  # p and q: as many adapters of one shape, but others, and not in a row
CASES = [
    (RULES["linear"], "delta"), (RULES["linear"], "factors"),
    (Ties(density=0.5), "delta"), (Ties(density=0.5), "factors"), (DareTies(density=0.7), "factors"),
    (Ties(density=0.6, normaliser="weights"), "factors"), (Ties(density=0.5, vote="weighted"), "factors"),
    (MagnitudePrune(density=0.4, prune="merged"), "factors"), (Ties(density=0.5), "knots"), (Ties(density=0.5), "core"),
]  # fmt: skip
SUMS = [(RULES["linear"], "delta"), (RULES["linear"], "factors"), (Ties(density=0.5), "delta")]


def made(space: str, dtype: torch.dtype = torch.float64, have: dict[str, str] = HAVE) -> Bank:
    """Adapters that differ in modules and scalings, and in rank outside factors space."""
    ranks = dict.fromkeys(have, 3) if space == "factors" else {"a": 2, "b": 3, "c": 4}
    return Bank(
        adapter({m: factors(*SHAPES[m], ranks[n], 10 * i + j, 0.3 + i, dtype) for j, m in enumerate(mine)}, n)
        for i, (n, mine) in enumerate(have.items())
    )


def some_table(bank: Bank, seed: int = 0) -> Tensor:
    """[modules, n] of both signs."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(bank.modules), len(bank.names), generator=g, dtype=torch.float64)


def named(value: object) -> str | None:
    return str(value).replace("(", " ").replace(")", "") if isinstance(value, Rule) else None


def together(bank: Bank, rule: Rule, space: str, beside: bool = True, dtype: torch.dtype | None = None) -> Together:
    bases = list(make_basis(bank, None, rule, space, dtype=dtype).values())
    return Together(bases, len(bank.names), [beside] * len(bases))


def dense(all_: Together, table: Tensor) -> list[Tensor]:
    return [basis.sum(state) for basis, state in zip(all_.bases, all_.states(table), strict=True)]


def mixed(parts: list[Tensor]) -> Tensor:
    """A number that every entry of every part has another share in."""
    return sum(
        ((x * torch.linspace(-1, 2 + j, x.numel()).view_as(x)).sum() for j, x in enumerate(parts)), torch.zeros(())
    )


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(("rule", "space"), CASES, ids=named)
@pytest.mark.parametrize("fused", [False, True])
def test_each_module_is_its_own_basis(rule, space, beside, fused, monkeypatch):
    monkeypatch.setattr(basis_file, "FUSED", ("cpu",) if fused else ())
    bank = made(space)
    alone, all_ = make_basis(bank, None, rule, space), together(bank, rule, space, beside)
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    table = some_table(bank).requires_grad_()
    one = [alone[m].combine(w) for m, w in zip(bank.modules, table, strict=True)]
    many = dense(all_, table)
    assert all(relative(a.detach(), b.detach()) < 1e-14 for a, b in zip(many, one, strict=True))
    want, got = (torch.autograd.grad(mixed(parts), table)[0] for parts in (one, many))
    assert relative(got, want) < 1e-13
    for j, (basis, state) in enumerate(zip(all_.bases, all_.states(table), strict=True)):
        mine, onto = x[:, : basis.shape[1]], torch.ones(3, basis.shape[0], dtype=torch.float64)
        assert relative(basis.beside(mine, state).detach(), mine @ one[j].detach().T) < 1e-13
        assert relative(basis.beside(mine, state, onto).detach(), onto + mine @ one[j].detach().T) < 1e-13
        inputs = tuple(t.clone().requires_grad_() for t in (mine, onto))
        assert torch.autograd.gradcheck(lambda x, y, b=basis, j=j: b.beside(x, all_.states(table)[j], y), inputs)


@pytest.mark.parametrize(("rule", "space"), CASES, ids=named)
def test_gradients(rule, space):
    """Of every coefficient against finite differences; one of an adapter without the module does nothing."""
    bank = made(space)
    all_, table = together(bank, rule, space), some_table(bank, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: mixed(dense(all_, t)), (table,))
    there = torch.tensor([[m in bank[n] for n in bank.names] for m in bank.modules])
    grad = torch.autograd.grad(mixed(dense(all_, table)), table)[0]
    assert not grad[~there].any()
    alone = there.sum(1) == 1  # what is divided by its own weight does not depend on it
    moves = there & ~alone[:, None] if rule.values.get("normaliser") == "weights" else there
    assert bool((grad[moves] != 0).all())


def test_factors_are_those_of_the_formula():
    """A(w) = sum_i sign(w_i) sqrt(|w_i| s_i) A_i, B(w) = sum_i sqrt(|w_i| s_i) B_i: written out, with autograd's gradients."""
    bank = made("factors")
    all_, table = together(bank, RULES["linear"], "factors"), some_table(bank, 2).requires_grad_()
    want = []
    for m, w in zip(bank.modules, table, strict=True):
        own = [(c, bank[n][m]) for n, c in zip(bank.names, w, strict=True) if m in bank[n]]
        a = sum(c.sign() * (c.abs() * f.scaling).sqrt() * f.A for c, f in own)
        b = sum((c.abs() * f.scaling).sqrt() * f.B for c, f in own)
        want.append(b @ a)
    got = dense(all_, table)
    assert all(relative(x.detach(), y.detach()) < 1e-14 for x, y in zip(got, want, strict=True))
    grads = [torch.autograd.grad(mixed(parts), table)[0] for parts in (got, want)]
    assert relative(*grads) < 1e-13


@pytest.mark.parametrize(("rule", "space"), CASES[:5], ids=named)
def test_coefficients_of_zero(rule, space):
    """In factors space a root's gradient is infinite at 0: 0 is taken, and the others' are what they are without it."""
    bank = made(space)
    all_, table = together(bank, rule, space), some_table(bank, 3)
    table[2, 0] = 0.0
    table[0] = 0.0
    table.requires_grad_()
    parts = dense(all_, table)
    assert not parts[0].any()
    grad = torch.autograd.grad(mixed(parts), table)[0]
    assert bool(torch.isfinite(grad).all())
    if space == "factors":
        assert not grad[0].any() and grad[2, 0] == 0
        assert bool((grad[2, 1:] != 0).all())
        one = make_basis(bank, None, rule, space)[bank.modules[2]]
        w = table[2].detach().requires_grad_()
        own = torch.autograd.grad(mixed([torch.zeros(1), torch.zeros(1), one.combine(w)]), w)[0]
        assert relative(grad[2], own) < 1e-13


@pytest.mark.parametrize(("rule", "space"), SUMS, ids=named)
def test_one_adapter(rule, space):
    bank = made(space, have={"c": "qrstu"})
    all_ = together(bank, rule, space)
    for w in (1.0, -0.5):
        table = torch.full((5, 1), w, dtype=torch.float64, requires_grad=True)
        alone = make_basis(bank, None, rule, space)
        for got, m in zip(dense(all_, table), bank.modules, strict=True):
            assert relative(got.detach(), alone[m].combine(table[0]).detach()) < 1e-14
            if rule.name == "linear":
                assert relative(got.detach(), w * bank["c"][m].dense(torch.float64)) < 1e-14
        assert torch.autograd.gradcheck(lambda t: mixed(dense(all_, t)), (table,))


def test_picking_in_any_order():
    """The gradient of an entry is the sum over its places, in whatever order and however often they come, or never."""
    index = torch.tensor([4, 0, 4, 2, 0, 4, 5])
    share = torch.linspace(1, 3, 7, dtype=torch.float64)
    table = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    got = Pick.apply(table, index, _inverse(index, 8))
    assert torch.equal(got, table.flatten()[index])
    grad = torch.autograd.grad(got @ share, table)[0]
    assert torch.allclose(grad.flatten(), torch.zeros(8, dtype=torch.float64).index_add(0, index, share), atol=1e-15)


@pytest.mark.parametrize(("rule", "space"), SUMS, ids=named)
def test_losses_one_after_the_other(rule, space):
    """Two losses under one composition may each go backwards, and the sum of their gradients is that of their sum."""
    bank = made(space)
    all_, table = together(bank, rule, space), some_table(bank).requires_grad_()
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    state, basis = all_.states(table)[1], all_.bases[1]
    for part in (x[:1], x[1:]):
        basis.beside(part, state).square().sum().backward()
    apart, table.grad = table.grad, None
    basis.beside(x, all_.states(table)[1]).square().sum().backward()
    assert relative(apart, table.grad) < 1e-13


def test_nothing_is_held_twice():
    bank = made("factors")
    bases = list(make_basis(bank, None, "linear", "factors").values())
    size = sum(b.nbytes for b in bases)
    all_ = Together(bases, 3, [True] * len(bases))
    assert not bases and sum(b.nbytes for b in all_.bases) == size
    held = {
        t.values.untyped_storage().data_ptr(): t.values.untyped_storage().nbytes() for b in all_.bases for t in b.terms
    }
    assert sum(held.values()) == size and len(held) < 2 * len(all_.bases)


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_16_bit_terms(space):
    """Added in float32, and rounded once where asked for; gradients as near as the terms are."""
    bank, table = made(space, torch.float32), some_table(made(space)).float().requires_grad_()
    exact, small = (together(bank, RULES["linear"], space, dtype=d) for d in (torch.float32, torch.bfloat16))
    want, got = dense(exact, table), dense(small, table)
    assert all(
        x.dtype == torch.float32 and relative(x.detach(), y.detach()) < 2**-6 for x, y in zip(got, want, strict=True)
    )
    grads = [torch.autograd.grad(mixed(parts), table)[0] for parts in (got, want)]
    assert grads[0].dtype == torch.float32 and relative(*grads) < 2**-5
    if space == "factors":
        for whole, short in zip(small.states(table), small.states(table, rounded=True), strict=True):
            assert all(torch.equal(a.to(torch.bfloat16), b) for a, b in zip(whole, short, strict=True))
