"""Conflicts judged on activations: against dense float64 references on the inputs themselves, and the laws that hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense import deltas, make_stack, stacks, svd, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import adapter, factors, generator, relative
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.merging import Tada, make_plan, merge, run
from loralloy.merging.stack import Stack
from loralloy.merging.tada import resolve, watched
from loralloy.weights import Weights

every = pytest.mark.parametrize("conflict", ["shared", "cosine", "opposed", "output"])
thresholds = st.sampled_from([0.0, 0.1, 0.35])
some = settings(max_examples=20, deadline=None)


def inputs(stack: Stack, tokens: int = 30, seed: int = 0) -> Tensor:
    """[L, tokens, in], directions of unlike strength, not centred."""
    g = generator(seed)
    wide = stack.shape[1]
    x = torch.randn(stack.modules, tokens, wide, generator=g, dtype=torch.float64) + 0.5
    return x @ (torch.randn(wide, wide, generator=g, dtype=torch.float64) * torch.linspace(0.3, 2, wide))


def moments(stack: Stack, x: Tensor) -> Tensor:
    answers = x @ torch.cat([a.double() for a in stack.A], 1).mT
    return answers.mT @ answers / x.shape[1]


def reference(stack: Stack, module: int, x: Tensor, conflict: str, threshold: float) -> Tensor:
    """The docstring of `resolve`, component after component, from what the dW answer to x [tokens, in]."""
    dws = [w * d for w, d in zip(weights_of(stack, module), deltas(stack, module), strict=True)]
    triplets = [svd(d) for d in dws]
    parts = []
    for i, (us, ss, vs) in enumerate(triplets):
        parts += [(i, us[:, k], float(ss[k]), vs[:, k], x @ vs[:, k]) for k in range(ss.numel())]

    def corr(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    def size(part: tuple) -> float:
        return part[2] * float(part[4].square().mean().sqrt())

    def side(part: tuple) -> float:
        return size(part) + sum(
            max(0.0, size(o) * float(part[1] @ o[1]) * corr(part[4], o[4])) for o in parts if o[0] != part[0]
        )

    total = torch.zeros_like(dws[0])
    for part in parts:
        i, u, s, v, y = part
        rest = sum((d for j, d in enumerate(dws) if j != i), torch.zeros_like(dws[0]))
        reach = float(y.square().mean().sqrt())
        net = float(((x @ rest.T @ u) * y).mean()) / reach  # what of the others' answer along u follows y
        others = [o for o in parts if o[0] != i]
        b = s
        if conflict == "opposed" and -net > threshold * size(part):
            b = 0.0
        if conflict == "shared" and -net > threshold * size(part):
            against = [(max(0.0, -size(o) * float(u @ o[1]) * corr(y, o[4])), side(o) ** 2) for o in others]
            mine = side(part) ** 2
            yields = sum(a * mine / (mine + other) for a, other in against) / sum(a for a, _ in against)
            b = s - yields * net / reach
        for o in others if conflict in ("cosine", "output") else ():
            c, rho = float(u @ o[1]), corr(y, o[4])
            hit = c * rho < -threshold if conflict == "cosine" else abs(c) * max(0, 1 - rho**2) ** 0.5 > threshold
            if hit and size(o) >= size(part):
                b = 0.0
        total += b * torch.outer(u, v)
    return total


@every
@some
@given(stacks(), thresholds)
def test_it_is_what_the_docstring_says(conflict, stack, threshold):
    x = inputs(stack)
    got, found = resolve(stack, conflict, threshold, moments(stack, x))
    for module in range(stack.modules):
        want = reference(stack, module, x[module], conflict, threshold)
        assert relative(got.dense()[module], want) < 1e-7
        exact = sum(w * d for w, d in zip(weights_of(stack, module), deltas(stack, module), strict=True))
        assert float(found.removed[module]) == pytest.approx(float((exact - want).norm()), rel=1e-6, abs=1e-6)


@every
@some
@given(stacks(), thresholds, st.sampled_from([1e-3, 1.0, 1e4]))
def test_gauge_and_the_size_of_inputs_do_not_matter(conflict, stack, threshold, size):
    x, g = inputs(stack), generator(5)
    gauges = [
        torch.randn(stack.modules, r, r, generator=g, dtype=torch.float64) + 3 * torch.eye(r) for r in stack.ranks
    ]
    turned = stack.with_factors(
        [m @ a for m, a in zip(gauges, stack.A, strict=True)],
        [torch.linalg.solve(m, b, left=False) for m, b in zip(gauges, stack.B, strict=True)],
    )
    one = resolve(stack, conflict, threshold, moments(stack, x))[0].dense()
    other = resolve(turned, conflict, threshold, moments(turned, size * x))[0].dense()
    assert relative(other, one) < 1e-6


@every
def test_inputs_that_are_even_in_all_directions_judge_as_dw_does(conflict):
    for seed in range(4):
        stack = make_stack(9, 7, (3, 2), seed=seed)
        even = torch.linalg.qr(torch.randn(2, 40, 7, generator=generator(seed), dtype=torch.float64)).Q
        got = resolve(stack, conflict, 0.05, moments(stack, even))[0].dense()
        assert relative(got, resolve(stack, conflict, 0.05)[0].dense()) < 1e-9


def test_opposition_that_no_input_meets_is_none_and_the_hidden_one_is_seen():
    """Adapter 1 reads e0, adapter 2 -e0 + 9 e1, into one output. In dW they hardly oppose; where x1 is 0 they cancel."""
    e, f = torch.eye(4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    ones = torch.ones(2, 1, dtype=torch.float64)
    a = (f[:1][None], (-f[0] + 9 * f[1])[None, None])
    b = (e[0][None, :, None], 0.9 * e[0][None, :, None])
    stack = Stack(a, b, ones, ones.clone(), torch.zeros(2, 1, dtype=torch.int64))
    along = torch.zeros(1, 8, 3, dtype=torch.float64)
    along[..., 0] = torch.linspace(-1, 1, 8)
    apart = along + torch.tensor([0.0, 50.0, 0.0], dtype=torch.float64)
    assert int(resolve(stack, "cosine", 0.5)[1].dropped.sum()) == 0
    assert resolve(stack, "cosine", 0.5, moments(stack, along))[1].dropped.flatten().tolist() == [0, 1]
    assert int(resolve(stack, "cosine", 0.5, moments(stack, apart))[1].dropped.sum()) == 0


def test_directions_that_no_input_has_are_left_as_they_are():
    stack = make_stack(8, 6, (3, 2), seed=1)
    for conflict in ("shared", "cosine", "opposed"):
        got, found = resolve(stack, conflict, 0.0, torch.zeros(2, 5, 5))
        assert relative(got.dense(), resolve(stack, "none")[0].dense()) < 1e-10 and float(found.removed.max()) < 1e-9


def test_one_adapter_loses_nothing_and_owned_is_refused():
    stack = make_stack(12, 10, (4, 3))
    alone = replace(stack, weights=stack.weights * torch.tensor([[1.0], [0.0]]))
    x = moments(stack, inputs(stack))
    want = torch.stack([weights_of(stack, m)[0] * deltas(stack, m)[0] for m in range(stack.modules)])
    for conflict in ("shared", "cosine", "opposed", "output"):
        assert relative(resolve(alone, conflict, 0.0, x)[0].dense(), want) < 1e-10
    with pytest.raises(LoralloyError, match="judges no component"):
        resolve(stack, "owned", 0.1, x)


def test_in_the_engine_every_module_gets_its_own_moments():
    shapes = {"x": (24, 20), "z": (10, 30), "y": (24, 20)}
    bank = Bank(
        adapter({m: factors(*shape, r, 10 * i + j) for j, (m, shape) in enumerate(shapes.items())}, n)
        for i, (n, r) in enumerate((("task", 4), ("domain", 3)))
    )
    weights = Weights({"task": 1.0, "domain": {"x": 0.5, "y": 1.5, "z": -1.0}})
    own = {
        m: torch.randn(50, shapes[m][1], generator=generator(k)).double()
        * 3.0 ** torch.randn(shapes[m][1], generator=generator(k))
        for k, m in enumerate(shapes)
    }
    made = {}
    for m in shapes:
        answers = own[m] @ torch.cat([bank[n][m].A for n in bank.names]).double().T
        made[m] = answers.T @ answers / 50
    plan = make_plan(bank, weights, Tada(conflict="shared", threshold=0.0), rank="full")
    seen: list = []
    rule = watched(plan.rule, seen, [made[m] for m in plan.modules])
    merged = run(replace(plan, rule=rule), bank)
    assert merged.report.rule.startswith("tada_on_activations(")
    plain = merge(bank, weights, Tada(conflict="shared", threshold=0.0), rank="full").adapter
    for m in shapes:
        parts = [bank[n][m] for n in bank.names]
        ones = torch.tensor([[f.scaling] for f in parts]).double()
        stack = Stack(
            tuple(f.A[None].double() for f in parts), tuple(f.B[None].double() for f in parts), ones,
            torch.tensor([[weights.of(n, m)] for n in bank.names]).double(), torch.zeros(2, 1, dtype=torch.int64),
        )  # fmt: skip
        want = resolve(stack, "shared", 0.0, made[m][None])[0].dense()[0]
        assert relative(merged.adapter[m].dense(), want) < 1e-5
        assert relative(plain[m].dense(), want) > 1e-3
