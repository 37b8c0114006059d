"""The bank in a model under a table of coefficients: the merged model's logits, exact gradients, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import (
    BASE,
    PROJECTIONS,
    ConvNet,
    Nest,
    adapter,
    close,
    factors,
    load_in_peft,
    logits,
    peft_folder,
    tiny_gpt2,
    tiny_llama,
)  # fmt: skip
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.live.learnable import Learnable
from loralloy.merging import DareTies, Ties, merge
from loralloy.weights import Weights

IDS = torch.arange(3, 27).reshape(3, 8)
RULES = [
    ("linear", "delta"), ("linear", "factors"), (Ties(density=0.4), "delta"), (Ties(density=0.4), "factors"),
    (Ties(density=0.4), "knots"), (DareTies(density=0.5), "core"), (Ties(vote="weighted"), "delta"),
]  # fmt: skip
NAMED = [f"{getattr(rule, 'name', rule)}-{space}" for rule, space in RULES]


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("bank")
    peft_folder(base, root / "a", 1, target_modules=["q_proj", "v_proj"], r=3)
    peft_folder(base, root / "b", 2, target_modules=PROJECTIONS, r=3, use_rslora=True)
    peft_folder(base, root / "c", 3, target_modules=["lm_head", "down_proj", "q_proj"], r=3)
    return Bank.load(root)


def by_module(live, table):
    """Weights of a table."""
    return Weights(
        {
            n: {m: float(table[j, i]) for j, m in enumerate(live.modules) if live.present[j, i]}
            for i, n in enumerate(live.names)
        }
    )


def random_table(live, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(len(live.modules), len(live.names), generator=g, dtype=dtype) + 0.3


@pytest.mark.parametrize(("rule", "space"), RULES, ids=NAMED)
def test_it_is_the_merged_model(rule, space, base, bank, tmp_path):
    live = Learnable(base, bank, rule, space)
    table = random_table(live)
    merge(bank, by_module(live, table), rule, space, "full").adapter.save(tmp_path / "m")
    want, plain = logits(load_in_peft(base, tmp_path / "m"), IDS), logits(base, IDS)
    assert float((want - plain).abs().max()) > 1e-2
    with live.at(table) as model:
        assert close(logits(model, IDS), want)
    with live.at(by_module(live, table)) as model:
        assert close(logits(model, IDS), want)
    with live.at(table.clone().requires_grad_()) as model:  # what is learned through is what is evaluated
        got = model(input_ids=IDS).logits
        assert got.requires_grad and close(got.detach(), want)
    live.remove()
    assert torch.equal(logits(base, IDS), plain)


def test_one_row_is_for_all_modules(base, bank):
    live = Learnable(base, bank, "ties")
    w = torch.tensor([0.5, -1.0, 0.8])
    with live.at(w) as model:
        one = logits(model, IDS)
    with live.at(w.expand(len(live.modules), 3)) as model:
        assert torch.equal(logits(model, IDS), one)
    with live.at(Weights(dict(zip(live.names, w.tolist(), strict=True)))) as model:
        assert torch.equal(logits(model, IDS), one)
    live.remove()


@pytest.mark.parametrize(("rule", "space"), RULES, ids=NAMED)
def test_gradients_through_the_model(rule, space):
    """Of a loss in every coefficient of the table, against finite differences, float64 (a Llama's norms are float32)."""
    model, wide = Nest().double(), torch.float64
    parts = {
        n: {m: factors(6, 6, 2, s + k, 1.0, wide) for k, m in enumerate(("lin", "block.lin"))}
        for s, n in ((1, "a"), (5, "b"))
    }
    live = Learnable(model, Bank([adapter(p, n) for n, p in parts.items()]), rule, space)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=wide)

    def loss(table):
        with live.at(table):
            return model(x).log_softmax(-1)[:, 3].mean()

    table = random_table(live, 1, wide).requires_grad_()
    assert torch.autograd.gradcheck(loss, (table,))
    assert bool((torch.autograd.grad(loss(table), table)[0] != 0).all())  # each module's row is its own
    assert torch.autograd.gradcheck(loss, (torch.tensor([0.4, 1.1], dtype=wide, requires_grad=True),))
    live.remove()


