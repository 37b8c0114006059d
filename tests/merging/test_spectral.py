"""TSV-M, Iso-C and Iso-CTS against dense references of their papers, and the laws that they obey."""

from __future__ import annotations

import dense
import pytest
import torch
from dense import deltas, make_stack, stacks, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import relative
from loralloy.merging.iso_c import RULE as ISO_C
from loralloy.merging.iso_cts import RULE as ISO_CTS
from loralloy.merging.rule import Rule
from loralloy.merging.stack import LowRank, Stack
from loralloy.merging.subspace import span
from loralloy.merging.tsv_m import RULE as TSV_M

RULES = [TSV_M, ISO_C, ISO_CTS]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
quick = settings(max_examples=40, deadline=None)


def run(rule: Rule, stack: Stack) -> LowRank:
    return rule.function(stack, **rule.values)


def reference(rule: Rule, stack: Stack, module: int) -> torch.Tensor:
    dws, weights = deltas(stack, module), weights_of(stack, module)
    if rule.name == "tsv_m":
        return dense.tsv_m(dws, weights, [max(1, int(rule.values["keep"] * r + 1e-9)) for r in stack.ranks])
    r = min(sum(stack.ranks), *stack.shape)
    r = min(r, rule.values["directions"] or r)
    if rule.name == "iso_c":
        return dense.iso_c(dws, weights, r)
    return dense.iso_cts(dws, weights, r, rule.values["common"])


def agrees(rule: Rule, stack: Stack, within: float) -> None:
    got = run(rule, stack)
    assert got.A.dtype == got.B.dtype == stack.dtype
    assert got.rank <= sum(stack.ranks)
    for module in range(stack.modules):
        assert relative(got.dense()[module], reference(rule, stack, module)) < within


# -- against the papers ------------------------------------------------------------------------------------------------


@quick
@given(stacks(), st.sampled_from([0.25, 0.5, 1.0]))
def test_tsv_m_is_the_papers(stack, keep):
    agrees(TSV_M(keep=keep), stack, 1e-8)


@quick
@given(stacks(), st.sampled_from([0, 1, 3, 100]))
def test_iso_c_is_the_papers(stack, directions):
    agrees(ISO_C(directions=directions), stack, 1e-8)


