"""What a step through a Learnable costs in operations, and its gradients where modules and adapters differ."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import PROJECTIONS, adapter, factors, peft_folder, tiny_llama
from loralloy.bank import Bank
from loralloy.live.learnable import Learnable
from loralloy.merging import DareTies, Ties, basis, merge
from loralloy.weights import Weights

IDS = torch.arange(3, 27).reshape(3, 8)
VIEWS = {
    "view", "_unsafe_view", "t", "permute", "transpose", "unsqueeze", "detach", "unbind", "select", "slice",
    "split_with_sizes", "expand",
}  # fmt: skip
HAVE = {"a": ["one", "two", "four"], "b": ["two", "three"], "c": ["one", "three", "four"]}


def named(value: object) -> str | None:
    return getattr(value, "name", None)


class Count(TorchDispatchMode):
    """Counts operations, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(n for name, n in self.found.items() if name not in VIEWS)


class Four(nn.Module):
    def __init__(self, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 6, dtype=dtypes[0]), nn.Linear(6, 6, dtype=dtypes[1])
        self.three, self.four = nn.Linear(6, 6, dtype=dtypes[1]), nn.Linear(6, 6, bias=False, dtype=dtypes[0])

    def forward(self, x):
        for module in (self.one, self.two, self.three, self.four):
            x = torch.tanh(module(x.to(module._parameters["weight"].dtype)))
        return x


def bank_of(space: str, have: dict[str, list[str]] = HAVE, dtype: torch.dtype = torch.float64) -> Bank:
    ranks = dict.fromkeys(have, 2) if space == "factors" else {"a": 1, "b": 2, "c": 4}
    return Bank(
        adapter({m: factors(6, 6, ranks[n], 9 * i + j, 0.4, dtype) for j, m in enumerate(mine)}, n)
        for i, (n, mine) in enumerate(have.items())
    )


@pytest.mark.parametrize("have", [HAVE, {"c": HAVE["c"]}], ids=["three", "one"])
@pytest.mark.parametrize(("rule", "space"), [
    ("linear", "delta"), ("linear", "factors"), (Ties(density=0.5), "delta"), (DareTies(density=0.7), "factors"),
    (Ties(density=0.5), "core"),
], ids=named)  # fmt: skip
def test_adapters_that_lack_modules(rule, space, have):
    """Mixed ranks outside factors space; coefficients of both signs, by module and for all: finite differences, float64."""
    model, bank = Four(), bank_of(space, have)
    live, g = Learnable(model, bank, rule, space), torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, generator=g, dtype=torch.float64)

    def loss(table):
        with live.at(table):
            return model(x).square().mean()

    n = len(bank.names)
    table = torch.randn(len(bank.modules), n, generator=g, dtype=torch.float64).requires_grad_()
    row = torch.randn(n, generator=g, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, (table,)) and torch.autograd.gradcheck(loss, (row,))
    assert torch.equal(torch.autograd.grad(loss(table), table)[0] != 0, live.present)
    for found in (table.detach(), row.detach().expand(len(bank.modules), n)):
        weights = {
            name: {m: float(w[i]) for m, w in zip(bank.modules, found, strict=True) if m in bank[name]}
            for i, name in enumerate(bank.names)
        }
        merged = merge(bank, Weights(weights), rule, space, "full", torch.float64).adapter
        want = Four()
        with torch.no_grad():
            for m in bank.modules:
                getattr(want, m).weight += merged[m].dense(torch.float64)
            truth = float(want(x).square().mean())
        for given in (found, found.clone().requires_grad_()):
            assert float(loss(given).detach()) == pytest.approx(truth, rel=1e-11)
    live.remove()