def test_the_models_parameters_stay_what_they_are(base, bank):
    before = {k: v.clone() for k, v in base.state_dict().items()}
    parameters = {k: id(v) for k, v in base.named_parameters()}
    live = Learnable(base, bank, "ties")
    table = random_table(live).requires_grad_()
    with live.at(table) as model:
        base.model.layers[0].self_attn.q_proj._parameters["weight"].requires_grad_(True)
        model(input_ids=IDS).logits.sum().backward()
        assert {k: id(v) for k, v in base.named_parameters()} == parameters
        assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert table.grad is not None
    assert base.model.layers[0].self_attn.q_proj.weight.grad is None  # no gradient flows to what is under dW
    live.remove()
    assert not any(m._forward_hooks or "weight" in m.__dict__ for m in base.modules())


def test_without_gradients_a_module_computes_once(base, bank):
    """Merged once when set: the module's own forward runs on the sum and nothing runs beside it."""
    for rule, space in (("linear", "delta"), ("ties", "delta"), ("ties", "factors")):
        live = Learnable(base, bank, rule, space)
        q = base.model.layers[0].self_attn.q_proj
        x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
        with live.at(torch.tensor([0.5, 0.4, 0.3])), torch.no_grad():
            assert torch.equal(q(x), nn.functional.linear(x, q.weight))
            assert not torch.equal(q.weight, q._parameters["weight"])
        live.remove()


def test_gpt2(tmp_path):
    """Conv1D holds its weight transposed."""
    model = tiny_gpt2()
    for seed, name in enumerate("ab"):
        peft_folder(model, tmp_path / name, seed, target_modules=["c_attn", "c_fc"], r=2, fan_in_fan_out=True)
    bank = Bank.load([tmp_path / "a", tmp_path / "b"])
    for rule in ("linear", "ties"):
        live = Learnable(model, bank, rule)
        w = torch.tensor([0.6, 0.9], requires_grad=True)
        merge(bank, Weights({"a": 0.6, "b": 0.9}), rule, rank="full").adapter.save(tmp_path / rule)
        want = logits(load_in_peft(model, tmp_path / rule), IDS)
        for table in (w, w.detach()):
            with live.at(table):
                got = model(input_ids=IDS).logits
            assert close(got.detach(), want)
        with live.at(w):
            model(input_ids=IDS).logits.square().sum().backward()
        assert bool((w.grad != 0).all())
        live.remove()


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_embeddings_and_convolutions(rule):
    net, g = ConvNet(), torch.Generator().manual_seed(0)
    conv = LoraFactors(torch.randn(2, 4, 3, 2, generator=g), torch.randn(6, 2, 1, 1, generator=g), 0.5, "conv")
    bank = Bank([adapter({"two": conv, "out": factors(4, 5, 2, 1)}, "a")])
    live, x = Learnable(net, bank, rule), torch.randn(2, 3, 8, generator=g)
    w = torch.tensor([0.8], requires_grad=True)
    dense = {m: live_weight(bank, rule, m) for m in bank.modules}
    with live.at(w):
        got = net(x)
        got.sum().backward()
    live.remove()
    assert float(w.grad.abs().max()) > 0
    with torch.no_grad():
        net.two.weight += dense["two"].view_as(net.two.weight)
        net.out.weight += dense["out"]
        assert close(got.detach(), net(x))

    net = nn.Sequential(nn.Embedding(7, 5))
    word = LoraFactors(torch.randn(2, 7, generator=g), torch.randn(5, 2, generator=g), 0.5, "embedding")
    bank = Bank([adapter({"0": word}, "a")])
    live, ids = Learnable(net, bank, rule), torch.tensor([[1, 4, 6]])
    with live.at(w):
        got = net(ids).detach()
    live.remove()
    assert close(got, (net[0].weight + live_weight(bank, rule, "0").T)[ids].detach())


