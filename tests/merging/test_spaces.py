"""KnOTS and Core Space: entries against dense references of the papers, and the laws of rules in aligned spaces."""

from __future__ import annotations

import dense
import pytest
import torch
from dense import deltas, make_stack, stacks, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import adapter, delta, relative
from loralloy.bank import Bank
from loralloy.factors import LoraFactors
from loralloy.merging import RULES, Rule, merge
from loralloy.merging.entries import Entries
from loralloy.merging.iso_c import RULE as ISO_C
from loralloy.merging.iso_cts import RULE as ISO_CTS
from loralloy.merging.spaces import apply, view
from loralloy.merging.stack import LowRank, Stack
from loralloy.merging.tsv_m import RULE as TSV_M
from loralloy.weights import Weights

quick = settings(max_examples=30, deadline=None)
TIES, DARE, PRUNE = RULES["ties"](density=0.4), RULES["dare_linear"](density=0.6), RULES["magnitude_prune"](density=0.5)
ENTRYWISE = [TIES, DARE, PRUNE]
SPECTRAL = [TSV_M, ISO_C, ISO_CTS]
aligned = pytest.mark.parametrize("space", ["knots", "core"])
entrywise = pytest.mark.parametrize("rule", ENTRYWISE, ids=lambda r: r.name)
spectral = pytest.mark.parametrize("rule", SPECTRAL, ids=lambda r: r.name)


def add(entries: Entries) -> torch.Tensor:
    """sum_i w_i x_i."""
    return entries.summed()


SUM = Rule("sum", add, "", "", "", spaces=("delta", "knots", "core"))


def merged(rule: Rule, stack: Stack, space: str) -> torch.Tensor:
    """dW, [L, out, in]."""
    result = apply(rule, stack, space)
    return result.dense() if isinstance(result, LowRank) else result


def reference(rule: Rule, stack: Stack, space: str, module: int) -> torch.Tensor:
    dws, weights, density = deltas(stack, module), weights_of(stack, module), rule.values["density"]
    if space == "knots":
        u, xs = dense.knots(dws)
        v = None
    else:
        u, xs, v = dense.core(dws, stack.ranks)
    if rule.name == "dare_linear":
        m = dense.dare(xs, weights, density, stack.keys[:, module])
    else:
        m = (dense.ties if rule.name == "ties" else dense.prune)(xs, weights, density)
    return u @ m if v is None else u @ m @ v.T


def gap(got: torch.Tensor, want: torch.Tensor, stack: Stack) -> float:
    """||got - want|| against the adapters' size: DARE may drop all that there is but rounding."""
    parts = zip(stack.absorbed(), stack.weights, strict=True)
    return float((got - want).norm() / sum((w[:, None, None] * p.dense()).norm() for p, w in parts))


def shuffled(stack: Stack, order: list[int]) -> Stack:
    return Stack(
        tuple(stack.A[i] for i in order), tuple(stack.B[i] for i in order),
        stack.scaling[order], stack.weights[order], stack.keys[order],
    )  # fmt: skip


def turned(stack: Stack) -> Stack:
    """The same dW in another gauge, (G A, B G^-1)."""
    g = [torch.randn(stack.modules, r, r, generator=torch.Generator().manual_seed(r)).double() for r in stack.ranks]
    a = [x @ y for x, y in zip(g, stack.A, strict=True)]
    return stack.with_factors(a, [torch.linalg.solve(x, y, left=False) for x, y in zip(g, stack.B, strict=True)])


# -- against the papers ------------------------------------------------------------------------------------------------


@aligned
@entrywise
@quick
@given(stacks())
def test_entrywise_rules_are_the_papers(rule, space, stack):
    got = merged(rule, stack, space)
    assert got.dtype == torch.float64
    for module in range(stack.modules):
        one = stack.only(slice(module, module + 1))
        assert gap(got[module], reference(rule, stack, space, module), one) < 1e-7


@aligned
@entrywise
def test_float32(rule, space):
    for seed in range(4):
        stack = make_stack(40, 30, (8, 5, 3), seed=seed, dtype=torch.float32)
        got = merged(rule, stack, space)
        assert got.dtype == torch.float32
        for module in range(stack.modules):
            assert relative(got[module], reference(rule, stack, space, module)) < 1e-5


