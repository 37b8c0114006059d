"""Live composition: each row's logits are those of a model with its merged adapter, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import (
    BASE,
    PROJECTIONS,
    ConvNet,
    adapter,
    close,
    factors,
    load_in_peft,
    logits,
    peft_folder,
    tiny_gpt2,
    tiny_llama,
)  # fmt: skip
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.live import LiveModel
from loralloy.merging import merge
from loralloy.weights import Weights

IDS = torch.arange(3, 27).reshape(3, 8)
ROWS = [
    Weights({"a": 1.0}),
    Weights({"a": 0.6, "b": -0.5, "c": 1.2}),
    Weights({"b": {"*": 0.7, "model.layers.0.self_attn.q_proj": -1.0, "model.layers.1.mlp.up_proj": 0.0}, "c": 0.3}),
]


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank(base, tmp_path_factory):
    """Mixed ranks, alphas, rsLoRA and module sets; one on the embedding and the head."""
    root = tmp_path_factory.mktemp("bank")
    peft_folder(base, root / "a", 1, target_modules=["q_proj", "v_proj"], r=2)
    peft_folder(base, root / "b", 2, target_modules=PROJECTIONS, r=5, use_rslora=True, rank_pattern={"up_proj": 3})
    peft_folder(base, root / "c", 3, target_modules=["embed_tokens", "lm_head", "down_proj"], r=3)
    return Bank.load(root)


@pytest.fixture
def live(base, bank):
    live = LiveModel(base, bank)
    yield live
    live.remove()


def merged_logits(base, bank, weights, folder, ids, **more):
    """The oracle: merged on disk, loaded by PEFT."""
    merge(bank, weights, "linear").adapter.save(folder)
    return logits(load_in_peft(base, folder), ids, **more)


@pytest.fixture(scope="module")
def truth(bank, tmp_path_factory):
    base, root = tiny_llama(), tmp_path_factory.mktemp("truth")
    return [merged_logits(base, bank, w, root / str(i), IDS) for i, w in enumerate(ROWS)]


def test_one_composition_for_all_rows(live, base, truth):
    plain = logits(base, IDS)
    for weights, want in zip(ROWS, truth, strict=True):
        with live.compose(weights) as model:
            assert close(logits(model, IDS), want)
        assert float((want - plain).abs().max()) > 1e-2


def test_each_row_its_own(live, truth):
    with live.compose(ROWS) as model:
        got = logits(model, IDS)
    for i, want in enumerate(truth):
        assert close(got[i], want[i])


def test_rows_are_as_each_alone(live):
    with live.compose(ROWS) as model:
        together = logits(model, IDS)
    for i, weights in enumerate(ROWS):
        with live.compose([weights]) as model:
            assert close(together[i], logits(model, IDS[i : i + 1])[0])


def test_left_padded_prompts(live, base):
    """A row padded on the left gives the same last logits as the row without padding."""
    ids = IDS.clone()
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    ids[2, :5], mask[2, :5] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with live.compose(ROWS) as model:
        padded = logits(model, ids, attention_mask=mask, position_ids=positions)[:, -1]
    for i, start in enumerate((0, 3, 5)):
        with live.compose(ROWS[i]) as model:
            assert close(padded[i], logits(model, IDS[i : i + 1, start:])[0, -1])


def test_generation_with_the_cache(live, base):
    """Greedy, a KV cache, three compositions in a batch: equals each alone and the run without a cache."""
    mask = torch.ones_like(IDS)
    more = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with live.compose(ROWS) as model, torch.no_grad():
        together = model.generate(input_ids=IDS, attention_mask=mask, **more)
        slow = model.generate(input_ids=IDS, attention_mask=mask, use_cache=False, **more)
    assert torch.equal(together, slow) and together.shape == (3, 14)
    for i, weights in enumerate(ROWS):
        with live.compose(weights) as model, torch.no_grad():
            alone = model.generate(input_ids=IDS[i : i + 1], attention_mask=mask[:1], **more)
        assert torch.equal(alone[0], together[i])
    with torch.no_grad():
        plain = base.generate(input_ids=IDS, attention_mask=mask, **more)
    assert not torch.equal(plain, together)


def test_outside_the_base_is_the_base_to_the_bit(base, bank):
    before = {k: v.clone() for k, v in base.state_dict().items()}
    want = logits(base, IDS)
    live = LiveModel(base, bank)
    assert torch.equal(logits(base, IDS), want)
    with live.compose(ROWS):
        assert not torch.equal(logits(base, IDS), want)
    assert torch.equal(logits(base, IDS), want)
    with live.compose(Weights({"a": 0.0})), live.compose(None):
        assert torch.equal(logits(base, IDS), want)
    with live.compose(ROWS):
        live.remove()
        assert torch.equal(logits(base, IDS), want)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert not any(module._forward_hooks for module in base.modules())


def test_nested_compositions_and_errors_restore(live, base, truth):
    plain = logits(base, IDS)
    with live.compose(ROWS[0]) as model:
        with live.compose(ROWS):
            logits(model, IDS)
        assert close(logits(model, IDS), truth[0])
        with live.compose(None):
            assert torch.equal(logits(model, IDS), plain)
        with (
            pytest.raises(LoralloyError, match="weights name adapter 'x', which is not in the bank"),
            live.compose([Weights({"x": 1})]),
        ):
            pass
        assert close(logits(model, IDS), truth[0])
    with pytest.raises(RuntimeError, match="mine"), live.compose(ROWS[0]):
        raise RuntimeError("mine")
    assert torch.equal(logits(base, IDS), plain)


def test_set_stays_until_changed(live, base, truth):
    live.set(ROWS[1])
    assert close(logits(base, IDS), truth[1])
    live.set(None)
    assert float((logits(base, IDS) - truth[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("rows", [ROWS[:2], [ROWS[0], ROWS[0]], ROWS + ROWS[:1]])
def test_wrong_row_count(live, rows):
    with (
        live.compose(rows) as model,
        pytest.raises(LoralloyError, match=f"set for {len(rows)} rows but the batch has 3"),
    ):
        logits(model, IDS)


def test_no_weights(live):
    with pytest.raises(LoralloyError, match="no weights given"):
        live.set([])


def test_a_misspelt_module_is_refused(live):
    with pytest.raises(LoralloyError, match="does not have"):
        live.set(Weights({"a": {"model.layers.0.self_attn.q_prj": 1.0}}))


def test_two_banks_on_one_model_add_up(base, bank, truth):
    """Hooks of two LiveModels do not know of each other: a merged one can take the place of a bank."""
    one, two = LiveModel(base, bank.select(["a"])), LiveModel(base, bank.select(["b", "c"]))
    with one.compose(Weights({"a": 0.6})), two.compose(Weights({"b": -0.5, "c": 1.2})):
        assert close(logits(base, IDS), truth[1])
    one.remove()
    two.remove()


def test_bfloat16_base(base, bank, truth):
    model = tiny_llama().to(torch.bfloat16)
    live = LiveModel(model, bank)
    with live.compose(ROWS):
        got = logits(model, IDS).float()
    assert got.dtype == torch.float32 and float((got[1] - truth[1][1]).abs().max()) < 0.1


def test_gpt2_conv1d(tmp_path):
    base = tiny_gpt2()
    for i, name in enumerate("ab"):
        peft_folder(
            base, tmp_path / "bank" / name, i, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, r=2 + i
        )
    bank = Bank.load(tmp_path / "bank")
    rows = [Weights({"a": 1.0}), Weights({"a": 0.5, "b": -2}), Weights({"b": 1.0})]
    want = [merged_logits(base, bank, w, tmp_path / str(i), IDS) for i, w in enumerate(rows)]
    live = LiveModel(base, bank)
    with live.compose(rows):
        got = logits(base, IDS)
    assert all(close(got[i], want[i][i]) for i in range(3))


def test_convolutions(tmp_path):
    base = ConvNet()
    for i, name in enumerate("ab"):
        peft_folder(base, tmp_path / "bank" / name, i, target_modules=["one", "two", "point", "three", "out"], r=2 + i)
    bank = Bank.load(tmp_path / "bank")
    rows = [Weights({"a": 1.0}), Weights({"a": 0.5, "b": -1}), Weights({"b": 1.0})]
    x = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0))
    # Reshapes inside the net spread one input over rows, so each composition runs alone, and by row on the first layer.
    live = LiveModel(base, bank)
    for i, weights in enumerate(rows):
        merge(bank, weights, name="m").adapter.save(tmp_path / f"m{i}")
        with live.compose(weights), torch.no_grad():
            assert close(base(x), load_in_peft(base_copy(base), tmp_path / f"m{i}")(x))
    with live.compose(rows), torch.no_grad():
        got = base.one(x)
    for i, weights in enumerate(rows):
        with live.compose(weights), torch.no_grad():
            assert close(got[i], base.one(x)[i])


def base_copy(model):
    """A fresh ConvNet of the same seed: a copy of a hooked model would carry the hooks along."""
    fresh = type(model)()
    fresh.load_state_dict(model.state_dict())
    return fresh


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_wrong_model(bank):
    with pytest.raises(
        LoralloyError, match=r"adapter 'a' has module 'model.layers.0.self_attn.q_proj', which the model does not"
    ):
        LiveModel(tiny_gpt2(), bank)
    with pytest.raises(
        LoralloyError, match=r"module 'model.layers.0.self_attn.q_proj' of adapter 'a': .*\[32, 32\].*\[16, 16\]"
    ):
        LiveModel(tiny_llama(hidden=16), bank)


def test_added_tokens(bank):
    model = tiny_llama(vocab=66)
    with pytest.raises(
        LoralloyError, match=r"module 'lm_head' of adapter 'c': .*\[64, 32\], the model has \[66, 32\].*tokens"
    ):
        LiveModel(model, bank.select(["c"]))
    assert not any(module._forward_hooks for module in model.modules())


def test_wrong_base():
    model, mark = nn.ModuleDict({"m": nn.Linear(9, 12)}), "bf16-sampled-v1:"
    named = Bank([adapter({"m": factors()}, "a", BaseRef(BASE, None, mark + "1"))])
    with pytest.raises(LoralloyError, match=r"adapters are of tiny/llama.*fingerprints.*differ.*--assume-same-base"):
        LiveModel(model, named, BaseRef(BASE, None, mark + "2"))
    with pytest.raises(LoralloyError, match=r"adapters are of tiny/llama .*, but the loaded model is other/model"):
        LiveModel(model, named, BaseRef("other/model"))
    with pytest.raises(
        LoralloyError, match=r"it cannot be told whether that is /disk/llama .*only by path.*--assume-same-base"
    ):
        LiveModel(model, named, BaseRef("/disk/llama"))
    LiveModel(model, named, BaseRef("/disk/llama", None, mark + "1"))
    LiveModel(model, named, BaseRef("other/model"), assume_same_base=True)
    LiveModel(model, named)


@pytest.mark.parametrize(
    ("part", "target", "says"),
    [
        (factors(), nn.LayerNorm(9), "LayerNorm there, which is not a linear"),
        (factors(), nn.Dropout(), "Dropout there, which has no weight"),
        (
            LoraFactors(torch.ones(2, 3, 3), torch.ones(8, 2, 1), 1.0, "conv"),
            nn.Linear(9, 12),
            "convolution factors, the model a Linear",
        ),
        (
            LoraFactors(torch.ones(2, 4, 3), torch.ones(8, 2, 1), 1.0, "conv"),
            nn.Conv1d(4, 8, 3, groups=2),
            "groups cannot be composed",
        ),
    ],
)
def test_targets_that_do_not_fit(part, target, says):
    with pytest.raises(LoralloyError, match=f"module 'm' of adapter 'a': .*{says}"):
        LiveModel(nn.ModuleDict({"m": target}), Bank([adapter({"m": part})]))


def test_saved_modules_are_refused():
    head = adapter({"m": factors()}, extra={"head.weight": torch.ones(2)})
    with pytest.raises(LoralloyError, match=r"adapter 'a' saved whole modules \(head.weight, not the model's own\)"):
        LiveModel(nn.ModuleDict({"m": nn.Linear(9, 12)}), Bank([head]))
    model = nn.ModuleDict({"m": nn.Linear(9, 12), "head": nn.Linear(3, 2)})
    copy = {"head.weight": model["head"].weight.detach().clone()}
    LiveModel(model, Bank([adapter({"m": factors()}, extra=copy)])).remove()  # a copy of the model's own says nothing
    with pytest.raises(LoralloyError, match="not the model's own"):
        LiveModel(model, Bank([adapter({"m": factors()}, extra={"head.weight": copy["head.weight"] + 1e-3})]))


def test_factors_that_overflow_the_model_s_dtype():
    big = Bank([adapter({"m": factors(scaling=1e20)})])
    with pytest.raises(LoralloyError, match=r"module 'm': the factors overflow .*float16; load the model in float32"):
        LiveModel(nn.ModuleDict({"m": nn.Linear(9, 12)}).half(), big)