@quick
@given(stacks(), st.sampled_from([0, 4, 100]), st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_iso_cts_is_the_papers(stack, directions, common):
    agrees(ISO_CTS(directions=directions, common=common), stack, 1e-8)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_has_only_its_own_rounding(rule, dtype):
    """The small matrices are float64: the result is as exact as float32 factors can say it."""
    for seed in range(5):
        stack = make_stack(40, 30, (8, 5, 3), seed=seed, dtype=dtype)
        assert stack.dtype == torch.float32
        agrees(rule, stack, 1e-6)


# -- laws --------------------------------------------------------------------------------------------------------------


def turned(stack: Stack, seed: int = 7) -> Stack:
    """The same dW in another gauge, (G A, B G^-1)."""
    gauges = [
        torch.randn(stack.modules, r, r, generator=torch.Generator().manual_seed(seed + r)).double()
        for r in stack.ranks
    ]
    return stack.with_factors(
        [g @ a for g, a in zip(gauges, stack.A, strict=True)],
        [torch.linalg.solve(g, b, left=False) for g, b in zip(gauges, stack.B, strict=True)],
    )


@every_rule
@settings(max_examples=25, deadline=None)
@given(stacks())
def test_gauge_does_not_matter(rule, stack):
    assert relative(run(rule, turned(stack)).dense(), run(rule, stack).dense()) < 1e-7


@every_rule
@settings(max_examples=25, deadline=None)
@given(stacks(), st.randoms(use_true_random=False))
def test_order_does_not_matter(rule, stack, random):
    order = random.sample(range(stack.adapters), stack.adapters)
    other = Stack(
        tuple(stack.A[i] for i in order), tuple(stack.B[i] for i in order),
        stack.scaling[order], stack.weights[order], stack.keys[order],
    )  # fmt: skip
    assert relative(run(rule, other).dense(), run(rule, stack).dense()) < 1e-7


@every_rule
@pytest.mark.parametrize("scale", [1e-9, 1e7])
def test_the_result_scales_with_dw(rule, scale):
    """No absolute limits: c dW_i gives c dW."""
    stack = make_stack(dtype=torch.float32)
    other = stack.with_factors(stack.A, stack.B, stack.scaling * scale)
    assert relative(run(rule, other).dense() / scale, run(rule, stack).dense()) < 1e-6


@every_rule
def test_modules_do_not_meet(rule):
    """A batch is its modules one by one; the same bytes each time."""
    stack = make_stack(modules=4, ranks=(3, 9, 2))
    got = run(rule, stack)
    for module in range(4):
        alone = run(rule, stack.only(slice(module, module + 1))).dense()[0]
        assert relative(got.dense()[module], alone) < 1e-10
    again = run(rule, stack)
    assert torch.equal(got.A, again.A) and torch.equal(got.B, again.B)


@every_rule
def test_a_zero_adapter_is_absent(rule):
    """Zero B, as at initialisation, or weight 0; in one module of the batch only."""
    two, three = make_stack(20, 16, (4, 3)), make_stack(20, 16, (4, 3, 5))
    b, weights = [*two.B, three.B[2].clone()], torch.cat([two.weights, three.weights[2:]])
    b[2][0] = 0
    weights[2, 1] = 0
    scaling = torch.cat([two.scaling, three.scaling[2:]])
    stack = Stack((*two.A, three.A[2]), tuple(b), scaling, weights, three.keys)
    assert relative(run(rule, stack).dense(), run(rule, two).dense()) < 1e-10
    first = Stack(stack.A[::-1], stack.B[::-1], scaling.flip(0), weights.flip(0), three.keys)
    assert relative(run(rule, first).dense(), run(rule, two).dense()) < 1e-10


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_zero_is_zero(rule, dtype):
    stack = make_stack(dtype=dtype)
    nothing = stack.with_factors(stack.A, [torch.zeros_like(b) for b in stack.B])
    assert not run(rule, nothing).dense().any()
    absent = Stack(stack.A, stack.B, stack.scaling, torch.zeros_like(stack.weights), stack.keys)
    assert not run(rule, absent).dense().any()


@settings(max_examples=25, deadline=None)
@given(stacks())
def test_tsv_m_of_one_adapter_is_itself(stack):
    one = Stack(stack.A[:1], stack.B[:1], stack.scaling[:1], torch.ones_like(stack.weights[:1]), stack.keys[:1])
    assert relative(run(TSV_M, one).dense(), one.weighted_sum().dense()) < 1e-9


def test_tsv_m_of_orthogonal_adapters_is_the_sum():
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(2, 12, 12, generator=g, dtype=torch.float64)).Q
    stack = make_stack(12, 12, (3, 4))
    apart = stack.with_factors(
        [stack.A[0][:, :, :3] @ q[:, :3], stack.A[1][:, :, :4] @ q[:, 3:7]],
        [q[:, :, :3] @ stack.B[0][:, :3], q[:, :, 3:7] @ stack.B[1][:, :4]],
    )
    assert relative(run(TSV_M, apart).dense(), apart.weighted_sum().dense()) < 1e-10


@settings(max_examples=25, deadline=None)
@given(stacks())
def test_iso_c_flattens_and_keeps_the_sum(stack):
    """All singular values equal; their sum is the weighted sum's."""
    got = torch.linalg.svdvals(run(ISO_C, stack).dense())
    want = torch.linalg.svdvals(stack.weighted_sum().dense())
    live = min(sum(stack.ranks), *stack.shape)
    assert torch.allclose(got.sum(1), want.sum(1), rtol=1e-9)
    assert torch.allclose(got[:, :live], got[:, :1], rtol=1e-9)
    assert (got[:, live:] <= 1e-9 * got[:, :1]).all()