@spectral
@quick
@given(stacks())
def test_spectral_rules_in_the_core_are_the_same(rule, stack):
    """U rule(M_1, ..., M_T) V^T = rule(dW_1, ..., dW_T): what "core" means for a rule of singular subspaces."""
    for module in range(stack.modules):
        u, cores, v = dense.core(deltas(stack, module), stack.ranks)
        factors = [torch.linalg.svd(m) for m in cores]
        width = [min(r, *m.shape) for r, m in zip(stack.ranks, cores, strict=True)]
        small = Stack(
            tuple((s[:k, None] * vh[:k])[None] for (_, s, vh), k in zip(factors, width, strict=True)),
            tuple(x[:, :k][None] for (x, _, _), k in zip(factors, width, strict=True)),
            torch.ones(stack.adapters, 1).double(), stack.weights[:, module, None], stack.keys[:, module, None],
        )  # fmt: skip
        if rule is ISO_CTS and sum(width) != sum(stack.ranks) < min(stack.shape):
            continue  # another r: the split is of the nominal ranks
        want = rule.function(stack.only(slice(module, module + 1)), **rule.values).dense()[0]
        assert relative(u @ rule.function(small, **rule.values).dense()[0] @ v.T, want) < 1e-7


# -- laws --------------------------------------------------------------------------------------------------------------


@aligned
@quick
@given(stacks())
def test_the_spaces_lose_nothing(space, stack):
    """Each adapter comes back from its own entries; a linear rule is task arithmetic."""
    seen = view(stack, space)
    for i, part in enumerate(stack.absorbed()):
        own = [torch.cat([piece.part(i, b) for b in range(len(piece.starts))], 1) for piece in seen.pieces]
        back = seen.rebuild([x.reshape(-1, *p.shape) for x, p in zip(own, seen.pieces, strict=True)])
        assert isinstance(back, LowRank)
        assert relative(back.dense(), part.dense()) < 1e-9
        assert back.rank <= min(sum(stack.ranks), *stack.shape)
    assert relative(merged(SUM, stack, space), stack.weighted_sum().dense()) < 1e-9


@pytest.mark.parametrize("space", ["delta", "knots", "core"])
@entrywise
@settings(max_examples=20, deadline=None)
@given(stacks(), st.randoms(use_true_random=False))
def test_gauge_and_order_do_not_matter(rule, space, stack, random):
    want = merged(rule, stack, space)
    assert gap(merged(rule, turned(stack), space), want, stack) < 1e-7
    order = random.sample(range(stack.adapters), stack.adapters)
    assert gap(merged(rule, shuffled(stack, order), space), want, stack) < 1e-7


@aligned
@entrywise
@pytest.mark.parametrize("scale", [1e-9, 1e7])
def test_the_result_scales_with_dw(rule, space, scale):
    """KnOTS's limit is relative: with the official 1e-5 the small dW would be nothing."""
    stack = make_stack()
    other = stack.with_factors(stack.A, stack.B, stack.scaling * scale)
    assert relative(merged(rule, other, space) / scale, merged(rule, stack, space)) < 1e-8


@aligned
def test_modules_do_not_meet(space):
    """A batch is its modules one by one, also where they have different numbers of directions; the same bytes each time."""
    stack = make_stack(20, 16, (4, 3, 2), modules=4)
    b = [x.clone() for x in stack.B]
    b[0][1] = 0
    b[2][2:] = 0
    stack = stack.with_factors(stack.A, b)
    if space == "knots":
        assert [(p.shape, p.keys.shape) for p in view(stack, space).pieces] == [
            ((5, 16), (3, 1)), ((7, 16), (3, 2)), ((9, 16), (3, 1)),
        ]  # fmt: skip
    for rule in ENTRYWISE:
        got = merged(rule, stack, space)
        for module in range(4):
            alone = stack.only(slice(module, module + 1))
            assert relative(got[module], merged(rule, alone, space)[0]) < 1e-9
            assert relative(got[module], reference(rule, stack, space, module)) < 1e-9
        assert torch.equal(got, merged(rule, stack, space))


@entrywise
def test_a_zero_adapter_leaves_no_rows_in_knots(rule):
    """Zero B, as at initialisation: densities count the rows that there are, so the others merge as without it."""
    if rule.name == "ties":  # an adapter of zeros agrees with nobody
        rule = rule(normaliser="count")
    two, three = make_stack(20, 16, (4, 3)), make_stack(20, 16, (4, 3, 5))
    stack = Stack(
        (*two.A, three.A[2]), (*two.B, torch.zeros_like(three.B[2])), torch.cat([two.scaling, three.scaling[2:]]),
        torch.cat([two.weights, three.weights[2:]]), torch.cat([two.keys, three.keys[2:]]),
    )  # fmt: skip
    assert relative(merged(rule, stack, "knots"), merged(rule, two, "knots")) < 1e-9


# -- hard cases --------------------------------------------------------------------------------------------------------


@aligned
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_zero_is_zero(space, dtype):
    stack = make_stack(dtype=dtype)
    nothing = stack.with_factors(stack.A, [torch.zeros_like(b) for b in stack.B])
    for rule in (*ENTRYWISE, SUM):
        assert not merged(rule, nothing, space).any()


