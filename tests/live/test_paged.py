"""A bank paged into a model: rows see their adapters whatever else is loaded, added or removed meanwhile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import PROJECTIONS, adapter, close, factors, load_in_peft, logits, peft_folder, tiny_gpt2, tiny_llama
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.live import LiveModel
from loralloy.live.paged import PagedModel
from loralloy.merging import merge
from loralloy.weights import Weights

IDS = torch.arange(3, 27).reshape(3, 8)
NAMES = list("abcdef")


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank(base, tmp_path_factory):
    """Mixed ranks and module sets, the embedding and the head among them."""
    root = tmp_path_factory.mktemp("bank")
    sets = [["q_proj", "v_proj"], PROJECTIONS, ["embed_tokens", "lm_head", "down_proj"], ["up_proj"]]
    for i, name in enumerate(NAMES):
        peft_folder(base, root / name, i, target_modules=sets[i % 4], r=1 + i)
    return Bank.load(root)


@pytest.fixture
def paged(base, bank):
    made = PagedModel(base, bank, resident=2)
    yield made
    made.close()


rows = st.lists(
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 1.0, -0.5, 0.7]), min_size=1, max_size=3).map(
        Weights
    ),
    min_size=3,
    max_size=3,
)


@settings(max_examples=25)
@given(st.lists(rows, min_size=1, max_size=4))
def test_as_a_live_model_of_the_whole_bank(base, bank, paged, batches):
    for batch in batches:
        paged.set(batch)
        got = logits(base, IDS)
        paged.set(None)
        live = LiveModel(base, bank)
        with live.compose(batch):
            want = logits(base, IDS)
        live.remove()
        assert close(got, want)
        used = {n for r in batch for n, w in r.items() if w}
        assert used <= set(paged.stacked)


def test_as_peft(base, bank, paged, tmp_path):
    weights = [Weights({"b": 1.0}), Weights({"a": 0.6, "c": -0.5}), Weights({"d": 0.0})]
    paged.set(weights)
    got = logits(base, IDS)
    for i, w in enumerate(weights[:2]):
        merge(bank, w).adapter.save(tmp_path / str(i))
        assert close(got[i], logits(load_in_peft(tiny_llama(), tmp_path / str(i)), IDS)[i])
    assert close(got[2], logits(tiny_llama(), IDS)[2])


def test_by_module(base, bank, paged):
    weights = [
        Weights({"b": {"*": 0.7, "model.layers.0.self_attn.q_proj": -1.0}}),
        Weights({"a": 1.0}),
        Weights({"c": 0.2}),
    ]
    paged.set(weights)
    got = logits(base, IDS)
    paged.set(None)
    live = LiveModel(base, bank)
    with live.compose(weights):
        assert close(got, logits(base, IDS))
    live.remove()


def test_what_is_loaded(paged, monkeypatch):
    """Adapters a ... f have ranks 1 ... 6."""
    monkeypatch.setattr(paged, "_spare", 6)
    assert paged.loaded == [] and paged.names == NAMES
    paged.set([Weights({"a": 1.0})])
    paged.set([Weights({"b": 1.0})])
    assert paged.stacked == ["a", "b"] == paged.loaded  # both have room in memory and in the stack
    first = paged.parts["model.layers.0.self_attn.q_proj"].A
    paged.set([Weights({"a": 1.0, "c": 0.0})])
    assert paged.parts["model.layers.0.self_attn.q_proj"].A is first  # nothing new, nothing done
    paged.set([Weights({"d": 1.0})])
    assert paged.stacked == ["a", "d"] and paged.loaded == ["a", "d"]  # b was used longest ago
    paged.set([Weights(dict.fromkeys("abcd", 1.0))])
    assert paged.stacked == list("abcd")  # more than is to stay, while they are used
    paged.set([Weights({"d": 1.0, "c": 1.0})])
    assert paged.stacked == list("abcd")  # 10 ranks for 7
    paged.set([Weights({"c": 1.0})])
    assert paged.stacked == ["c"] and paged.loaded == [
        "d",
        "c",
    ]  # 10 for 3; d stays in memory, and is too wide to spare
    paged.set([Weights({"e": 1.0})], beside=[Weights({"a": 1.0, "b": 0.0}), Weights({"c": 1.0})])
    assert paged.stacked == ["a", "c", "e"]


def test_adding_and_removing(base, bank, paged):
    merged = merge(bank, Weights({"a": 1.0, "b": 1.0}), "ties").adapter
    paged.add(merged, "m")
    with pytest.raises(LoralloyError, match="there is an adapter 'm' already"):
        paged.add(merged, "m")
    paged.set([Weights({"m": 1.0})])
    first = logits(base, IDS)
    paged.remove("m")
    with pytest.raises(LoralloyError, match="'m', which is not in the bank"):
        paged.set([Weights({"m": 1.0})])
    paged.add(merge(bank, Weights({"b": 1.0, "a": -1.0}), "ties").adapter, "m")  # another of that name
    paged.set([Weights({"m": 1.0})])
    second = logits(base, IDS)
    assert not close(first, second)
    paged.set(None)
    alone = PagedModel(base, Bank([merge(bank, Weights({"b": 1.0, "a": -1.0}), "ties").adapter]))
    alone.set([Weights({"merged": 1.0})])
    assert close(logits(base, IDS), second)
    alone.close()
    with pytest.raises(LoralloyError, match="there is no adapter 'n' here"):
        paged.remove("n")


def test_closed_it_is_the_base_to_the_bit(base, bank):
    want = logits(base, IDS)
    made = PagedModel(base, bank)
    made.set([Weights({"b": 1.0})])
    assert not torch.equal(logits(base, IDS), want)
    made.set([Weights({"b": 0.0})])
    assert torch.equal(logits(base, IDS), want)
    made.set([Weights({"b": 1.0})])
    made.close()
    assert torch.equal(logits(base, IDS), want) and not any(m._forward_hooks for m in base.modules())


def test_refusals(base, bank, paged):
    with pytest.raises(LoralloyError, match="resident is 0"):
        PagedModel(base, bank, resident=0)
    with pytest.raises(
        LoralloyError, match=r"adapter 'a' has module 'model.layers.0.self_attn.q_proj', which the model does"
    ):
        PagedModel(tiny_gpt2(), bank)
    with pytest.raises(LoralloyError, match=r"module .* of adapter 'a': .*\[32, 32\].*\[16, 16\]"):
        PagedModel(tiny_llama(hidden=16), bank)
    with pytest.raises(LoralloyError, match=r"it cannot be told|but the loaded model is"):
        PagedModel(base, bank, BaseRef("other/model"))
    with pytest.raises(LoralloyError, match="no weights given"):
        paged.set([])
    with pytest.raises(LoralloyError, match="does not have"):
        paged.set([Weights({"a": {"nothing": 1.0}})])
    big = PagedModel(
        torch.nn.ModuleDict({"m": torch.nn.Linear(9, 12)}).half(), Bank([adapter({"m": factors(scaling=1e20)})])
    )
    with pytest.raises(LoralloyError, match=r"adapter 'a': module 'm': the factors overflow .*float16"):
        big.set([Weights({"a": 1.0})])
