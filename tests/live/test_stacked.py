"""Groups of modules that share an input: what is shared, skipped or written in place changes no number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import PROJECTIONS, adapter, close, factors, logits, peft_folder, tiny_llama
from loralloy.bank import Bank
from loralloy.live import LiveModel
from loralloy.live.paged import PagedModel
from loralloy.merging import merge
from loralloy.weights import Weights

IDS = torch.arange(3, 27).reshape(3, 8)
LAYER = "model.layers.0.self_attn."


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank(base, tmp_path_factory):
    """Siblings that differ in rank and in who has them: q without k, k without q, up without gate."""
    root = tmp_path_factory.mktemp("bank")
    sets = [["q_proj", "v_proj"], PROJECTIONS, ["k_proj", "up_proj"], ["o_proj", "down_proj", "gate_proj"]]
    for i in range(8):
        peft_folder(base, root / f"a{i}", i, target_modules=sets[i % 4], r=1 + i, rank_pattern={"v_proj": 2})
    return Bank.load(root)


def by_hand(base, bank, weights, ids):
    """The base with dW added to each weight."""
    model = tiny_llama()
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, module in model.named_modules():
            for n, f in bank.factors(name).items() if name in bank.modules else ():
                module.weight += weights.of(n, name) * f.dense(torch.float32)
    return logits(model, ids)


weights = st.dictionaries(
    st.sampled_from([f"a{i}" for i in range(8)]), st.sampled_from([0.0, 1.0, -0.5, 0.3]), min_size=1, max_size=4
).map(Weights)


@settings(max_examples=25)
@given(st.lists(weights, min_size=3, max_size=3))
def test_rows_as_by_hand(base, bank, rows):
    """Few of many adapters (their columns are picked out), many (they are not), none, all rows agreeing or not."""
    live = LiveModel(base, bank)
    try:
        with live.compose(rows):
            got = logits(base, IDS)
    finally:
        live.remove()
    for i, row in enumerate(rows):
        assert close(got[i], by_hand(base, bank, row, IDS)[i])


def test_weights_by_module_differ_within_a_group(base, bank):
    rows = [
        Weights({"a1": {"*": 0.5, LAYER + "q_proj": -1.0, LAYER + "k_proj": 0.0}}),
        Weights({"a1": {LAYER + "v_proj": 1.0}, "a2": 0.4}),
        Weights({"a0": 1.0}),
    ]
    live = LiveModel(base, bank)
    with live.compose(rows):
        got = logits(base, IDS)
    live.remove()
    for i, row in enumerate(rows):
        assert close(got[i], by_hand(base, bank, row, IDS)[i])


def test_siblings_share_one_product(base, bank):
    live = LiveModel(base, bank)
    groups = {tuple(p.name.rsplit(".", 1)[1] for p in g.parts) for g in live._groups}
    assert {frozenset(g) for g in groups} == {
        frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"o_proj"}), frozenset({"gate_proj", "up_proj"}),
        frozenset({"down_proj"}),
    }  # fmt: skip
    with live.compose(Weights({"a1": 1.0})):
        logits(base, IDS)
        assert all(g.shared == (len(g.parts) > 1) and g._x is None for g in live._groups)  # used up, and let go of
    live.remove()


class Odd(nn.Module):
    """Siblings by name that read different inputs; `change` writes into the input between them."""

    def __init__(self, change: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(9, 12) for _ in range(3))
        self.change = change

    def forward(self, x):
        q = self.q_proj(x)
        if self.change:
            x.add_(1)
            return q + self.k_proj(x) + self.v_proj(x)
        return q + self.k_proj(x + 1) + self.v_proj(x + 1)


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_siblings_that_read_different_inputs(change, mode):
    model = Odd(change)
    bank = Bank([adapter({f"{p}_proj": factors(seed=i) for i, p in enumerate("qkv")})])
    live = LiveModel(model, bank)
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1))
    want = Odd(change)
    with torch.no_grad():
        for p in "qkv":
            f = bank["a"][f"{p}_proj"]
            getattr(want, f"{p}_proj").weight += 0.5 * f.dense(torch.float32)
        right = want(x.clone())
    for _ in range(2):
        with live.compose([Weights({"a": 0.5})] * 2), mode():
            assert close(model(x.clone()).detach(), right)


def test_gradients_flow_through_the_base(base, bank):
    """With gradients wanted nothing is written in place: they equal those of the merged model."""
    live = LiveModel(base, bank)
    x = base.get_input_embeddings()(IDS).detach()
    row = Weights({"a1": 0.7, "a0": -0.4})
    seen = []
    try:
        for model, weights in ((base, row), (tiny_llama(), None)):
            if weights is None:
                for name, module in model.named_modules():
                    for n, f in bank.factors(name).items() if name in bank.modules else ():
                        module.weight.data += row.of(n) * f.dense(torch.float32)
            leaf = x.clone().requires_grad_(True)
            with live.compose(weights):
                model(inputs_embeds=leaf).logits.square().mean().backward()
            seen.append(leaf.grad)
    finally:
        live.remove()
        base.zero_grad(set_to_none=True)
    assert float(seen[0].abs().max()) > 0 and close(seen[0], seen[1])


def test_float64_is_not_rounded_to_float32(bank):
    model = tiny_llama().double()
    live = LiveModel(model, bank)
    row = Weights({"a1": 0.3, "a2": 0.1})
    with live.compose(row):
        got = logits(model, IDS)
    live.remove()
    with torch.no_grad():
        for name, module in model.named_modules():
            for n, f in bank.factors(name).items() if name in bank.modules else ():
                module.weight += row.of(n) * f.dense(torch.float64)
    assert float((got - logits(model, IDS)).abs().max()) < 1e-12


def test_adapters_come_and_go_while_rows_run(base, bank):
    """Each step has its own rows, while merged adapters of other ranks and modules join and leave."""
    paged = PagedModel(base, bank, resident=2)
    g = torch.Generator().manual_seed(0)
    try:
        for step in range(12):
            if step % 3 == 0:
                chosen = bank.names[step % 8], bank.names[(step + 3) % 8]
                merged = merge(bank, Weights(dict.fromkeys(chosen, 0.5)), "ties").adapter
                paged.add(merged, "m")
            names = bank.names
            pick = torch.randint(len(names), (3,), generator=g).tolist()
            rows = [Weights({names[i]: 0.5, names[(i + 1) % 8]: -0.25}) for i in pick[:2]] + [Weights({"m": 1.0})]
            paged.set(rows)
            got = logits(base, IDS)
            for i, row in enumerate(rows[:2]):
                assert close(got[i], by_hand(base, bank, row, IDS)[i])
            assert close(got[2], by_hand(base, Bank([merged]), Weights({"merged": 1.0}), IDS)[2])
            if step % 3 == 2:
                paged.remove("m")
            assert len(paged.loaded) <= max(2, len({n for r in rows for n in r.names})) + 1
    finally:
        paged.close()
