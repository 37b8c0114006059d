"""A base in 4 or 8 bit (bitsandbytes): compositions on it are PEFT's on the same base; what would write into it refuses."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import adapter, close, factors, logits
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.exporting.base import export_into_base
from loralloy.factors import LoraFactors
from loralloy.live import LiveModel
from loralloy.live.base import base_fingerprint, load_base
from loralloy.live.fit import check_fit, packed
from loralloy.live.learnable import Learnable
from loralloy.live.paged import PagedModel
from loralloy.live.quantised import as_in_files
from loralloy.merging import merge
from loralloy.weights import Weights
from world import make_world

needed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'loralloy[quantised]'",
)
kinds = pytest.mark.parametrize("kind", ["4bit", "8bit"])
IDS = torch.arange(3, 27).reshape(3, 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def bank(world):
    return Bank.load(world.bank)


@pytest.fixture(scope="module")
def rows(bank):
    a, b, c = bank.names[:3]
    part = {"*": 0.7, "model.layers.0.self_attn.q_proj": -1.0, "model.layers.1.mlp.up_proj": 0.0}
    return [Weights({a: 1.0}), Weights({a: 0.6, b: -0.5, c: 1.2}), Weights({b: part, c: 0.3})]


def load(folder, kind, dtype="float32"):
    return load_base(str(folder), dtype, "cpu", kind)[0]


def in_peft(base, bank, rows, root):
    """PEFT on this base, with each row's merged adapter as "0", "1", ...; nothing has run in the base before."""
    from peft import PeftModel

    for i, weights in enumerate(rows):
        merge(bank, weights, "linear").adapter.save(root / str(i))
    model = PeftModel.from_pretrained(base, str(root / "0"), adapter_name="0")
    for i in range(1, len(rows)):
        model.load_adapter(str(root / str(i)), adapter_name=str(i))
    return model.eval()


def widen(model, bank=None, rows=()):
    """All but the packed weights in float64, and PEFT's merged factors too, as merged in float64.

    LLM.int8() rounds activations to 8 bits: in float32 the last bit of a sum, which depends on its order, turns some of these
    roundings, and what follows is off by steps of 1/127. In float64 it turns none, and the same computation gives the same.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.double()
    wide = {
        name: {m: LoraFactors(a[m].A.double(), a[m].B.double(), a[m].scaling) for m in a}
        for name, a in (bank or {}).items()
    }
    for i, weights in enumerate(rows):
        merged = merge(Bank([adapter(parts, name) for name, parts in wide.items()]), weights, "linear").adapter
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "base_layer"):
                f = merged[name]
                assert f.A.dtype == torch.float64 and f.A.shape == module.lora_A[str(i)].weight.shape
                module.lora_A[str(i)].weight.data, module.lora_B[str(i)].weight.data = f.A, f.B
                module.scaling[str(i)] = f.scaling


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def both(request, world, bank, rows, tmp_path_factory):
    """One kind's live model and PEFT's, each on a base of its own; in float32, or for 8 bit in float64."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'loralloy[quantised]'")
    base = load(world.model, request.param)
    peft = in_peft(load(world.model, request.param), bank, rows, tmp_path_factory.mktemp("merged"))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "8bit":
            for where in ("composed", "paged"):
                patch.setattr(f"loralloy.live.{where}.place", lambda target: (torch.float64, torch.device("cpu")))
            widen(base)
            widen(peft, bank, rows)
        live = LiveModel(base, bank)
        yield SimpleNamespace(kind=request.param, live=live, model=base, peft=peft, names=["0", "1", "2"])


# -- compositions ------------------------------------------------------------------------------------------------------


def test_the_layers_are_packed(both):
    import bitsandbytes

    layer = both.model.model.layers[0].self_attn.q_proj
    wanted = bitsandbytes.nn.Linear4bit if both.kind == "4bit" else bitsandbytes.nn.Linear8bitLt
    assert isinstance(layer, wanted) and packed(layer) and not packed(both.model.lm_head)
    assert not packed(both.model.model.embed_tokens) and not packed(nn.Linear(3, 5)) and not packed(nn.ReLU())
    assert not packed(nn.Embedding(3, 5))


