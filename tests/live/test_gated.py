"""Gates in a running model: constant coefficients are Weights, one-hot ones an adapter alone, masks and caches are kept."""

from __future__ import annotations

import pytest
import torch

from helpers import PROJECTIONS, adapter, close, factors, load_in_peft, logits, peft_folder, tiny_llama
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live import Gated, LiveModel, Pass
from loralloy.live.gated import normalised
from loralloy.weights import Weights

IDS = torch.arange(3, 27).reshape(3, 8)
TABLE = torch.tensor([[0.6, -0.5, 1.2], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]])


class Constant:
    """Every row its own coefficients, the same for all tokens and modules."""

    def __init__(self, names, table, averages=False):
        self.names, self.table, self.averages = names, table, averages

    def __call__(self, module, x, now):
        return self.table[:, None, :]


class ByToken(Constant):
    """Coefficients [b, l, n] that differ by token: what is kept of them shows what a pass was told."""

    def __call__(self, module, x, now):
        scale = torch.linspace(0, 1, x.shape[1])[None, :, None]
        return self.table[:, None, :] * scale


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank(base, tmp_path_factory):
    """Mixed ranks, scalings and module sets."""
    root = tmp_path_factory.mktemp("bank")
    peft_folder(base, root / "a", 1, target_modules=["q_proj", "v_proj"], r=2)
    peft_folder(base, root / "b", 2, target_modules=PROJECTIONS, r=5, use_rslora=True)
    peft_folder(base, root / "c", 3, target_modules=["down_proj", "q_proj", "lm_head"], r=3)
    return Bank.load(root)


@pytest.fixture
def live(base, bank):
    live = LiveModel(base, bank)
    yield live
    live.remove()


def test_constant_coefficients_are_weights(live, bank):
    rows = [Weights(dict(zip(bank.names, row, strict=True))) for row in TABLE.tolist()]
    with live.compose(rows) as model:
        want = logits(model, IDS)
    with live.gate(Constant(bank.names, TABLE)) as model:
        assert close(logits(model, IDS), want)


def test_coefficients_by_token(live, base, bank):
    """On one module of one layer, against the formula written out; the base and the composition before are put back."""
    gate, seen = ByToken(bank.names, TABLE), {}
    name = "model.layers.0.self_attn.q_proj"
    module = base.get_submodule(name)
    spy = module.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    with live.compose(Weights({"a": 1.0})):
        before = logits(base, IDS)
        with live.gate(gate):
            logits(base, IDS)
        c = gate(name, seen["x"], None)
        want = seen["x"] @ module.weight.T
        for i, f in enumerate(bank.factors(name).values()):
            want = want + c[:, :, i : i + 1] * (seen["x"] @ f.dense(torch.float32).T)
        spy.remove()
        assert close(seen["y"].detach(), want.detach())
        assert torch.equal(logits(base, IDS), before)


def averaged(bank, row):
    """One row's SMEAR adapter: (sum w A, sum w B), each with the root of its scaling, padded to one rank."""
    parts = {}
    for module in bank.modules:
        found = bank.factors(module)
        rank = max(f.rank for f in found.values())
        first = next(iter(found.values()))
        a, b = torch.zeros(rank, first.shape[1]), torch.zeros(first.shape[0], rank)
        for name, w in zip(bank.names, row, strict=True):
            if name in found:
                f = found[name]
                a[: f.rank] += w * f.scaling**0.5 * f.A
                b[:, : f.rank] += w * f.scaling**0.5 * f.B
        parts[module] = type(first)(a, b, 1.0)
    return parts


def test_averaged_factors(live, base, bank):
    with live.gate(Constant(bank.names, TABLE, averages=True)) as model:
        got = logits(model, IDS)
    live.remove()
    for b, row in enumerate(TABLE.tolist()):
        single = LiveModel(base, Bank([adapter(averaged(bank, row), "s")]))
        with single.compose(Weights({"s": 1.0})) as model:
            assert close(got[b], logits(model, IDS)[b])
        single.remove()


def test_one_hot_averages_are_the_adapter_alone(live, base, bank):
    with live.gate(Constant(bank.names, torch.eye(3), averages=True)) as model:
        got = logits(model, IDS)
    live.remove()
    for b, name in enumerate(bank.names):
        assert close(got[b], logits(load_in_peft(base, bank[name].path), IDS)[b])


class Telling(Constant):
    """Keeps each prompt's own coefficients and recalls them, as a gate over whole rows does; it writes down the passes."""

    def __init__(self, names, averages=False):
        super().__init__(names, None, averages)
        self.passes: list[Pass] = []

    def __call__(self, module, x, now):
        if not any(now is p for p in self.passes):
            self.passes.append(now)
        if now.continues:
            return now.recall("c")
        if "c" not in now.kept:
            weight = (torch.ones(x.shape[:2]) if now.pooled is None else now.pooled.float())[:, :, None]
            h = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
            now.kept["c"] = (10 * h[:, :, : len(self.names)]).softmax(-1)
        return now.kept["c"]