def live_weight(bank, rule, module):
    """0.8 of the adapter under the rule, dense, by merge()."""
    return merge(bank, Weights({"a": 0.8}), rule, rank="full").adapter[module].dense(torch.float32)


def test_dtypes(base, bank):
    """Terms are float32 on a CPU under a bfloat16 model, or as asked; the module's weight keeps its dtype."""
    model = tiny_llama().bfloat16()
    live, half = Learnable(model, bank, "ties"), None
    q = model.model.layers[0].self_attn.q_proj
    with live.at(torch.full((3,), 0.5)):
        assert q.weight.dtype == torch.bfloat16
        half = logits(model, IDS)
    live.remove()
    live_sum, name = Learnable(model, bank, "linear"), "model.layers.0.self_attn.q_proj"
    with live_sum.at(torch.full((3,), 0.5)):
        dense = sum(0.5 * a[name].dense(torch.float64) for a in bank.values())
        assert torch.equal(q.weight, (q._parameters["weight"].double() + dense).bfloat16())  # rounded once
    live_sum.remove()
    small = Learnable(model, bank, "ties", dtype=torch.bfloat16)
    assert small.nbytes * 2 == live.nbytes
    w = torch.full((3,), 0.5, requires_grad=True)
    with small.at(w):
        got = model(input_ids=IDS).logits
        got.float().square().mean().backward()
    assert w.grad.dtype == torch.float32 and bool((w.grad != 0).all())
    assert close(got.detach().float(), half.float(), 0.05)
    small.remove()


def test_refusals(base, bank):
    with pytest.raises(LoralloyError, match="'tsv_m' cannot be learned through"):
        Learnable(base, bank, "tsv_m")
    with pytest.raises(LoralloyError, match=r"has module 'model\.layers\.1\.\S+', which the model does not"):
        Learnable(tiny_llama(layers=1), bank)
    with pytest.raises(LoralloyError, match="the loaded model is other/model"):
        Learnable(base, bank, base=BaseRef("other/model"))
    Learnable(base, bank, base=BaseRef(BASE)).remove()
    live = Learnable(base, bank)
    with pytest.raises(LoralloyError, match="there is no adapter 'z'"):
        live.set(Weights({"z": 1.0}))
    live.set(torch.full((3,), 0.5))
    with pytest.raises(LoralloyError, match="holds another composition already"):
        Learnable(base, bank)
    live.remove()
    assert not any(m._forward_hooks for m in base.modules())

    model = tiny_llama()
    for compiled in (torch.compile(model, backend="eager"), model):
        with pytest.raises(LoralloyError, match=r"is compiled, .* before torch\.compile"):
            Learnable(compiled, bank)
        model.compile(backend="eager")
    model = tiny_llama()
    q = model.model.layers[0].self_attn.q_proj
    q.weight = nn.Parameter(q.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(LoralloyError, match="is a quantised Linear; load the model in float32 or bfloat16"):
        Learnable(model, bank)


@pytest.mark.parametrize(("rule", "space"), RULES, ids=NAMED)
def test_matching_scale(rule, space, base, bank):
    """At it the merge is as long as the adapters are in the mean; dense float64 norms of what `merge` makes are the oracle."""
    live = Learnable(base, bank, rule, space)
    try:
        scale = live.matching_scale()
    finally:
        live.remove()
    merged = merge(bank, Weights(dict.fromkeys(bank.names, 1.0)), rule, space, rank="full", dtype=torch.float64).adapter
    own = sum(float(a[m].dense(torch.float64).square().sum()) for a in bank.values() for m in a) / len(bank.names)
    total = sum(float(merged[m].dense(torch.float64).square().sum()) for m in merged)
    assert scale == pytest.approx(min(1.0, (own / total) ** 0.5), rel=1e-3)


def test_matching_scale_of_what_cancels_out(base, bank):
    a = bank["a"]
    opposite = Adapter("minus", {m: LoraFactors(f.A, -f.B, f.scaling) for m, f in a.items()}, a.config, a.base)
    live = Learnable(base, Bank([a, opposite]))
    try:
        assert live.matching_scale() == 1.0
    finally:
        live.remove()
