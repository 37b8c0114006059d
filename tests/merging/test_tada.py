"""The rule tada against dense float64 references of its definitions, and the laws that it obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense import deltas, make_stack, stacks, svd, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import adapter, dense_sum, factors, relative
from loralloy.bank import Bank
from loralloy.merging import Svd, Tada, merge, merge_factors
from loralloy.merging.cut import cut
from loralloy.merging.stack import Stack
from loralloy.merging.tada import resolve, watched
from loralloy.weights import Weights

CONFLICTS = ["shared", "owned", "cosine", "opposed", "output"]
every = pytest.mark.parametrize("conflict", CONFLICTS)
thresholds = st.sampled_from([0.0, 0.1, 0.35])
some = settings(max_examples=25, deadline=None)


def run(stack: Stack, conflict: str, threshold: float) -> torch.Tensor:
    return resolve(stack, conflict, threshold)[0].dense()


# -- against the definitions -------------------------------------------------------------------------------------------


def reference(stack: Stack, module: int, conflict: str, threshold: float) -> torch.Tensor:
    """The docstring of the rule, on dW itself, one component after the other."""
    dws = [w * d for w, d in zip(weights_of(stack, module), deltas(stack, module), strict=True)]
    if conflict == "owned":
        return owned(dws, threshold)
    parts = [svd(d) for d in dws]
    x = [(i, u[:, k], s[k], v[:, k]) for i, (u, s, v) in enumerate(parts) for k in range(s.numel())]
    total = torch.zeros_like(dws[0])
    for i, u, s, v in x:
        rest = sum((d for j, d in enumerate(dws) if j != i), torch.zeros_like(dws[0]))
        net = float(u @ rest @ v)
        b = s
        if conflict == "shared" and -net > threshold * s:
            against = [(max(0.0, -float(o[2] * (u @ o[1]) * (v @ o[3]))), side(o, x) ** 2) for o in x if o[0] != i]
            mine = side((i, u, s, v), x) ** 2
            b = s - net * sum(a * mine / (mine + other) for a, other in against) / sum(a for a, _ in against)
        if conflict == "opposed" and -net > threshold * s:
            b = 0 * s
        if conflict in ("cosine", "output"):
            for j, p, t, q in x:
                c, a = float((u @ p) * (v @ q)), abs(float(u @ p)) * max(0.0, 1 - float(v @ q) ** 2) ** 0.5
                if j != i and t >= s and (c < -threshold if conflict == "cosine" else a > threshold):
                    b = 0 * s
        total += b * torch.outer(u, v)
    return total


def side(one: tuple, x: list[tuple]) -> float:
    """A component's strength with what the other adapters add to it."""
    i, u, s, v = one
    return float(s) + sum(max(0.0, float(t * (u @ p) * (v @ q))) for j, p, t, q in x if j != i)


def owned(dws: list[torch.Tensor], threshold: float) -> torch.Tensor:
    _, _, q = svd(torch.cat(dws, 0))
    total = torch.zeros_like(dws[0])
    for a in range(q.shape[1]):
        outputs = [d @ q[:, a] for d in dws]
        energy = torch.stack([o.square().sum() for o in outputs])
        share = energy / energy.sum()
        contested = 1 - share.max() > threshold
        kept = [o * e if contested else o for o, e in zip(outputs, share, strict=True)]
        total += torch.outer(sum(kept), q[:, a])  # type: ignore[arg-type]
    return total


@every
@some
@given(stacks(), thresholds)
def test_it_is_what_the_docstring_says(conflict, stack, threshold):
    got, found = resolve(stack, conflict, threshold)
    assert got.rank == sum(stack.ranks) and got.A.dtype == torch.float64
    for module in range(stack.modules):
        want = reference(stack, module, conflict, threshold)
        exact = dense_sum_of(stack, module)
        assert relative(got.dense()[module], want) < 1e-8
        assert float(found.total[module]) == pytest.approx(float(exact.norm()), rel=1e-8, abs=1e-9)
        assert float(found.removed[module]) == pytest.approx(float((exact - want).norm()), rel=1e-6, abs=1e-6)


def dense_sum_of(stack: Stack, module: int) -> torch.Tensor:
    return sum(w * d for w, d in zip(weights_of(stack, module), deltas(stack, module), strict=True))  # type: ignore[return-value]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_has_only_its_own_rounding(conflict, dtype):
    for seed in range(3):
        stack = make_stack(40, 30, (8, 5, 3), seed=seed, dtype=dtype)
        for module in range(stack.modules):
            assert relative(run(stack, conflict, 0.05)[module], reference(stack, module, conflict, 0.05)) < 1e-5