def test_every_layer_adds_what_peft_adds(both, rows):
    """Given what PEFT's layer is given in a mixed batch, the layer gives what PEFT's gives: no rounding comes between."""
    seen = {}
    layers = {n: m for n, m in both.peft.base_model.model.named_modules() if hasattr(m, "base_layer")}
    handles = [
        m.register_forward_hook(lambda _, x, y, n=n: seen.__setitem__(n, (x[0].clone(), y.clone())))
        for n, m in layers.items()
    ]
    logits(both.peft, IDS, adapter_names=both.names)
    for handle in handles:
        handle.remove()
    assert seen.keys() == both.live.parts.keys()
    mine = dict(both.model.named_modules())
    with torch.no_grad():
        for name, (x, want) in seen.items():
            plain = mine[name](x)
            with both.live.compose(rows):
                assert close(mine[name](x), want), name
            assert float((want - plain).abs().max()) > 1e-2


def test_a_mixed_batch(both, rows, bank):
    plain = logits(both.model, IDS)
    want = logits(both.peft, IDS, adapter_names=both.names)
    with both.live.compose(rows) as model:
        got = logits(model, IDS)
    assert close(got, want, 1e-4) and float((want - plain).abs().max()) > 0.1
    for i, weights in enumerate(rows):
        both.peft.set_adapter(str(i))
        with both.live.compose(weights) as model:
            assert close(logits(model, IDS), logits(both.peft, IDS), 1e-4)
            if both.kind == "4bit":  # LLM.int8() picks outlier columns by batch: there a row is not the same alone
                assert close(logits(model, IDS[i : i + 1])[0], got[i], 1e-4)
    paged = PagedModel(both.model, bank, resident=1)
    paged.set(rows)
    assert close(logits(both.model, IDS), got, 1e-4)
    paged.close()
    assert torch.equal(logits(both.model, IDS), plain)


def test_with_the_cache(both, rows):
    """A prompt, then token by token over the cache, padded on the left."""
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def steps(model, **more):
        out, cache = [], None
        for part in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 8)):
            with torch.no_grad():
                done = model(
                    input_ids=IDS[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part],
                    past_key_values=cache, use_cache=True, **more,
                )  # fmt: skip
            cache = done.past_key_values
            out.append(done.logits)
        return torch.cat(out, 1)[mask.bool()]

    want = steps(both.peft, adapter_names=both.names)
    with both.live.compose(rows) as model:
        assert close(steps(model), want, 1e-4)


@needed
@kinds
def test_in_bfloat16(kind, world, bank, rows, tmp_path):
    """No further from the float32 truth (the same packed base computing in float32) than 1.5 times PEFT's distance."""
    truth_live = LiveModel(load(world.model, kind), bank)
    live = LiveModel(load(world.model, kind, "bfloat16"), bank)
    with truth_live.compose(rows) as model:
        truth = logits(model, IDS)
    with live.compose(rows) as model:
        got = logits(model, IDS)
    peft = in_peft(load(world.model, kind, "bfloat16"), bank, rows, tmp_path)
    want = logits(peft, IDS, adapter_names=["0", "1", "2"])
    assert got.dtype == torch.bfloat16
    assert float((got - truth).square().mean()) ** 0.5 <= 1.5 * float((want - truth).square().mean()) ** 0.5


@needed
@pytest.mark.real
@kinds
def test_the_real_base(kind, real_model_folder, real_bank_folder, tmp_path):
    """SmolLM2 with the shipped bank. In 8 bit a last bit may turn a rounding of activations: there, distances to the truth."""
    bank = Bank.load(real_bank_folder)
    a, b, c, d = bank.names[:4]
    rows = [Weights({a: 1.0}), Weights({b: 0.6, c: -0.4, d: 0.3}), Weights({d: 0.5, a: 0.5})]
    ids = torch.arange(60).reshape(3, 20) * 37 + 100
    full = load_base(str(real_model_folder), "float32", "cpu")[0]
    with LiveModel(full, bank).compose(rows) as model:
        truth = logits(model, ids)
    base = load(real_model_folder, kind)
    mark = BaseRef(None, None, base_fingerprint(base))
    assert mark.fingerprint == base_fingerprint(full)
    with LiveModel(base, bank, mark).compose(rows) as model:
        got = logits(model, ids)
    want = logits(in_peft(load(real_model_folder, kind), bank, rows, tmp_path), ids, adapter_names=["0", "1", "2"])
    if kind == "4bit":
        assert close(got, want, 1e-4)
    assert float((got - truth).square().mean()) ** 0.5 <= 1.1 * float((want - truth).square().mean()) ** 0.5


# -- what it is --------------------------------------------------------------------------------------------------------


