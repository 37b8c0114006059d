"""RegMean's coefficients: against dense least squares in float64, its exact cases, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers import ConvNet, adapter, factors, peft_folder, relative, tiny_gpt2, tiny_llama
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.live import LiveModel
from loralloy.weighting import regmean as strategy
from loralloy.weighting.regmean import text_batches
from loralloy.weights import Weights

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))


def regmean(*arguments, **more):
    return strategy.regmean(*arguments, **more).weights


class Two(nn.Module):
    """`model.layers.0.lin` and `model.layers.1.lin`, one after the other."""

    def __init__(self, inside: int = 9) -> None:
        super().__init__()
        torch.manual_seed(5)
        layers = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(inside, inside)}) for _ in range(2)])
        self.model = nn.ModuleDict({"layers": layers})

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.model["layers"]:
            x = torch.tanh(layer["lin"](x))
        return x


LAYERS = ["model.layers.0.lin", "model.layers.1.lin"]


def two_bank(seeds=(1, 2, 3), ranks=(2, 3, 4)) -> Bank:
    """The second adapter has one module alone; scalings differ, one is negative."""
    made = []
    for n, (seed, rank) in enumerate(zip(seeds, ranks, strict=True)):
        modules = LAYERS[:1] if n == 1 else LAYERS
        scaling = (0.3, 0.5, -0.2)[n]
        made.append(adapter({m: factors(9, 9, rank, seed + 7 * j, scaling) for j, m in enumerate(modules)}, f"d{n}"))
    return Bank(made)


def draw(rows: int, inside: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inside, generator=g) @ torch.randn(inside, inside, generator=g)


def inputs_of(bank, rows=(7, 30, 12), inside=9):
    drawn = {name: draw(n, inside, i) for i, (name, n) in enumerate(zip(bank.names, rows, strict=True))}
    return {name: [{"x": part} for part in x.split(5)] for name, x in drawn.items()}


def seen(model, bank, inputs, under="own"):
    """domain -> module -> the inputs [t, in] that the module was given, collected by plain hooks: the oracle's own pass."""
    found, result = dict(model.named_modules()), {}
    live = LiveModel(model, bank)
    for domain, batches in inputs.items():
        kept: dict[str, list[torch.Tensor]] = {m: [] for m in bank.modules}
        handles = [found[m].register_forward_pre_hook(lambda _, args, x=x: x.append(args[0])) for m, x in kept.items()]
        with live.compose(Weights({domain: 1.0}) if under == "own" else None), torch.no_grad():
            for batch in batches:
                model(**batch)
        for handle in handles:
            handle.remove()
        result[domain] = {
            m: torch.cat([x.reshape(-1, x.shape[-1]) for x in parts]).double() for m, parts in kept.items()
        }
    live.remove()
    return result


