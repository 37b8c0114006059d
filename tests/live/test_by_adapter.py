"""Rows of one adapter each: however they are arranged for it, each has what it would have by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import PROJECTIONS, close, logits, peft_folder, tiny_llama
from loralloy.bank import Bank
from loralloy.live import LiveModel
from loralloy.live.by_adapter import ADAPTERS, PLACES, ByAdapter, placed
from loralloy.live.paged import PagedModel
from loralloy.weights import Weights

LAYER = "model.layers.0."
NAMES = [f"a{i}" for i in range(8)]
BASE = Weights({"a0": 0.0})
CPU, WIDE = torch.device("cpu"), [16] * 8


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank(base, tmp_path_factory):
    """Eight adapters of rank 8; a7 has no gate, which its sibling up has."""
    root = tmp_path_factory.mktemp("bank")
    for i in range(8):
        targets = [p for p in PROJECTIONS if p != "gate_proj"] if i == 7 else PROJECTIONS
        peft_folder(base, root / f"a{i}", i, target_modules=targets, r=8)
    return Bank.load(root)


def by_hand(base, bank, row, ids):
    """The logits of one row [length, vocabulary] of the base with dW added to each weight, in float64."""
    model = tiny_llama().double()
    model.load_state_dict({name: t.double() for name, t in base.state_dict().items()})
    with torch.no_grad():
        for name, module in model.named_modules():
            for n, f in bank.factors(name).items() if name in bank.modules else ():
                module.weight += row.of(n, name) * f.dense(torch.float64)
    return logits(model, ids)[0].float()


def in_places(live):
    """By module: what it computes with where rows are in places."""
    return {p.name: g.setting.by_adapter for g in live._groups if g.setting and g.setting.by_adapter for p in g.parts}


def steps(rows, seed=0):
    """One token a row."""
    return torch.randint(3, 50, (rows, 1), generator=torch.Generator().manual_seed(seed))


one = st.tuples(st.sampled_from([*NAMES, None]), st.sampled_from([1.0, -0.5, 0.3])).map(
    lambda pair: BASE if pair[0] is None else Weights({pair[0]: pair[1]})
)


@settings(max_examples=20)
@given(st.lists(one, min_size=2, max_size=12))
def test_rows_as_by_hand(base, bank, rows):
    """Any rows, some of the plain base; whether or not they are put into places."""
    ids = steps(len(rows))
    live = LiveModel(base, bank)
    try:
        with live.compose(rows):
            got = logits(base, ids)
    finally:
        live.remove()
    for i, row in enumerate(rows):
        assert close(got[i], by_hand(base, bank, row, ids[i : i + 1]))


@pytest.mark.parametrize("kind", [LiveModel, PagedModel])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_rows_in_places(base, bank, kind, mode):
    """Uneven: four rows of a3, one of the base, weights of either sign; prompts take the other way, to the same numbers."""
    chosen = ["a3", "a0", None, "a3", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "a3"]
    rows = [Weights({n: 0.5 - i % 2}) if n else BASE for i, n in enumerate(chosen)]
    live = kind(base, bank)
    try:
        live.set(rows)
        used = in_places(live)
        # a7 has no gate: the layouts of gate and up differ, and so they stay with the wide product
        assert len(used) == 5 * base.config.num_hidden_layers and LAYER + "self_attn.q_proj" in used
        assert used[LAYER + "self_attn.q_proj"].order.shape == (32,) and len(used[LAYER + "mlp.down_proj"].out) == 1
        for ids in (steps(12), torch.arange(3, 63).reshape(12, 5)):
            with mode():
                got = base(input_ids=ids).logits.detach()
            for i, row in enumerate(rows):
                assert close(got[i], by_hand(base, bank, row, ids[i : i + 1]))
    finally:
        live.set(None)
        live.remove() if kind is LiveModel else live.close()


def test_nothing_is_copied(base, bank):
    live = LiveModel(base, bank)
    with live.compose([Weights({n: 1.0}) for n in NAMES]):
        for group in live._groups:
            by = group.setting.by_adapter
            if by is not None:
                assert by.a.untyped_storage().data_ptr() == group.A.untyped_storage().data_ptr()
                assert [b.data_ptr() for b in by.out] == [slot.out.data_ptr() for slot in group.slots]
    live.remove()


def test_a_row_does_not_depend_on_its_neighbours(base, bank):
    """Nor does a neighbour whose numbers are lost spoil it: what stands in empty places is never added to another row."""
    rows = [Weights({n: 1.0}) for n in ["a3", "a0", "a3", "a1", "a2", "a4"]]
    x = torch.randn(6, 1, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    spoilt = x.clone()
    spoilt[0] = torch.nan
    live = LiveModel(base, bank)
    with live.compose(rows), torch.no_grad():
        assert in_places(live)
        whole, other = (base(inputs_embeds=t).logits for t in (x, spoilt))
    with live.compose(rows[2]), torch.no_grad():
        alone = base(inputs_embeds=x[2:3]).logits
    live.remove()
    assert torch.equal(whole[1:], other[1:]) and bool(other[0].isnan().all())
    assert close(whole[2], alone[0])


def test_weights_by_module(base, bank):
    """The same for siblings: in places; of one sibling its own: the wide product."""
    rows = [Weights({n: {"*": 0.5, LAYER + "self_attn.o_proj": -1.0}}) for n in NAMES[:6]]
    odd = [Weights({n: {"*": 0.5, LAYER + "self_attn.q_proj": -1.0}}) for n in NAMES[:6]]
    ids = steps(6)
    live = LiveModel(base, bank)
    for given_, q in ((rows, True), (odd, False)):
        with live.compose(given_):
            used = in_places(live)
            assert LAYER + "self_attn.o_proj" in used and (LAYER + "self_attn.q_proj" in used) == q
            got = logits(base, ids)
        for i, row in enumerate(given_):
            assert close(got[i], by_hand(base, bank, row, ids[i : i + 1]))
    live.remove()


def test_gradients_flow_through_places(base, bank):
    x = torch.randn(6, 1, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = [Weights({n: 0.7}) for n in NAMES[:6]]
    live = LiveModel(base, bank)
    whole = x.clone().requires_grad_(True)
    with live.compose(rows):
        assert in_places(live)
        base(inputs_embeds=whole).logits.square().sum().backward()
    for i, row in enumerate(rows):
        alone = x[i : i + 1].clone().requires_grad_(True)
        with live.compose(row):
            base(inputs_embeds=alone).logits.square().sum().backward()
        assert close(whole.grad[i], alone.grad[0])
    live.remove()
    base.zero_grad(set_to_none=True)


@settings(max_examples=60)
@given(st.lists(st.integers(-1, 7), min_size=1, max_size=24))
def test_places(owners):
    """Each row with an adapter has one place, its adapter's, with its weight; all other places count nothing."""
    table = torch.zeros(len(owners), 8, dtype=torch.float64)
    for row, owner in enumerate(owners):
        if owner >= 0:
            table[row, owner] = row + 1.0
    places = placed(table, WIDE, torch.float32, CPU)
    most = max(owners.count(i) for i in range(8))
    assert (places is None) == (not 0 < 8 * most <= PLACES * len(owners))
    if places is None:
        return
    seen = torch.zeros_like(table)
    for at, (row, c) in enumerate(zip(places.order.tolist(), places.c.flatten().tolist(), strict=True)):
        seen[row, at // most] += c
    assert torch.equal(seen, table) and int((places.c != 0).sum()) == sum(i >= 0 for i in owners)


def test_where_places_do_not_pay():
    table = torch.eye(8, dtype=torch.float64)
    assert isinstance(placed(table, WIDE, torch.float32, CPU), tuple)
    both = table.clone()
    both[0, 1] = 0.5
    few = torch.eye(ADAPTERS - 1, dtype=torch.float64)
    for given_, ranks, dtype, device in (
        (both, WIDE, torch.float32, CPU), (table, [16] * 7 + [8], torch.float32, CPU), (table, [4] * 8, torch.float32, CPU),
        (few, [64] * (ADAPTERS - 1), torch.float32, CPU), (table, WIDE, torch.bfloat16, CPU),
        (table, WIDE, torch.float32, torch.device("cuda")),
    ):  # fmt: skip
        assert placed(given_, ranks, dtype, device) is None


def test_a_module_of_the_group_alone():
    """The inner product of one module is its part of that of all."""
    g = torch.Generator().manual_seed(0)
    places = placed(torch.eye(8, dtype=torch.float64), WIDE, torch.float32, CPU)
    a, outs = torch.randn(3 * 128, 9, generator=g), [torch.randn(128, 5, generator=g) for _ in range(3)]
    by, x = ByAdapter.of(places, a, outs), torch.randn(8, 1, 9, generator=g)
    whole = by.inner(x, None)
    for i in range(3):
        assert close(by.more(whole, i), by.more(by.inner(x, i), i))