@pytest.mark.parametrize("averages", [False, True])
def test_a_cache_goes_on_under_the_prompt_s_coefficients(live, base, bank, averages):
    """Prompt and continuation apart, rows expanded and reordered, equals the whole sequence with the prompt pooled."""
    gate = Telling(bank.names, averages)
    gated = Gated(live, gate)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        with gated.rows([7, 3, 5]):
            first = base(IDS[:, :6], attention_mask=mask[:, :6], position_ids=places[:, :6], use_cache=True)
        cache, order = first.past_key_values, torch.tensor([2, 1, 1, 0])
        cache.batch_select_indices(order)
        with gated.rows([5, 3, 3, 7]):
            rest = base(
                IDS[order, 6:], attention_mask=mask[order], position_ids=places[order, 6:], past_key_values=cache
            ).logits
        pooled = mask.bool() & (torch.arange(8) < 6)
        with live.gate(gate, pooled=pooled):
            whole = base(IDS, attention_mask=mask, position_ids=places).logits
    assert close(rest, whole[order][:, 6:])
    assert [p.continues for p in gate.passes] == [False, True, False]
    assert torch.equal(gate.passes[0].pooled, mask[:, :6].bool())
    spread = gate.passes[0].kept["c"][:, 0]
    assert float((spread[0] - spread[1]).abs().max()) > 0.01  # else any row's coefficients would do


def test_generate_under_a_gate(live, bank):
    gate, mask = Telling(bank.names), torch.ones_like(IDS)
    more = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with live.gate(gate) as model, torch.no_grad():
        together = model.generate(input_ids=IDS, attention_mask=mask, **more)
    for b in range(3):
        with live.gate(gate) as model, torch.no_grad():
            alone = model.generate(input_ids=IDS[b : b + 1], attention_mask=mask[:1], **more)
        assert torch.equal(alone[0], together[b])


def test_what_is_allowed_reaches_the_gate_by_example(live, bank):
    gate = Telling(bank.names)
    allowed = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
    with Gated(live, gate, allowed).rows([2, 0, 2]) as model:
        logits(model, IDS)
    assert torch.equal(gate.passes[-1].allowed, allowed[[2, 0, 2]])


def test_normalised():
    scores = torch.tensor([[[3.0, 1.0, 2.0, 0.0]], [[0.0, 0.0, 5.0, 1.0]]], dtype=torch.float64)
    allowed = torch.tensor([[False, True, True, True], [True, True, True, True]])
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    top2 = normalised(scores, allowed, 2)
    assert torch.allclose(top2[0, 0], torch.tensor([0, 1 / (1 + e), e / (1 + e), 0], dtype=torch.float64))
    assert torch.allclose(normalised(scores), scores.softmax(-1))
    assert torch.equal(normalised(scores, allowed, 1).argmax(-1)[:, 0], torch.tensor([2, 2]))
    few = normalised(scores, torch.tensor([[False, True, False, False]]), 3)
    assert torch.equal(few, torch.tensor([0.0, 1, 0, 0], dtype=torch.float64).expand(2, 1, 4))
    nothing = normalised(torch.full((1, 1, 3), -torch.inf))
    assert torch.equal(nothing, torch.zeros(1, 1, 3))


def test_refusals(live, base, bank):
    gate = Telling(bank.names)
    with pytest.raises(LoralloyError, match="the gate is of the adapters c, b, a, but the bank holds a, b, c"):
        Gated(live, Telling(bank.names[::-1]))
    with pytest.raises(LoralloyError, match="allows no adapter at all"):
        Gated(live, gate, torch.tensor([[True, True, True], [False, False, False]]))
    with pytest.raises(LoralloyError, match="2 columns for 3 adapters"):
        Gated(live, gate, torch.ones(3, 2))
    with Gated(live, gate).rows([0, 1]), pytest.raises(LoralloyError, match="set for 2 rows but the batch has 3"):
        logits(base, IDS)
    with (
        live.gate(gate, torch.ones(2, 3)),
        pytest.raises(LoralloyError, match="allowed has 2 rows but the batch has 3"),
    ):
        logits(base, IDS)
    gated = Gated(live, gate)
    with gated.rows([0, 1, 2]), torch.no_grad():
        cache = base(IDS, use_cache=True).past_key_values
    with gated.rows([0, 1, 4]), pytest.raises(LoralloyError, match="example 4 goes on from a prompt"):
        base(IDS[:, :1], past_key_values=cache)
    with live.gate(ByToken(bank.names, TABLE, True)), pytest.raises(LoralloyError, match="one coefficient a row"):
        logits(base, IDS)
    assert torch.equal(logits(base, IDS), logits(base, IDS)) and not any(p.gated for p in live.parts.values())


def test_an_embedding_cannot_be_gated(tmp_path):
    base = tiny_llama()
    peft_folder(base, tmp_path / "a", 1, target_modules=["embed_tokens", "q_proj"])
    live = LiveModel(base, Bank.load(tmp_path))
    with pytest.raises(LoralloyError, match=r"'model.embed_tokens' is an embedding; gates are for linear modules"):
        Gated(live, Telling(["a"]))


def test_a_module_by_itself():
    """Without a model around it a module is a pass of its own; inputs may lack a sequence."""
    net = torch.nn.ModuleDict({"m": torch.nn.Linear(9, 12)})
    live = LiveModel(net, Bank([adapter({"m": factors(seed=1)}, "a"), adapter({"m": factors(rank=2, seed=2)}, "b")]))
    x = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    table = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    with live.compose([Weights({"a": 1.0}), Weights({"a": 0.5, "b": 2.0})]), torch.no_grad():
        want = net["m"](x)
    with live.gate(Constant(["a", "b"], table)), torch.no_grad():
        assert close(net["m"](x), want)