def dense(bank, given_inputs, modules, ridge=0.0):
    """The least squares written out: columns are vec(dW_j X_i) / sqrt(t_i), stacked over domains and modules."""
    columns, target = [], []
    for m in modules:
        nothing = torch.zeros(bank.factors(m).popitem()[1].shape).double()
        dw = {n: bank[n][m].dense() if m in bank[n] else nothing for n in bank.names}
        for domain, by_module in given_inputs.items():
            x = by_module[m] / len(by_module[m]) ** 0.5
            columns.append(torch.stack([(x @ dw[n].T).flatten() for n in bank.names], 1))
            target.append((x @ dw[domain].T).flatten())
    system, goal = torch.cat(columns), torch.cat(target)
    pull = (ridge * (system**2).sum(0)).sqrt()
    system, goal = torch.cat([system, pull.diag()]), torch.cat([goal, pull])
    return torch.linalg.lstsq(system, goal[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("under", ["own", "base"])
def test_is_the_dense_least_squares(under, ridge):
    model, bank = Two(), two_bank()
    inputs = inputs_of(bank)
    x = seen(model, bank, inputs, under)
    one = regmean(model, bank, inputs, granularity="adapter", under=under, ridge=ridge, progress=False)
    want = dense(bank, x, LAYERS, ridge)
    assert [one.of(n) for n in bank.names] == pytest.approx(want.tolist(), rel=1e-4)
    assert float((want - 1).abs().max()) > 0.05  # the domains do disturb each other
    fine = regmean(model, bank, inputs, granularity="module", under=under, ridge=ridge, progress=False)
    layered = regmean(model, bank, inputs, granularity="layer", under=under, ridge=ridge, progress=False)
    for m in LAYERS:
        have = [n for n in bank.names if m in bank[n]]
        want = dense(bank, x, [m], ridge)
        for n, w in zip(bank.names, want.tolist(), strict=True):
            if n in have:
                assert fine.of(n, m) == pytest.approx(w, rel=1e-4) and layered.of(n, m) == pytest.approx(w, rel=1e-4)
    assert set(fine.coefficients["d1"]) == {LAYERS[0]}  # nothing is said of a module that an adapter has not got


def test_the_error_it_reports_is_the_error():
    model, bank = Two(), two_bank()
    inputs = inputs_of(bank)
    x = seen(model, bank, inputs)
    found = regmean(model, bank, inputs, progress=False)

    def error(weights):
        lost = size = 0.0
        for m in LAYERS:
            for domain, by_module in x.items():
                dw = {n: bank[n][m].dense() for n in bank.names if m in bank[n]}
                merged = sum(weights.of(n, m) * d for n, d in dw.items())
                own = dw.get(domain, torch.zeros(9, 9).double())
                t = len(by_module[m])
                lost += float((by_module[m] @ (merged - own).T).square().sum()) / t
                size += float((by_module[m] @ own.T).square().sum()) / t
        return (lost / size) ** 0.5

    said = found.explain["settings"]["error"]
    assert said["regmean"] == pytest.approx(error(found), rel=1e-4)
    assert said["all 1"] == pytest.approx(error(Weights(dict.fromkeys(bank.names, 1.0))), rel=1e-4)
    assert said["all 1/n"] == pytest.approx(error(Weights.uniform(bank.names)), rel=1e-4)
    assert said["regmean"] < min(said["all 1"], said["all 1/n"])
    assert found.explain["settings"]["inputs"] == {"d0": 7, "d1": 30, "d2": 12}


@given(ridge=st.sampled_from([0.0, 1e-3, 10.0]), seed=st.integers(0, 50))
def test_disjoint_inputs_and_a_single_adapter_give_one(ridge, seed):
    """Each A acts on coordinates of its own, and each domain lives in its own: no adapter disturbs another."""
    model = nn.Sequential(nn.Linear(9, 5))
    parts, inputs = [], {}
    for n in range(3):
        f, span = factors(5, 9, 2, seed + n, (-0.7, 0.4, 2.0)[n]), slice(3 * n, 3 * n + 3)
        a, x = torch.zeros(2, 9), torch.zeros(6, 9)
        a[:, span], x[:, span] = f.A[:, span], draw(6, 3, seed + n)
        parts.append(adapter({"0": LoraFactors(a, f.B, f.scaling)}, f"d{n}"))
        inputs[f"d{n}"] = [{"input": x}]
    found = regmean(model, Bank(parts), inputs, ridge=ridge, progress=False)
    assert [found.of(f"d{n}", "0") for n in range(3)] == pytest.approx([1, 1, 1], abs=1e-5)
    alone = Bank([adapter({"0": factors(5, 9, 2, seed)}, "d0")])
    only = regmean(
        model, alone, {"d0": [{"input": draw(6, 9, seed)}]}, ridge=ridge, granularity="adapter", progress=False
    )
    assert only.of("d0") == pytest.approx(1, abs=1e-6)


@given(scale=st.sampled_from([0.25, 3.0, -2.0]), seed=st.integers(0, 50))
def test_laws(scale, seed):
    """The gauge of an adapter does not matter; the order of adapters does not; equal adapters share what is theirs; one that
    meets no input stays at 1."""
    model = nn.Sequential(nn.Linear(9, 5))
    a, b = factors(5, 9, 2, seed), factors(5, 9, 3, seed + 1)
    inputs = {"a": [{"input": draw(8, 9, seed)}], "b": [{"input": draw(8, 9, seed + 1)}]}

    def solve(parts, given_inputs=inputs, **more):
        bank = Bank([adapter({"0": f}, n) for n, f in parts.items()])
        found = regmean(model, bank, given_inputs, under="base", progress=False, **more)
        return {n: found.of(n, "0") for n in parts}

    want = solve({"a": a, "b": b})
    g = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    gauged = LoraFactors(g @ a.A * scale, a.B @ torch.linalg.inv(g) / scale, a.scaling)
    assert solve({"a": gauged, "b": b}) == pytest.approx(want, rel=1e-3)
    assert solve({"b": b, "a": a}) == pytest.approx(want, rel=1e-6)
    same = solve({"a": a, "b": a}, ridge=0.0)
    assert same == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-5)
    zero = LoraFactors(torch.zeros(3, 9), b.B, 1.0)
    assert solve({"a": a, "b": zero})["b"] == 1.0


def test_padding_and_the_number_of_inputs_do_not_count():
    """A language model: right padding changes nothing, and a domain given twice counts once."""
    model = tiny_llama()
    g = torch.Generator().manual_seed(0)
    bank = Bank(
        adapter({m: factors(*shape, 2 + n, 3 * n + j, 0.3) for j, (m, shape) in enumerate(SHAPES.items())}, f"d{n}")
        for n in range(2)
    )
    short, long = torch.randint(3, 60, (1, 5), generator=g), torch.randint(3, 60, (1, 9), generator=g)
    other = {"input_ids": torch.randint(3, 60, (2, 7), generator=g)}
    apart = [{"input_ids": short}, {"input_ids": long}]
    padded = torch.zeros(2, 9, dtype=torch.long)
    padded[0, :5], padded[1] = short[0], long[0]
    together = [{"input_ids": padded, "attention_mask": (padded != 0).long()}]
    want = regmean(model, bank, {"d0": apart, "d1": [other]}, progress=False)
    for batches in (together, together * 3):
        got = regmean(model, bank, {"d1": [other] * 2, "d0": batches}, progress=False)
        for n in bank.names:
            for m in SHAPES:
                assert got.of(n, m) == pytest.approx(want.of(n, m), rel=1e-3), (n, m)
    counted_with_padding = regmean(model, bank, {"d0": [{"input_ids": padded}], "d1": [other]}, progress=False)
    assert any(abs(counted_with_padding.of("d0", m) - want.of("d0", m)) > 1e-3 for m in SHAPES)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


SHAPES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 48)}