# -- laws --------------------------------------------------------------------------------------------------------------


@every
@some
@given(stacks(), thresholds)
def test_gauge_does_not_matter(conflict, stack, threshold):
    g = torch.Generator().manual_seed(5)
    gauges = [
        torch.randn(stack.modules, r, r, generator=g, dtype=torch.float64) + 3 * torch.eye(r) for r in stack.ranks
    ]
    turned = stack.with_factors(
        [x @ a for x, a in zip(gauges, stack.A, strict=True)],
        [torch.linalg.solve(x, b, left=False) for x, b in zip(gauges, stack.B, strict=True)],
    )
    assert relative(run(turned, conflict, threshold), run(stack, conflict, threshold)) < 1e-7


@every
@some
@given(stacks(), thresholds, st.randoms(use_true_random=False))
def test_order_does_not_matter(conflict, stack, threshold, random):
    order = random.sample(range(stack.adapters), stack.adapters)
    other = Stack(
        tuple(stack.A[i] for i in order), tuple(stack.B[i] for i in order),
        stack.scaling[order], stack.weights[order], stack.keys[order],
    )  # fmt: skip
    assert relative(run(other, conflict, threshold), run(stack, conflict, threshold)) < 1e-7


@every
@some
@given(stacks(), thresholds, st.sampled_from([1e-7, 0.5, 1e6]))
def test_the_result_scales_with_dw(conflict, stack, threshold, scale):
    other = replace(stack, scaling=stack.scaling * scale)
    assert relative(run(other, conflict, threshold) / scale, run(stack, conflict, threshold)) < 1e-9


@some
@given(stacks(), thresholds)
def test_without_removal_it_is_the_sum_cut_optimally(stack, threshold):
    """Law 1: the exact weighted sum, and Eckart-Young's cut of it."""
    got = Tada(conflict="none", threshold=threshold).function(stack, conflict="none", threshold=threshold)
    rank = max(stack.ranks)
    done = cut(got, rank)
    for module in range(stack.modules):
        exact = dense_sum_of(stack, module)
        assert relative(got.dense()[module], exact) < 1e-12
        s = torch.linalg.svdvals(exact)
        lost = float(s[rank:].norm())
        assert float((done.result.dense()[module] - exact).norm()) == pytest.approx(
            lost, rel=1e-6, abs=1e-7 * float(s[0])
        )


@every
def test_one_adapter_and_a_zero_one_lose_nothing(conflict):
    stack = make_stack(12, 10, (4, 3))
    alone = replace(stack, weights=stack.weights * torch.tensor([[1.0], [0.0]]))
    silent = stack.with_factors(stack.A, [stack.B[0], torch.zeros_like(stack.B[1])])
    for one in (alone, silent, Stack(stack.A[:1], stack.B[:1], stack.scaling[:1], stack.weights[:1], stack.keys[:1])):
        want = torch.stack([weights_of(stack, m)[0] * deltas(stack, m)[0] for m in range(stack.modules)])
        got, found = resolve(one, conflict, 0.0)
        assert relative(got.dense(), want) < 1e-10
        assert int(found.dropped.sum()) == int(found.cleared.sum()) == 0 and float(found.removed.max()) < 1e-9


# -- what it means -----------------------------------------------------------------------------------------------------


