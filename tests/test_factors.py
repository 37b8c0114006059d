"""r-space algebra against the dense float64 truth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import dense_sum, factors, generator, relative
from loralloy import factors as algebra
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors

TIGHT = 1e-5
sizes = st.integers(1, 24)
ranks = st.integers(1, 30)  # often larger than the width
seeds = st.integers(0, 10_000)
scalings = st.sampled_from([0.01, 0.5, 1.0, 2.0, 16.0 / math.sqrt(3), 40.0, -1.5])
weights_ = st.sampled_from([1.0, 0.5, 0.25, -0.75, 3.0, 1e-3, -20.0, 0.0])


@st.composite
def stacks(draw: st.DrawFn, most: int = 4) -> tuple[list[LoraFactors], list[float]]:
    """Adapters of one module: mixed ranks, scalings and signs; some near-duplicate, rank-deficient or zero."""
    out, inside = draw(sizes), draw(sizes)
    parts: list[LoraFactors] = []
    for _ in range(draw(st.integers(1, most))):
        seed, kind = draw(seeds), draw(st.sampled_from(["plain", "plain", "near", "deficient", "zero"]))
        f = factors(out, inside, draw(ranks), seed, draw(scalings))
        if kind == "near" and parts:  # 1e-6 apart: a Gram matrix squares this away
            twin = parts[-1]
            noise = torch.randn(twin.A.shape, generator=generator(seed))
            f = LoraFactors(twin.A + 1e-6 * noise, twin.B.clone(), twin.scaling)
        elif kind == "deficient":
            f = LoraFactors(f.A[:1].expand_as(f.A).clone(), f.B, f.scaling)
        elif kind == "zero":
            f = LoraFactors(f.A, torch.zeros_like(f.B), f.scaling)
        parts.append(f)
    return parts, [draw(weights_) for _ in parts]


def size(parts: list[LoraFactors], weights: list[float]) -> float:
    """sum_i |w_i| ||dW_i||: what float32 rounding is relative to when the terms cancel."""
    return sum(abs(w) * float(f.dense().norm()) for f, w in zip(parts, weights, strict=True))


@given(stacks())
def test_weighted_sum_is_the_dense_sum(stack):
    parts, weights = stack
    got, want = algebra.weighted_sum(parts, weights).dense(), dense_sum(parts, weights)
    assert float((got - want).norm()) <= 1e-6 * size(parts, weights)


@given(st.integers(0, 200), st.sampled_from([(7, 30), (30, 7), (5, 5)]))
def test_weighted_sum_is_exact_relative_to_the_sum(seed, shape):
    """The issue's figure: below 1e-5 before the cast, for mixed ranks and scalings (alpha/r and alpha/sqrt(r))."""
    parts = [factors(*shape, r, seed + r, s) for r, s in ((2, 2.0), (9, 16 / math.sqrt(9)), (40, 0.25))]
    weights = [0.7, -0.2, 1.9]
    assert relative(algebra.weighted_sum(parts, weights).dense(), dense_sum(parts, weights)) < TIGHT


def test_float64_factors_stay_float64():
    parts = [factors(8, 6, 3, i, dtype=torch.float64) for i in range(3)]
    total = algebra.weighted_sum(parts, [0.3, -0.3, 1])
    assert total.A.dtype == total.B.dtype == torch.float64
    assert relative(total.dense(), dense_sum(parts, [0.3, -0.3, 1])) < 1e-14


def test_bfloat16_factors_are_summed_in_float32():
    parts = [factors(16, 16, 4, i, dtype=torch.bfloat16) for i in range(3)]
    assert relative(algebra.weighted_sum(parts, [1, 2, -0.5]).dense(), dense_sum(parts, [1, 2, -0.5])) < 1e-6


@given(stacks())
def test_norm_and_singular_values(stack):
    for f in stack[0]:
        dense = f.dense()
        assert algebra.norm(f) == pytest.approx(float(dense.norm()), rel=TIGHT, abs=1e-12)
        values = torch.linalg.svdvals(dense)
        got = algebra.singular_values(f)
        n = min(len(values), len(got))
        assert torch.allclose(got[:n].double(), values[:n], rtol=TIGHT, atol=1e-9 * float(dense.norm()) + 1e-12)
        assert len(got) == min(*f.shape, f.rank)


@given(sizes, sizes, ranks, ranks, seeds, scalings, scalings)
def test_inner_and_cosine(out, inside, r, q, seed, s, t):
    f, g = factors(out, inside, r, seed, s), factors(out, inside, q, seed + 1, t)
    want = float((f.dense() * g.dense()).sum())
    length = float(f.dense().norm() * g.dense().norm())
    assert algebra.inner(f, g) == pytest.approx(want, abs=TIGHT * length)
    assert algebra.cosine(f, g) == pytest.approx(want / length, abs=TIGHT)