def test_width_divides_by_the_width():
    """mean="width" is the mean over min(out, in) singular values, zeros included."""
    stack = make_stack(30, 20, (3, 2))
    for rule in (ISO_C, ISO_CTS):
        wide, plain = run(rule(mean="width"), stack).dense(), run(rule, stack).dense()
        assert relative(wide * 20 / 5, plain) < 1e-9


@pytest.mark.parametrize("rule", [ISO_C, ISO_CTS], ids=lambda r: r.name)
def test_directions_are_the_rank(rule):
    stack = make_stack(30, 20, (6, 5))
    got = torch.linalg.svdvals(run(rule(directions=4), stack).dense())
    assert torch.allclose(got[:, :4], got[:, :1], rtol=1e-9)
    assert (got[:, 4:] < 1e-9 * got[:, :1]).all()


def test_iso_cts_with_all_common_is_iso_c():
    stack = make_stack(30, 20, (6, 5))
    assert relative(run(ISO_CTS(common=1.0), stack).dense(), run(ISO_C, stack).dense()) < 1e-9


# -- hard cases --------------------------------------------------------------------------------------------------------


def copies(difference: float, dtype: torch.dtype = torch.float32) -> Stack:
    """Two adapters that are equal but for a relative difference, weights 0.6 and 0.4, and a third."""
    stack = make_stack(40, 30, (6, 6, 4), weights=(0.6, 0.4, 1.0))
    g = torch.Generator().manual_seed(1)
    near = [
        x[0] * (1 + difference * torch.randn(x[0].shape, generator=g, dtype=torch.float64)) for x in (stack.A, stack.B)
    ]
    scaling = stack.scaling[[0, 0, 2]]
    a, b = ([x[0].to(dtype), y.to(dtype), x[2].to(dtype)] for x, y in zip((stack.A, stack.B), near, strict=True))
    return Stack(tuple(a), tuple(b), scaling, stack.weights, stack.keys)


@every_rule
def test_copies_to_rounding_are_copies(rule):
    """A difference of 1e-7 is float32's rounding: not a direction to raise."""
    same, near = copies(0.0), copies(1e-7)
    assert not torch.equal(same.B[0], near.B[1])
    assert relative(run(rule, near).dense(), run(rule, same).dense()) < 1e-5


def test_a_copy_shares_its_directions():
    """tsv_m of two copies, weights w and v: the mean of w dW and v dW. iso_c: as one adapter of weight w + v."""
    stack = copies(0.0)
    pair = Stack(stack.A[:2], stack.B[:2], stack.scaling[:2], stack.weights[:2], stack.keys[:2])
    one = Stack(stack.A[:1], stack.B[:1], stack.scaling[:1], torch.ones_like(stack.weights[:1]), stack.keys[:1])
    whole = one.weighted_sum().dense()
    assert relative(run(TSV_M, pair).dense(), 0.5 * whole) < 1e-6
    assert relative(run(ISO_C, pair).dense(), run(ISO_C, one).dense()) < 1e-6


def test_larger_differences_are_the_papers():
    """In float64 a difference of 1e-4 is data: TSV-M raises it to full strength, as its formula says."""
    stack = copies(1e-4, torch.float64)
    agrees(TSV_M, stack, 1e-6)
    assert relative(run(TSV_M, stack).dense(), run(TSV_M, copies(0.0, torch.float64)).dense()) > 0.1


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 3), (torch.float64, 4)])
def test_a_direction_that_rounding_could_have_turned_is_not_raised(dtype, rank):
    """One direction of 1e-5 of the largest: rounding to float32 may turn it by 0.01 rad, to float64 not."""
    q = torch.linalg.qr(make_stack(20, 20, (4,), modules=1).B[0]).Q
    strengths = torch.tensor([2.0, 1.0, 0.5, 2e-5]).double()
    one = torch.ones(1, 1).double()
    stack = Stack(((q * strengths).mT.to(dtype),), (q.to(dtype),), one, one, torch.zeros(1, 1).long())
    got = torch.linalg.svdvals(run(ISO_C, stack).dense()[0])
    assert int((got > 1e-3 * got[0]).sum()) == rank
    assert relative(run(TSV_M, stack).dense(), stack.weighted_sum().dense()) < 1e-6  # which raises nothing here