def pair(strong: float, weak: float, cosine: float) -> Stack:
    """Two rank-1 adapters in 6 x 5 whose dW have this cosine, with equal input directions."""
    e, f = torch.eye(6, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    u = cosine * e[0] + (1 - cosine**2) ** 0.5 * e[1]
    ones = torch.ones(2, 1, dtype=torch.float64)
    a = (f[:1][None], f[:1][None])
    b = (strong * e[0][None, :, None], weak * u[None, :, None])
    return Stack(a, b, ones, ones.clone(), torch.zeros(2, 1, dtype=torch.int64))


def test_of_two_exact_opposites_the_stronger_stays():
    for strong, weak in ((10.0, 0.1), (3.0, 1.0)):
        stack = pair(strong, weak, -1.0)
        for conflict in ("cosine", "shared"):
            kept = float(run(stack, conflict, 0.0)[0, 0, 0])
            assert strong - weak < kept <= strong + 1e-9
        assert float(run(stack, "cosine", 0.1)[0, 0, 0]) == pytest.approx(strong)
    assert float(run(pair(2.0, 2.0, -1.0), "shared", 0.0).abs().max()) < 1e-9  # a draw is nothing, as in the sum


def test_shared_takes_a_mild_opposition_away_once():
    """Their inner product, -c before, is 0 to first order after; what does not oppose stays whole."""
    for strong, weak in ((1.0, 1.0), (2.0, 1.0), (5.0, 1.0)):
        stack = pair(strong, weak, -0.1)
        exact, got = run(stack, "none", 0.0)[0], run(stack, "shared", 0.0)[0]
        parts = strong**2 + weak**2
        assert float(exact.norm()) ** 2 == pytest.approx(parts - 0.2 * strong * weak)
        assert float(got.norm()) ** 2 == pytest.approx(parts, rel=0.01)
        assert float(got.norm()) ** 2 > float(exact.norm()) ** 2 + 0.15 * strong * weak
    agree = pair(2.0, 1.0, 0.6)
    for conflict in ("shared", "cosine", "opposed"):
        assert relative(run(agree, conflict, 0.0), run(agree, "none", 0.0)) < 1e-12


def test_two_near_copies_outvote_a_third():
    e = torch.eye(6, dtype=torch.float64)
    b = tuple(s * e[:1].T[None] for s in (1.0, 1.0, -1.5))
    a = (e[:1][None],) * 3
    ones = torch.ones(3, 1, dtype=torch.float64)
    stack = Stack(a, b, ones, ones.clone(), torch.zeros(3, 1, dtype=torch.int64))
    found = resolve(stack, "opposed", 0.1)[1]
    # each of the copies has -0.5 against it, the third -2
    assert found.dropped.flatten().tolist() == [1, 1, 1]
    assert float(resolve(stack, "opposed", 0.6)[0].dense()[0, 0, 0]) == pytest.approx(2.0)
    assert 0.3 < float(run(stack, "shared", 0.1)[0, 0, 0]) < 0.7  # the sum is 0.5


def test_owned_keeps_what_one_adapter_reads_alone():
    e = torch.eye(6, dtype=torch.float64)
    a = (e[:2][None], e[1:3][None])  # both read the second input
    b = (torch.stack([e[0], 2 * e[1]], 1)[None], torch.stack([e[3], e[4]], 1)[None])
    ones = torch.ones(2, 1, dtype=torch.float64)
    got = run(Stack(a, b, ones, ones.clone(), torch.zeros(2, 1, dtype=torch.int64)), "owned", 0.1)[0]
    assert relative(got[:, 0], e[0]) < 1e-9 and relative(got[:, 2], e[4]) < 1e-9
    assert relative(got[:, 1], 0.8 * 2 * e[1] + 0.2 * e[3]) < 1e-9


# -- in the engine -----------------------------------------------------------------------------------------------------


def bank() -> Bank:
    shapes = {"x": (24, 20), "y": (24, 20), "z": (10, 30)}
    return Bank(
        adapter({m: factors(*shape, r, 10 * i + j) for j, (m, shape) in enumerate(shapes.items())}, n)
        for i, (n, r) in enumerate((("task", 4), ("domain", 3), ("other", 2)))
    )


@every
def test_the_engine_cuts_it_to_the_largest_rank(conflict):
    b = bank()
    weights = Weights({"task": 1.0, "domain": {"x": 0.5, "y": 1.5, "z": -1.0}, "other": 0.7})
    seen: list = []
    whole = merge(b, weights, Tada(conflict=conflict), rank="full")
    merged = merge(b, weights, watched(Tada(conflict=conflict), seen))
    assert merged.adapter.max_rank == merged.adapter.config.rank == 4
    assert f"conflict={conflict}" in merged.report.rule and sum(f.total.numel() for f in seen) == 3
    for m in b.modules:
        dense = whole.adapter[m].dense()
        best = float(torch.linalg.svdvals(dense)[4:].norm())
        assert float((merged.adapter[m].dense() - dense).norm()) == pytest.approx(
            best, rel=1e-3, abs=1e-5 * float(dense.norm())
        )


def test_none_is_svd_in_the_engine():
    b, w = bank(), Weights({"task": 1.0, "domain": 0.5, "other": -0.3})
    ours, theirs = merge(b, w, Tada(conflict="none")), merge(b, w, Svd, rank="max")
    for m in b.modules:
        assert relative(ours.adapter[m].dense(), theirs.adapter[m].dense()) < 1e-6
        exact = dense_sum([b[n][m] for n in b.names], [1.0, 0.5, -0.3])
        assert float((ours.adapter[m].dense() - exact).norm()) == pytest.approx(
            float(torch.linalg.svdvals(exact)[4:].norm()), rel=1e-4
        )
    bare = merge_factors([b[n] for n in b.names], [1.0, 0.5, -0.3], "tada")
    assert all(f.rank == 4 for f in bare.values())