@pytest.mark.parametrize(("rule", "space"), [("linear", "delta"), ("linear", "factors"), ("ties", "delta")])
def test_a_model_of_two_dtypes(rule, space):
    """Modules whose terms are of other dtypes are not made together; each still gets its own row's gradient."""
    x, grads = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), []
    table = torch.tensor([[0.5, -0.4, 1.1], [0.3, 0.6, 0.8], [0.2, 0.9, -0.7], [1.2, 0.1, 0.6]], dtype=torch.float64)
    for dtypes in ((torch.float64, torch.float64), (torch.float64, torch.float32)):
        model = Four(dtypes)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float32))
        live, w = Learnable(model, bank_of(space), rule, space), table.clone().requires_grad_()
        with live.at(w):
            model(x).double().square().mean().backward()
        grads.append(w.grad)
        live.remove()
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-6) and bool((grads[0] != 0).any(1).all())


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_a_coefficient_of_zero_in_factors_space(rule):
    model, bank = Four(), bank_of("factors")
    live = Learnable(model, bank, rule, "factors")
    table = torch.tensor([0.0, 0.7, -0.3], dtype=torch.float64, requires_grad=True)
    with live.at(table):
        model(torch.ones(2, 6, dtype=torch.float64)).square().sum().backward()
    assert table.grad[0] == 0 and bool((table.grad[1:] != 0).all()) and bool(torch.isfinite(table.grad).all())
    live.remove()


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_a_weight_is_rounded_once(space):
    """W0 + dW without gradients: of 16-bit terms, added in float32, and the same where autocast is on."""
    model, bank = Four((torch.float32, torch.float32)), bank_of(space, dtype=torch.float32)
    live, w = Learnable(model, bank, "linear", space, dtype=torch.bfloat16), torch.tensor([0.7, -0.4, 1.1])
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on), live.at(w):
            found.append(model.two.weight.clone())
    one = next(p.basis for p, m in zip(live._parts, live.modules, strict=True) if m == "two")
    if space == "factors":
        signed, root = (w[:2].abs().sqrt() * w[:2].sign())[:, None, None], w[:2].abs().sqrt()[:, None, None]
        a, b = (t.values.float() for t in one.terms)
        dense = (b * root).sum(0) @ (a * signed).sum(0)
    else:
        dense = (one.B.float() * w[one.owner]) @ one.A.float()
    live.remove()
    assert torch.equal(*found)
    assert torch.allclose(found[0], model.two.weight + dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "space", "ahead", "set_"), [
    ("linear", "delta", 4, 0), ("linear", "factors", 3, 0), (Ties(density=0.5), "factors", 3, 0),
    (Ties(density=0.5), "delta", 0, 1), (DareTies(density=0.5), "delta", 0, 1),
], ids=named)  # fmt: skip
def test_operations_of_a_step(rule, space, ahead, set_, dtype, fused, tmp_path, monkeypatch):
    """Small operations bound a step, so what each module adds is counted: going forward, and where the table is set.

    In bfloat16 the weighted sum's coefficients are multiplied in float32 (one more), and a sum of 16-bit dense terms adds
    one adapter after the other, so that it is not counted.
    """
    if dtype == torch.bfloat16:
        if space == "delta" and rule != "linear":
            pytest.skip("adds one adapter after the other")
        ahead += space == "delta"
    if fused:  # as on a GPU
        monkeypatch.setattr(basis, "FUSED", ("cpu",))
        ahead -= bool(ahead)
    model = tiny_llama(layers=3).to(dtype)
    for seed, name in enumerate("abc"):
        peft_folder(model, tmp_path / name, seed + 1, target_modules=PROJECTIONS, r=2)
    live = Learnable(model, Bank.load(tmp_path), rule, space, dtype=dtype)
    many = len(live.modules)
    assert many == 3 * len(PROJECTIONS)
    table = torch.full((3,), 0.5, requires_grad=True)
    with Count() as plain:
        model(input_ids=IDS)
    with Count() as setting:
        live.set(table)
    with Count() as forward:
        model(input_ids=IDS)
    live.set(None)
    shapes = 50  # a few for each shape, however many modules have it
    assert setting.total <= set_ * many + shapes
    assert forward.total <= plain.total + ahead * many
    live.remove()