def test_cosine_of_itself_its_negative_and_zero():
    f = factors()
    assert algebra.cosine(f, f) == pytest.approx(1, abs=1e-9)
    assert algebra.cosine(f, LoraFactors(f.A, f.B, -f.scaling)) == pytest.approx(-1, abs=1e-9)
    assert algebra.cosine(f, LoraFactors(f.A, torch.zeros_like(f.B))) == 0.0


@given(stacks(), st.integers(1, 26))
def test_truncation_is_the_optimum(stack, rank):
    """Eckart-Young: no rank-k matrix is nearer; and the error it reports is the true one."""
    total = algebra.weighted_sum(*stack)
    dense = total.dense()
    length = float(dense.norm())
    if length == 0:
        assert algebra.truncate(total, rank)[1] == 0.0
        return
    cut, said = algebra.truncate(total, rank)
    assert cut.rank <= rank
    got = relative(cut.dense(), dense)
    optimum = float(torch.linalg.svdvals(dense)[rank:].norm()) / length
    # The stack may cancel: then float32 itself is relative to the parts, not to what is left of them.
    noise = TIGHT * max(1.0, float(total.a.double().norm() * total.b.double().norm()) / length * 0.1)
    assert got == pytest.approx(optimum, rel=TIGHT, abs=noise)
    assert said == pytest.approx(got, rel=TIGHT, abs=noise)


def test_truncation_of_near_duplicates_keeps_the_optimum():
    """Where Gram matrices fail: two adapters 1e-6 apart, weights that do and do not cancel."""
    f = factors(64, 48, 8, 3)
    g = LoraFactors(f.A + 1e-6 * torch.randn(f.A.shape, generator=generator(4)), f.B, f.scaling)
    for weights in ([0.5, 0.5], [1.0, -0.999]):
        total = algebra.weighted_sum([f, g], weights)
        optimum = float(torch.linalg.svdvals(total.dense())[4:].norm() / total.dense().norm())
        cut, said = algebra.truncate(total, 4)
        assert relative(cut.dense(), total.dense()) == pytest.approx(optimum, rel=TIGHT)
        assert said == pytest.approx(optimum, rel=1e-4)


def test_truncation_to_the_true_rank_loses_nothing():
    f = factors(40, 30, 3, 1)
    wide = algebra.weighted_sum([f, f, f], [1, 1, 1])  # rank 9 on paper, 3 in truth
    cut, said = algebra.truncate(wide, 3)
    assert relative(cut.dense(), 3 * f.dense()) < TIGHT and said < TIGHT


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_must_be_positive(rank):
    with pytest.raises(LoralloyError, match=f"rank {rank} is not positive"):
        algebra.truncate(factors(), rank)


@given(stacks(most=2), st.sampled_from([1.0, -0.5]))
def test_difference_and_relative_error(stack, w):
    f, g = stack[0][0], stack[0][-1]
    g = LoraFactors(g.A, g.B, g.scaling * w)
    gap, length = float((f.dense() - g.dense()).norm()), float(g.dense().norm())
    scale = float(f.dense().norm()) + length
    assert algebra.difference(f, g) == pytest.approx(gap, rel=TIGHT, abs=1e-12 * scale)
    if length:
        assert algebra.relative_error(f, g) == pytest.approx(gap / length, rel=TIGHT, abs=1e-12 * scale / length)


def test_difference_sees_a_tiny_change():
    """No cancellation: float32 subtraction of two dense matrices could not see it."""
    f = factors(20, 20, 4, dtype=torch.float64)
    g = LoraFactors(f.A * (1 + 1e-10), f.B, f.scaling)
    assert algebra.relative_error(g, f) == pytest.approx(1e-10, rel=1e-3)


def test_relative_error_against_zero():
    zero = LoraFactors(torch.ones(2, 9), torch.zeros(12, 2))
    assert algebra.relative_error(factors(), zero) == math.inf
    assert algebra.relative_error(zero, zero) == 0.0


@given(stacks(), st.integers(1, 60))
def test_pad_changes_shapes_only(stack, rank):
    for f in stack[0]:
        padded = algebra.pad(f, rank)
        assert padded.rank == max(rank, f.rank)
        assert relative(padded.dense(), f.dense()) < 1e-14


