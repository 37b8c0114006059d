"""Adapters in other people's formats: converted where the meaning is known, else refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import delta, factors, peft_folder, tiny_llama
from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError


def write_diffusers(folder, keys, metadata=None):
    folder.mkdir()
    save_file(keys, folder / "pytorch_lora_weights.safetensors", metadata or {"format": "pt"})


@pytest.mark.parametrize(
    "form",
    [
        "{m}.lora_A.weight|{m}.lora_B.weight",
        "{m}.lora.down.weight|{m}.lora.up.weight",
        "{m}_lora.down.weight|{m}_lora.up.weight",
        "{m}.lora_linear_layer.down.weight|{m}.lora_linear_layer.up.weight",
    ],
)
def test_diffusers_form_is_converted(form, tmp_path):
    f = factors(rank=3, scaling=1.0)
    down, up = form.format(m="unet.down_blocks.0.attn.to_q").split("|")
    write_diffusers(tmp_path / "a", {down: f.A, up: f.B})
    loaded = Adapter.load(tmp_path / "a")
    assert list(loaded) == ["unet.down_blocks.0.attn.to_q"]
    assert torch.equal(loaded["unet.down_blocks.0.attn.to_q"].dense(), f.dense())


def test_diffusers_alphas(tmp_path):
    """A stored alpha per module, or one in the header; else alpha = r."""
    f = factors(rank=3, scaling=1.0)
    m = "unet.to_q"
    keys = {f"{m}.lora.down.weight": f.A, f"{m}.lora.up.weight": f.B}
    write_diffusers(tmp_path / "a", keys | {f"{m}.alpha": torch.tensor(6.0)})
    assert Adapter.load(tmp_path / "a")[m].scaling == 2.0
    write_diffusers(
        tmp_path / "b", keys, {"format": "pt", "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 12})}
    )
    assert Adapter.load(tmp_path / "b")[m].scaling == 4.0


def test_kohya_is_refused(tmp_path):
    write_diffusers(tmp_path / "k", {"lora_unet_down_blocks_0_to_q.lora_down.weight": torch.zeros(2, 3)})
    with pytest.raises(LoralloyError, match=r"adapter 'k'.*kohya's form.*save it again with pipe.save_lora_weights"):
        Adapter.load(tmp_path / "k")


def test_lokr_and_other_diffusers_keys_are_refused(tmp_path):
    f = factors()
    keys = {"unet.q.lora.down.weight": f.A, "unet.q.lora.up.weight": f.B, "unet.k.lokr_w1": torch.zeros(2, 2)}
    write_diffusers(tmp_path / "k", keys)
    with pytest.raises(LoralloyError, match=r"adapter 'k'.*'unet.k.lokr_w1'"):
        Adapter.load(tmp_path / "k")


def test_named_adapter_keys(tmp_path):
    """Keys with the adapter's name in them (get_peft_model_state_dict not used) are PEFT's too."""
    peft_folder(tiny_llama(), tmp_path / "a", 1, target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    want = delta(Adapter.load(tmp_path / "a"))
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    save_file({k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, file)
    got = delta(Adapter.load(tmp_path / "a"))
    assert set(got) == set(want) and all(torch.equal(got[m], want[m]) for m in want)