@every_rule
def test_an_adapter_whose_terms_cancel_is_absent(rule):
    """B = [b, b + rounding], A = [a; -a]: what is left of dW is rounding, not directions."""
    two, three = make_stack(20, 16, (4, 3), dtype=torch.float32), make_stack(20, 16, (4, 3, 1), dtype=torch.float32)
    b = torch.cat([three.B[2], three.B[2] * (1 + 6e-8)], 2)
    a = torch.cat([three.A[2], -three.A[2]], 1)
    scaling, weights = (torch.cat([x, y[2:]]) for x, y in ((two.scaling, three.scaling), (two.weights, three.weights)))
    stack = Stack((*two.A, a), (*two.B, b), scaling, weights, three.keys)
    assert relative(run(rule, stack).dense(), run(rule, two).dense()) < 1e-6


@every_rule
def test_signs_are_fixed(rule):
    """The largest entry of each column of B is positive, whatever the signs that a decomposition chose."""
    b = run(rule, make_stack(40, 30, (6, 5))).B
    assert (b.gather(1, b.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("rule", [ISO_C, ISO_CTS], ids=lambda r: r.name)
def test_what_cancels_is_not_raised(rule):
    """dW - dW': what rounding leaves of a cancelled sum has no directions."""
    stack = copies(1e-7)
    pair = Stack(
        stack.A[:2], stack.B[:2], stack.scaling[:2], torch.tensor([[1.0], [-1.0]]).double().repeat(1, 2), stack.keys[:2]
    )
    got = run(rule, pair).dense()
    assert torch.isfinite(got).all()
    if rule is ISO_C:
        assert not got.any()


@every_rule
def test_a_bad_gauge_is_survived(rule):
    """Factors whose columns differ by 1e4 each way, dependent columns, a rank of 6 with 4 directions."""
    stack = make_stack(40, 30, (6, 5), dtype=torch.float32)
    g = torch.tensor([1e4, 1e-4, 1.0, 1e2, 3.0, 1e-3])[:, None]
    a, b = stack.A[0] * g, stack.B[0] / g.T
    assert (
        relative(run(rule, stack.with_factors([a, stack.A[1]], [b, stack.B[1]])).dense(), run(rule, stack).dense())
        < 1e-5
    )
    b = torch.cat([stack.B[0][:, :, :4], stack.B[0][:, :, :2]], 2)
    lean = stack.with_factors([stack.A[0], stack.A[1]], [b, stack.B[1]])
    a = torch.cat([stack.A[0][:, :2] + stack.A[0][:, 4:], stack.A[0][:, 2:4]], 1)
    same = stack.with_factors([a, stack.A[1]], [stack.B[0][:, :, :4], stack.B[1]])
    if rule is not ISO_CTS:  # whose split is of the nominal ranks
        assert relative(run(rule, lean).dense(), run(rule, same).dense()) < 1e-5
    assert torch.isfinite(run(rule, lean).dense()).all()


def test_the_careful_path_is_taken_where_columns_are_dependent():
    """Cholesky for sound modules, QR for the others of the batch; float64 and ranks above the width always by QR."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 6, generator=g)
    assert span(x).careful == 0
    x[1, :, 5] = x[1, :, 2] * (1 + 1e-7 * torch.randn(20, generator=g))
    for columns, careful in ((x, 1), (x.double(), 3), (torch.randn(2, 4, 6, generator=g), 2)):
        found = span(columns)
        assert found.careful == careful
        eye = torch.eye(columns.shape[2], dtype=torch.float64).expand(columns.shape[0], -1, -1)
        q = found.lift(eye)
        assert relative(q @ found.r, columns) < 1e-7
        gram = q.mT @ q
        assert relative(gram @ gram, gram) < 1e-5  # orthonormal columns or zeros: a projection
