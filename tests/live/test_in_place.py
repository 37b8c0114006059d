"""What the live sum writes into is its own: nobody who holds a tensor of the base's sees it change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import PROJECTIONS, adapter, close, factors, peft_folder, tiny_gpt2, tiny_llama
from loralloy.bank import Bank
from loralloy.live import LiveModel
from loralloy.live.paged import PagedModel
from loralloy.weights import Weights


def tiny_vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False).eval()


IDS = {"input_ids": torch.arange(3, 27).reshape(3, 8)}
PIXELS = {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
MODELS = {
    "llama": (tiny_llama, PROJECTIONS, IDS),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj", "c_fc"], IDS),  # Conv1D
    "vit": (tiny_vit, "all-linear", PIXELS),
}


@pytest.fixture(params=MODELS)
def scene(request, tmp_path):
    make, targets, inputs = MODELS[request.param]
    model = make()
    peft_folder(model, tmp_path / "a", 0, target_modules=targets, r=3)
    return model, Bank.load(tmp_path), inputs


def watched(model, names):
    """The output of each module as a hook gets it, and a copy made at that moment."""
    seen = {}

    def watch(name):
        def hook(module, args, output):
            seen.setdefault(name, []).append((output, output.clone()))

        return hook

    found = dict(model.named_modules())
    return seen, [found[name].register_forward_hook(watch(name)) for name in names]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", [LiveModel, PagedModel])
def test_a_hook_before_ours_keeps_what_it_saw(scene, mode, kind):
    model, bank, inputs = scene
    with torch.no_grad():
        plain = model(**inputs)[0]
    seen, handles = watched(model, bank.modules)
    live = kind(model, bank)
    rows = [Weights({"a": w}) for w in (1.0, -0.5, 0.25)]
    live.set(rows)
    with mode():
        first = model(**inputs)[0]
    assert set(seen) == set(bank.modules) and all(
        torch.equal(held, then) for kept in seen.values() for held, then in kept
    )
    for handle in handles:
        handle.remove()
    live.set(rows)
    with mode():
        alone = model(**inputs)[0]  # where it may write in place
    assert close(first.detach(), alone.detach()) and not close(alone.detach(), plain, 1e-3)
    getattr(live, "close", None) or live.remove()


def test_hooks_of_all_modules_keep_what_they_saw(scene):
    model, bank, inputs = scene
    seen = []

    def watch(module, args, output):
        if isinstance(output, torch.Tensor):
            seen.append((output, output.clone()))

    live = LiveModel(model, bank)
    handle = nn.modules.module.register_module_forward_hook(watch)
    try:
        with live.compose(Weights({"a": 1.0})), torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
        live.remove()
    assert len(seen) > len(bank.modules) and all(torch.equal(held, then) for held, then in seen)


def test_hidden_states_are_those_of_the_merged_model(scene):
    """Residuals and collected hidden states are no tensors that are written into."""
    model, bank, inputs = scene
    live = LiveModel(model, bank)
    with torch.no_grad():
        with live.compose(Weights({"a": 1.0})):
            got = model(**inputs, output_hidden_states=True).hidden_states
        live.remove()
        found = dict(model.named_modules())
        for name, f in bank["a"].items():
            dw = f.dense(torch.float32)
            found[name].weight += (
                dw.T if type(found[name]).__name__ == "Conv1D" else dw.reshape(found[name].weight.shape)
            )
        want = model(**inputs, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 3 and all(close(g, w) for g, w in zip(got, want, strict=True))


class Same(nn.Linear):
    """A layer that is off: it gives back its input."""

    def forward(self, x):
        return x


class Kept(nn.Linear):
    """A layer that remembers its output."""

    kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = super().forward(x)
        return self.kept


def patched(*sizes):
    module = nn.Linear(*sizes)
    kept = Kept(*sizes)
    module.forward = kept.forward
    return module


@pytest.mark.parametrize("layer", [Same, Kept, patched])
def test_a_layer_s_output_that_is_not_new(layer):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("q_proj", layer(9, 9))
    bank = Bank([adapter({"q_proj": factors(9, 9)})])
    x = torch.randn(2, 3, 9)
    with torch.no_grad():
        plain, before = model(x).clone(), x.clone()
        live = LiveModel(model, bank)
        with live.compose(Weights({"a": 0.5})):
            got = [model(x) for _ in range(3)]
        live.remove()
        want = plain + 0.5 * x @ bank["a"]["q_proj"].dense(torch.float32).T
        assert torch.equal(x, before) and torch.equal(model(x), plain)
    assert all(close(g, want) for g in got)


def test_it_is_in_place_where_nobody_looks():
    """The other side: the module's own output is what is given back, with no copy of it."""
    model, made = nn.Sequential(), []
    model.add_module("q_proj", nn.Linear(9, 12))
    bank = Bank([adapter({"q_proj": factors(12, 9)})])
    live = LiveModel(model, bank)
    linear = nn.functional.linear

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is linear:
                made.append(out)
            return out

    with live.compose(Weights({"a": 0.5})), torch.no_grad(), Spy():
        out = model(torch.randn(2, 3, 9))
    live.remove()
    assert out is made[0]