@aligned
@pytest.mark.parametrize("difference", [0.0, 1e-7, 1e-5])
def test_near_copies(space, difference):
    """Nothing is lost and nothing is raised: the sum is exact, TIES of two copies is TIES of one."""
    stack = make_stack(40, 30, (6, 6), weights=(1.0, 1.0))
    g = torch.Generator().manual_seed(1)
    a, b = stack.A[0].float(), stack.B[0].float()
    near = [(x * (1 + difference * torch.randn(x.shape, generator=g))).float() for x in (a, b)]
    pair = Stack((a, near[0]), (b, near[1]), stack.scaling[[0, 0]], stack.weights, stack.keys)
    one = Stack((a,), (b,), stack.scaling[:1], stack.weights[:1], stack.keys[:1])
    exact = sum(deltas(pair, m)[0] + deltas(pair, m)[1] for m in [0])
    assert relative(merged(SUM, pair, space)[0], exact) < 1e-6
    got = merged(TIES, pair, space)
    assert torch.isfinite(got).all()
    if space == "knots" and difference < 1e-6:
        assert relative(got, merged(TIES, one, space)) < 1e-5


@aligned
def test_dependent_columns_and_a_bad_gauge(space):
    """Columns that repeat and that differ by 1e4: the sum stays exact in float32."""
    stack = make_stack(40, 30, (6, 5), dtype=torch.float32)
    g = torch.tensor([1e4, 1e-4, 1.0, 1e2, 3.0, 1e-3])[:, None]
    b = torch.cat([stack.B[0][:, :, :4], stack.B[0][:, :, :2]], 2)
    hard = stack.with_factors([stack.A[0] * g, stack.A[1]], [b / g.T, stack.B[1]])
    for module in range(2):
        exact = sum(w * d for w, d in zip(weights_of(hard, module), deltas(hard, module), strict=True))
        assert relative(merged(SUM, hard, space)[module], exact) < 1e-6
    assert torch.isfinite(merged(TIES, hard, space)).all()


# -- through merge() ---------------------------------------------------------------------------------------------------


def bank(n: int = 3) -> Bank:
    g = torch.Generator().manual_seed(3)

    def part(out: int, inside: int, r: int) -> LoraFactors:
        return LoraFactors(torch.randn(r, inside, generator=g), torch.randn(out, r, generator=g), 0.5)

    shapes = {"q": (24, 20), "k": (24, 20), "down": (18, 30)}
    return Bank([adapter({m: part(*s, 3 + i) for m, s in shapes.items()}, f"a{i}") for i in range(n)])


WEIGHTS = Weights({"a0": 1.0, "a1": -0.5, "a2": 0.7})


def as_stack(adapters: Bank, module: str) -> Stack:
    parts = [adapters[f"a{i}"][module] for i in range(3)]
    scaling = torch.tensor([[p.scaling] for p in parts]).double()
    weights = torch.tensor([[1.0], [-0.5], [0.7]]).double()
    return Stack(
        tuple(p.A[None] for p in parts), tuple(p.B[None] for p in parts), scaling, weights, torch.zeros(3, 1).long()
    )


@spectral
@pytest.mark.parametrize("space", ["delta", "core"])
def test_merge_runs_spectral_rules(rule, space):
    adapters = bank()
    got = delta(merge(adapters, WEIGHTS, rule, space, rank="full").adapter)
    for module, dw in got.items():
        assert relative(dw, rule.function(as_stack(adapters, module), **rule.values).dense()[0]) < 1e-5


@aligned
def test_merge_trims_over_all_modules_in_aligned_spaces(space):
    """trim="all" in knots and core space: one limit for an adapter's entries of all modules."""
    adapters, rule = bank(), RULES["ties"](density=0.3, trim="all")
    got = delta(merge(adapters, WEIGHTS, rule, space, rank="full").adapter)
    seen = {}
    for module in got:
        dws = deltas(as_stack(adapters, module), 0)
        seen[module] = dense.knots(dws) if space == "knots" else dense.core(dws, (3, 4, 5))
    trimmed = []
    for i in range(3):
        every = torch.cat([entries[1][i].flatten() for entries in seen.values()])
        bar = every.abs().sort(descending=True).values[int(0.3 * every.numel()) - 1]
        trimmed.append({m: torch.where(e[1][i].abs() >= bar * (1 - 1e-6), e[1][i], 0.0) for m, e in seen.items()})
    for module, dw in got.items():
        m = dense.ties([t[module] for t in trimmed], [1.0, -0.5, 0.7], 1.0)
        u, *_, v = seen[module]
        want = u @ m if space == "knots" else u @ m @ v.T
        assert relative(dw, want) < 1e-5