@given(st.integers(1, 8), seeds)
def test_gauge(rank, seed):
    """(A, B) and (GA, BG^-1) are one dW: every function of dW must agree."""
    f, other = factors(14, 10, rank, seed, dtype=torch.float64), factors(14, 10, 3, seed + 1, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(rank, rank, generator=generator(seed), dtype=torch.float64)).Q
    g = q @ torch.diag(torch.logspace(-2, 2, rank, dtype=torch.float64))
    turned = LoraFactors(g @ f.A, f.B @ torch.linalg.inv(g), f.scaling)
    assert algebra.norm(turned) == pytest.approx(algebra.norm(f), rel=1e-9)
    assert algebra.inner(turned, other) == pytest.approx(algebra.inner(f, other), rel=1e-8, abs=1e-9)
    assert relative(algebra.singular_values(turned), algebra.singular_values(f)) < 1e-9
    both = [algebra.weighted_sum([x, other], [0.7, -0.4]) for x in (f, turned)]
    assert relative(both[1].dense(), both[0].dense()) < 1e-9
    cuts = [algebra.truncate(x, 2)[0].dense() for x in both]
    assert relative(cuts[1], cuts[0]) < 1e-7


@given(stacks(), st.integers(1, 8))
def test_equal_input_gives_equal_bytes(stack, rank):
    parts, weights = stack
    one, two = (algebra.truncate(algebra.weighted_sum(parts, weights), rank)[0] for _ in range(2))
    assert one.A.numpy().tobytes() == two.A.numpy().tobytes()
    assert one.B.numpy().tobytes() == two.B.numpy().tobytes()


@given(stacks(), st.randoms(use_true_random=False))
def test_order_does_not_matter(stack, random):
    parts, weights = stack
    order = list(range(len(parts)))
    random.shuffle(order)
    got = algebra.weighted_sum([parts[i] for i in order], [weights[i] for i in order]).dense()
    assert float((got - algebra.weighted_sum(parts, weights).dense()).norm()) <= 1e-6 * size(parts, weights)


def test_weight_zero_is_absence_and_all_zero_is_zero():
    f, g = factors(seed=1), factors(seed=2, rank=7)
    alone, with_absent = algebra.weighted_sum([f], [0.3]), algebra.weighted_sum([g, f], [0.0, 0.3])
    assert torch.equal(alone.dense(), with_absent.dense()) and with_absent.rank == f.rank
    assert float(algebra.weighted_sum([f, g], [0, 0]).dense().norm()) == 0


def test_huge_and_tiny_weights_do_not_overflow_half_precision():
    """The root of the coefficient goes to each side: 1e6 on one side alone would be infinite in fp16."""
    f = factors(scaling=1e6)
    total = algebra.weighted_sum([f], [1.0]).to(torch.float16)
    assert bool(torch.isfinite(total.A).all() and torch.isfinite(total.B).all())
    assert relative(total.dense(), f.dense()) < 2e-3


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 1), (1, 2, 2)])
def test_convolution_factors(kernel):
    g = generator(0)
    parts = []
    for r in (2, 5):
        a, b = torch.randn(r, 4, *kernel, generator=g), torch.randn(6, r, *[1] * len(kernel), generator=g)
        parts.append(LoraFactors(a, b, 0.5, "conv"))
    total = algebra.weighted_sum(parts, [0.5, -2])
    assert total.A.shape[1:] == (4, *kernel) and total.B.shape[2:] == (1,) * len(kernel)
    assert relative(total.dense(), dense_sum(parts, [0.5, -2])) < TIGHT
    cut, said = algebra.truncate(algebra.pad(total, 9), 3)
    assert cut.A.shape == (3, 4, *kernel)
    assert relative(cut.dense(), total.dense()) == pytest.approx(said, rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "kind", "says"),
    [
        ((4, 9), (12, 3), "linear", r"A \[4, 9\] and B \[12, 3\] do not fit"),
        ((4,), (12, 4), "linear", "do not fit"),
        ((4, 9, 3), (12, 4, 1), "linear", "must be matrices"),
        ((4, 9, 3), (12, 4, 3), "conv", "must be"),
        ((4, 9), (12, 4), "conv", "must be"),
    ],
)
def test_misfits_are_refused(a, b, kind, says):
    with pytest.raises(LoralloyError, match=says):
        LoraFactors(torch.zeros(a), torch.zeros(b), 1.0, kind)


@pytest.mark.parametrize("scaling", [math.nan, math.inf])
def test_scaling_must_be_finite(scaling):
    with pytest.raises(LoralloyError, match="must be finite"):
        factors(scaling=scaling)


def test_modules_of_other_shapes_are_refused():
    f, g = factors(12, 9), factors(9, 12)
    for call in (lambda: algebra.inner(f, g), lambda: algebra.weighted_sum([f, g], [1, 1])):
        with pytest.raises(LoralloyError, match=r"modules do not match: linear \[12, 9\].*\[9, 12\]"):
            call()


def test_a_weight_an_adapter():
    with pytest.raises(LoralloyError, match="2 adapters but 1 weights"):
        algebra.weighted_sum([factors(), factors()], [1.0])
    with pytest.raises(LoralloyError, match="no factors given"):
        algebra.weighted_sum([], [])
