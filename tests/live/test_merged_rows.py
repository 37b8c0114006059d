"""Merged adapters by row: each row's logits are those of PEFT with that row's adapter alone, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import (
    PROJECTIONS,
    ConvNet,
    close,
    factors,
    load_in_peft,
    logits,
    peft_folder,
    tiny_gpt2,
    tiny_llama,
)
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.live import MergedRows
from loralloy.merging import merge
from loralloy.weights import Weights

IDS = torch.arange(3, 35).reshape(4, 8)
MERGES = [("linear", {"a": 1.0, "b": 0.5}), ("ties", {"b": 1.0, "c": -0.7}), ("cat", {"a": -0.4, "b": 0.4, "c": 0.9})]


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def merged(base, tmp_path_factory):
    """Three merges of different rules, ranks and modules (the third touches embedding and head), and PEFT's logits."""
    root = tmp_path_factory.mktemp("bank")
    peft_folder(base, root / "a", 1, target_modules=["q_proj", "v_proj"], r=2)
    peft_folder(base, root / "b", 2, target_modules=PROJECTIONS, r=3, use_rslora=True)
    peft_folder(base, root / "c", 3, target_modules=["embed_tokens", "lm_head", "down_proj"], r=3)
    bank = Bank.load(root)
    made, truth = [], [logits(base, IDS)]
    for i, (rule, weights) in enumerate(MERGES):
        result = merge(bank, Weights(weights), rule, "delta", name=f"m{i}").adapter
        result.save(root / f"m{i}")
        truth.append(logits(load_in_peft(base, root / f"m{i}"), IDS))
        made.append({module: result[module] for module in result})
    return made, truth  # truth[i + 1] is adapter i's; truth[0], and so truth[-1 + 1], the base's


@pytest.fixture
def rows(base, merged):
    rows = MergedRows(base, merged[0])
    yield rows
    rows.remove()


@pytest.mark.parametrize("index", [[0, 1, 2, -1], [2, 2, 0, 2], [1, 1, 1, 1], [2], [-1, -1, -1, 1], [-1] * 4])
def test_each_row_under_its_own_adapter(rows, merged, index):
    with rows.rows(index) as model:
        got = logits(model, IDS)
    for b, i in enumerate(index * (4 // len(index))):
        assert close(got[b], merged[1][i + 1][b])
    differ = [float((merged[1][i] - merged[1][j]).abs().max()) for i in range(4) for j in range(i)]
    assert min(differ) > 1e-2


def test_subsets_and_repeats(rows, merged):
    """What `predict` does: batches in any order, rows that come several times."""
    picked = torch.tensor([3, 0, 0, 2, 3, 1])
    with rows.rows([int(i) - 1 for i in picked]) as model:
        got = logits(model, IDS[picked])
    for b, i in enumerate(picked.tolist()):
        assert close(got[b], merged[1][i][i])


def test_generation_with_the_cache(rows):
    more = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    with rows.rows([0, 1, 2, -1]) as model, torch.no_grad():
        together = model.generate(input_ids=IDS, attention_mask=mask, **more)
    for b, i in enumerate([0, 1, 2, -1]):
        with rows.rows([i]) as model, torch.no_grad():
            alone = model.generate(input_ids=IDS[b : b + 1], attention_mask=mask[:1], **more)
        assert torch.equal(alone[0], together[b])


def test_nested_blocks_and_the_base_afterwards(base, rows, merged):
    plain = merged[1][0]
    assert torch.equal(logits(base, IDS), plain)
    with rows.rows([0]):
        with rows.rows([1, 2, -1, 0]):
            assert close(logits(base, IDS)[1], merged[1][3][1])
        assert close(logits(base, IDS), merged[1][1])
    assert torch.equal(logits(base, IDS), plain)
    rows.remove()
    assert not any(module._forward_hooks for module in base.modules())


def test_adapters_are_exchanged(base, merged):
    rows, (made, truth) = MergedRows(base), merged
    with rows.use([made[2]], [0]) as model:
        assert close(logits(model, IDS), truth[3])
    rows.load([made[0], made[1]])
    with rows.rows([1, 0, 1, 0]) as model:
        got = logits(model, IDS)
    assert all(close(got[b], truth[i][b]) for b, i in enumerate([2, 1, 2, 1]))
    rows.load([])
    assert not any(module._forward_hooks for module in base.modules())


def test_gpt2_conv1d(tmp_path):
    base, ids = tiny_gpt2(), IDS[:3, :6] % 50
    parts = []
    for i in range(2):
        folder = peft_folder(
            base, tmp_path / str(i), i, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, r=2 + i
        )
        parts.append(folder)
    adapters = [dict(Bank.load([folder])[folder.name]) for folder in parts]
    rows = MergedRows(base, adapters)
    with rows.rows([1, -1, 0]):
        got = logits(base, ids)
    rows.remove()
    want = [logits(load_in_peft(base, parts[1]), ids), logits(base, ids), logits(load_in_peft(base, parts[0]), ids)]
    assert all(close(got[b], want[b][b]) for b in range(3))


def test_inputs_without_a_sequence():
    net = nn.ModuleDict({"m": nn.Linear(9, 12)})
    one, two = factors(seed=1), factors(rank=2, seed=2, scaling=-0.5)
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    rows = MergedRows(net, [{"m": one}, {"m": two}])
    with rows.rows([1, 0, -1]), torch.no_grad():
        got = net["m"](x)
    weight = net["m"].weight.detach()
    want = [weight + two.dense(torch.float32), weight + one.dense(torch.float32), weight]
    assert all(close(got[b], x[b] @ want[b].T + net["m"].bias.detach()) for b in range(3))


def test_refusals(base, rows, merged):
    with rows.rows([0, 1]) as model, pytest.raises(LoralloyError, match="set for 2 rows but the batch has 4"):
        logits(model, IDS)
    with rows.rows([1, 1, 1]) as model, pytest.raises(LoralloyError, match="set for 3 rows but the batch has 4"):
        logits(model, IDS)
    for wrong in ([3], [0, -2]):
        with pytest.raises(LoralloyError, match="there is no merged adapter"), rows.rows(wrong):
            pass
    with pytest.raises(LoralloyError, match="no rows given"), rows.rows([]):
        pass
    with pytest.raises(LoralloyError, match="has module 'nowhere', which the model does not"):
        MergedRows(base, [{"nowhere": factors()}])
    with pytest.raises(LoralloyError, match=r"module 'lm_head': .*\[12, 9\], the model has \[64, 32\]"):
        MergedRows(base, [merged[0][2], {"lm_head": factors()}])
    conv = LoraFactors(torch.ones(2, 3, 3), torch.ones(8, 2, 1), 1.0, "conv")
    with pytest.raises(LoralloyError, match="module 'one' is a convolution"):
        MergedRows(ConvNet(), [{"one": conv}])
    with pytest.raises(LoralloyError, match="overflow the model's dtype"):
        MergedRows(nn.ModuleDict({"m": nn.Linear(9, 12)}).half(), [{"m": factors(scaling=1e20)}])