def test_files_tell_the_fingerprint(world, monkeypatch, tmp_path):
    """Without loading the model; where its tensors are not the model's parameters, by loading it after all."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(world.model))
    plain = base_fingerprint(load_base(str(world.model), "float32", "cpu")[0])
    found = as_in_files(world.model, config)
    assert not isinstance(found, nn.Module) and base_fingerprint(found) == plain
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(LoralloyError, match=r"model\.safetensors cannot be read"):
        as_in_files(tmp_path, config)
    other = [(name, tensor[:1]) for name, tensor in found.named_parameters()]
    monkeypatch.setattr(type(found), "named_parameters", lambda self: iter(other))
    loaded = as_in_files(world.model, config)
    assert isinstance(loaded, nn.Module) and base_fingerprint(loaded) == plain


@needed
@kinds
def test_it_is_the_base_of_its_files(kind, world, bank):
    base = load(world.model, kind)
    mark = BaseRef("elsewhere", None, base_fingerprint(base))
    assert mark.fingerprint == base_fingerprint(load_base(str(world.model), "float32", "cpu")[0])
    LiveModel(base, bank, mark).remove()
    del base._loralloy_fingerprint
    with pytest.raises(LoralloyError, match="quantised: load the base in bfloat16 or float32"):
        base_fingerprint(base)


# -- refusals ----------------------------------------------------------------------------------------------------------


@needed
@kinds
def test_what_would_write_into_weights_refuses(kind, world, bank, tmp_path):
    base = load(world.model, kind)
    with pytest.raises(LoralloyError, match=r"is a quantised Linear\w+; load the model in float32 or bfloat16"):
        Learnable(base, bank)
    layer = base.model.layers[0].mlp.up_proj
    name, whole = "model.layers.0.mlp.up_proj", factors(layer.out_features, layer.in_features, 2)
    check_fit(name, layer, whole)
    with pytest.raises(LoralloyError, match=r"expects a weight of \[7, 32\], the model has \[48, 32\]"):
        check_fit(name, layer, LoraFactors(whole.A, whole.B[:7], 1.0))
    base.save_pretrained(tmp_path / "packed")
    with pytest.raises(LoralloyError, match="quantised"):
        export_into_base(bank[bank.names[0]], tmp_path / "packed", tmp_path / "out", assume_same_base=True)
    with pytest.raises(LoralloyError, match="is quantised already, in its files; leave 4bit out"):
        load_base(str(tmp_path / "packed"), "float32", "cpu", "4bit")


@needed
def test_four_bits_in_a_floating_tensor_are_told_apart(world, bank):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(world.model, quantization_config=config, device_map={"": "cpu"})
    assert base.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    with pytest.raises(LoralloyError, match="quantised: load the base"):
        base_fingerprint(base)
    with pytest.raises(LoralloyError, match="is a quantised Linear4bit"):
        Learnable(base, bank)


def test_refusals_say_the_way_out(world, monkeypatch):
    with pytest.raises(LoralloyError, match="quantisation '3bit' \\(--load-in\\) is unknown; load in 4bit or 8bit"):
        load_base(str(world.model), "float32", "cpu", "3bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LoralloyError, match=r"in 8bit needs bitsandbytes: pip install 'loralloy\[quantised\]'"):
        load_base(str(world.model), "float32", "cpu", "8bit")
    broken = SimpleNamespace(__version__="0.1", nn=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes", broken)
    with pytest.raises(LoralloyError, match=r"bitsandbytes 0\.1 does not run in 4bit on cpu: .*Linear4bit"):
        load_base(str(world.model), "float32", "cpu", "4bit")


@needed
@kinds
def test_the_command(kind, world, bank, tmp_path, capsys, monkeypatch, caplog):
    from loralloy.cli import main

    Weights({bank.names[0]: 0.6, bank.names[1]: 0.4}).save(tmp_path / "w.json")
    line = (
        f"loralloy ask hello --options yes,no --template none --json --load-in {kind} --weights {tmp_path / 'w.json'}"
    )
    monkeypatch.setattr(sys, "argv", [*line.split(), *world.flags("model", "bank")])
    with caplog.at_level(logging.WARNING):
        try:
            main()
        except SystemExit as leave:
            assert not leave.code, capsys.readouterr()
    assert json.loads(capsys.readouterr().out)["answer"] in ("yes", "no")
    assert "MatMul8bitLt" not in caplog.text  # it would say so at each layer of each step