def test_embeddings_and_conv1d_of_gpt2(tmp_path):
    """GPT-2's linear layers are stored transposed; an embedding's inputs are ids. Oracle: what the adapters put out."""
    base = tiny_gpt2()
    for n in range(2):
        peft_folder(base, tmp_path / f"d{n}", n + 1, name="tiny/gpt2", target_modules=["c_attn", "wte"], r=2 + n)
    bank = Bank.load(tmp_path)
    g = torch.Generator().manual_seed(1)
    inputs = {n: [{"input_ids": torch.randint(3, 50, (4, 6), generator=g)}] for n in bank.names}
    found = regmean(base, bank, inputs, under="base", ridge=0.0, progress=False)
    c_attn, wte = "transformer.h.0.attn.c_attn", "transformer.wte"
    modules = dict(base.named_modules())
    for m in (c_attn, wte):
        columns, target = [], []
        for domain, (batch,) in inputs.items():
            x = []
            handle = modules[m].register_forward_pre_hook(lambda _, args, x=x: x.append(args[0].detach()))
            with torch.no_grad():
                base(**batch)
            handle.remove()
            out = {}
            for n in bank.names:
                dw = bank[n][m].dense()
                out[n] = (dw.T[x[0]] if m == wte else x[0].double() @ dw.T).flatten()
            columns.append(torch.stack(list(out.values()), 1))
            target.append(out[domain])
        want = torch.linalg.lstsq(torch.cat(columns), torch.cat(target)[:, None]).solution[:, 0]
        got = torch.tensor([found.of(n, m) for n in bank.names])
        assert relative(got, want) < 1e-4


def test_each_module_is_left_in_its_mode():
    model, bank = Two(), two_bank()
    model.eval().model["layers"][0].train()
    before = [m.training for m in model.modules()]
    regmean(model, bank, inputs_of(bank), progress=False)
    assert [m.training for m in model.modules()] == before and len(set(before)) == 2


def test_text_batches_are_prompts_without_padding():
    import tiny

    tokenizer, model = tiny.make_tokenizer(), tiny_llama(vocab=300)
    prompts = ["a b c", "a longer prompt than that", "x"]
    batches = list(text_batches(model, tokenizer, prompts, batch_size=2))
    rows = [
        ids[mask.bool()].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert sorted(tokenizer.decode(row) for row in rows) == sorted(prompts) and len(batches) == 2


def test_refusals():
    model, bank = Two(), two_bank()
    inputs = inputs_of(bank)
    for rule, space in (("ties", None), ("linear", "factors"), ("tsv_m", None)):
        with pytest.raises(LoralloyError, match=rf"plain sum of dW, and rule '{rule}'.*linear \(delta\).*search"):
            regmean(model, bank, inputs, rule=rule, space=space)
    with pytest.raises(LoralloyError, match="domain 'tweets' is no adapter of the bank"):
        regmean(model, bank, inputs | {"tweets": []})
    with pytest.raises(LoralloyError, match="there are none of d0, d2"):
        regmean(model, bank, {"d1": inputs["d1"]})
    with pytest.raises(LoralloyError, match="no inputs of domain 'd2'"):
        regmean(model, bank, inputs | {"d2": []}, progress=False)
    with pytest.raises(LoralloyError, match="not finite; load the model in float32"):
        regmean(model, bank, inputs | {"d2": [{"x": torch.full((2, 9), torch.nan)}]}, progress=False)
    with pytest.raises(LoralloyError, match="granularity 'row' is not known"):
        regmean(model, bank, inputs, granularity="row")  # type: ignore[arg-type]
    with pytest.raises(LoralloyError, match="ridge is -1"):
        regmean(model, bank, inputs, ridge=-1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    conv = LoraFactors(torch.randn(2, 3, 3), torch.randn(8, 2, 1), 1.0, "conv")
    with pytest.raises(LoralloyError, match="'one' of adapter 'a' is a convolution"):
        regmean(ConvNet(), Bank([adapter({"one": conv})]), {"a": [{"x": torch.randn(1, 3, 8)}]})
