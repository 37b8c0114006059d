"""What cannot be composed right is refused: the message has the adapter's name, the field or tensor, the way out."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import Nest, peft_folder, peft_model
from loralloy.adapter import Adapter
from loralloy.adapter_config import AdapterConfig
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return peft_folder(Nest(), tmp_path_factory.mktemp("good") / "spam", 1, target_modules=["lin"])


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "spam")


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    data = {k: v.clone() for k, v in load_file(file).items()}
    change(data)
    save_file(data, file, {"format": "pt"})


def refused(folder, *says):
    """Opening or reading it raises; the message names the adapter and says every one of these."""
    with pytest.raises(LoralloyError) as caught:
        Adapter.load(folder).validate()
    message = str(caught.value)
    assert message.startswith("adapter 'spam'"), message
    for part in says:
        assert part in message, f"{part!r} is missing in: {message}"
    assert message.count("adapter 'spam'") == 1, message


def test_the_good_one_is_good(folder):
    assert set(Adapter.load(folder).validate()) == {"lin", "block.lin"}


FIELDS = [
    ({"use_dora": True}, ["'use_dora'", "retrain with use_dora=false"]),
    ({"lora_bias": True}, ["'lora_bias'", "retrain with lora_bias=false"]),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ["'target_parameters'", "target modules"]),
    ({"kasa_config": {"beta": 1}}, ["'kasa_config'", "fold it into A"]),
    ({"alora_invocation_tokens": [1, 2]}, ["'alora_invocation_tokens'"]),
    ({"use_qalora": True}, ["'use_qalora'", "retrain without"]),
    ({"use_bdlora": {"x": 1}}, ["'use_bdlora'", "retrain without"]),
    ({"arrow_config": {"top_k": 3}}, ["'arrow_config'", "load those adapters"]),
    ({"monteclora_config": {"x": 1}}, ["'monteclora_config'", "export a plain LoRA"]),
    ({"layer_replication": [[0, 4], [2, 5]]}, ["'layer_replication'"]),
    ({"trainable_token_indices": [5]}, ["'trainable_token_indices'", "retrain without"]),
    ({"megatron_config": {"x": 1}}, ["'megatron_config'", "plain adapter"]),
    ({"init_lora_weights": "pissa"}, ["'init_lora_weights'", "'pissa'", "path_initial_model_for_weight_conversion"]),
    ({"init_lora_weights": "pissa_niter_16"}, ["'init_lora_weights'"]),
    ({"init_lora_weights": "olora"}, ["'init_lora_weights'"]),
    ({"init_lora_weights": "corda"}, ["'init_lora_weights'"]),
    ({"init_lora_weights": "loftq"}, ["'init_lora_weights'"]),
    ({"init_lora_weights": "lora_ga"}, ["'init_lora_weights'"]),
    ({"bias": "all"}, ["'bias'", "'all'", "bias='none'"]),
    ({"bias": "lora_only"}, ["'bias'", "bias='none'"]),
    ({"peft_type": "IA3"}, ["'peft_type'", "'IA3'", "only LORA"]),
    ({"peft_type": None}, ["'peft_type'"]),
    ({"use_magic": {"a": 1}}, ["'use_magic'", "does not know", "remove the field"]),
    ({"r": 5}, ["'block.lin'", "4 rows", "rank 5", "rank_pattern"]),
    ({"rank_pattern": {"lin": 9}}, ["4 rows", "rank 9", "rank_pattern"]),
    ({"r": 0}, ["'r'", "positive integer"]),
    ({"r": True}, ["'r'", "positive integer"]),
    ({"r": "4"}, ["'r'", "positive integer"]),
    ({"lora_alpha": None}, ["'lora_alpha'", "must be a number"]),
    ({"lora_alpha": math.nan}, ["'lora_alpha'", "must be a number"]),
    ({"lora_alpha": True}, ["'lora_alpha'", "must be a number"]),
    ({"rank_pattern": {"(": 4}}, ["'rank_pattern'", "regular expression"]),
    ({"rank_pattern": {"lin": 2.5}}, ["'rank_pattern'", "2.5"]),
    ({"rank_pattern": ["lin"]}, ["'rank_pattern'"]),
    ({"alpha_pattern": {"lin": "x"}}, ["'alpha_pattern'", "'x'"]),
    ({"alpha_pattern": {"lin": math.inf}}, ["'alpha_pattern'", "inf"]),
]


@pytest.mark.parametrize(("fields", "says"), FIELDS, ids=[f"{next(iter(f.items()))}" for f, _ in FIELDS])
def test_fields(folder, fields, says):
    edit(folder, **fields)
    refused(folder, *says)


def test_unknown_but_unset_fields_pass(folder):
    edit(folder, use_magic=False, other_magic=None, third={}, loftq_config={})
    Adapter.load(folder).validate()


A, B = "base_model.model.lin.lora_A.weight", "base_model.model.lin.lora_B.weight"


def put(key, value):
    return lambda data: data.__setitem__(key, value)


def poke(key, value):
    return lambda data: data[key].view(-1).__setitem__(3, value)


TENSORS = [
    (poke(A, math.nan), [A, "NaN or infinity", "damaged"]),
    (poke(B, math.inf), [B, "NaN or infinity"]),
    (poke(B, -math.inf), [B, "NaN or infinity"]),
    (put(B, torch.zeros(6, 3)), ["'lin'", "A [4, 6] and B [6, 3] do not fit"]),
    (put(A, torch.zeros(4)), ["'lin'", "A [4] and B [6, 4] do not fit"]),
    (lambda data: data.pop(B), ["'lin'", "no factor B", "incomplete", "fetch or save it again"]),
    (lambda data: data.pop(A), ["'lin'", "no factor A"]),
    (lambda data: data.clear(), ["no LoRA module"]),
    (
        put("base_model.model.lin.lora_magnitude_vector", torch.ones(6)),
        ["lora_magnitude_vector", "DoRA", "use_dora=false"],
    ),
    (put("base_model.model.lin.lora_B.bias", torch.ones(6)), ["lora_B.bias", "lora_bias=false"]),
    (put("base_model.model.lin.lora_C.weight", torch.ones(6)), ["lora_C.weight", "not a LoRA tensor"]),
    (
        put("base_model.model.lin.lora_A.other.weight", torch.ones(4, 6)),
        ["'lin'", "two A factors", "save them one by one"],
    ),
    (put("base_model.model.lm_head.weight", torch.tensor([math.nan])), ["'lm_head.weight'", "NaN or infinity"]),
]


@pytest.mark.parametrize(("change", "says"), TENSORS, ids=[s[0] + s[1] if len(s) > 1 else s[0] for _, s in TENSORS])
def test_tensors(folder, change, says):
    tensors(folder, change)
    refused(folder, *says)


def test_real_dora_and_pissa_made_by_peft(tmp_path):
    """Not only fields we typed: what PEFT itself writes."""
    peft_folder(Nest(), tmp_path / "spam", target_modules=["lin"], use_dora=True)
    refused(tmp_path / "spam", "'use_dora'", "merge_and_unload")
    peft_folder(Nest(), tmp_path / "p" / "spam", target_modules=["lin"], init_lora_weights="pissa")
    refused(tmp_path / "p" / "spam", "'pissa'", "path_initial_model_for_weight_conversion")
    peft_folder(Nest(), tmp_path / "b" / "spam", target_modules=["lin"], lora_bias=True)
    refused(tmp_path / "b" / "spam", "'lora_bias'")


def test_another_peft_method(tmp_path):
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["lin"], feedforward_modules=[])
    get_peft_model(Nest(), config).save_pretrained(str(tmp_path / "spam"))
    refused(tmp_path / "spam", "'peft_type'", "'IA3'")


def test_pickle_only(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04never opened")
    refused(folder, "adapter_model.bin", "pickle", "safe_serialization=True")


@pytest.mark.parametrize("keep", [0, 5, 40, 0.5, 0.999])
def test_torn_file(folder, keep):
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refused(folder, "adapter_model.safetensors", "torn or damaged", "fetch it again")


@pytest.mark.parametrize("text", ["", "{", '{"r": 4,', "\x00\x01"])
def test_torn_config(folder, text):
    (folder / "adapter_config.json").write_text(text)
    refused(folder, "adapter_config.json", "not valid JSON", "fetch it again")


def test_config_that_is_no_object_and_no_text(folder):
    (folder / "adapter_config.json").write_text("[1]")
    refused(folder, "adapter_config.json", "expected a JSON object")
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe\xff")
    refused(folder, "adapter_config.json", "not valid JSON")


def test_missing_files(folder, tmp_path):
    (folder / "adapter_config.json").unlink()
    refused(folder, "holds no adapter_config.json", "alpha")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "holds no adapter_model.safetensors", "not an adapter folder")
    with pytest.raises(LoralloyError, match=r"adapter folder .* does not exist; give a folder, or a hub id"):
        Adapter.load(tmp_path / "nowhere" / "at" / "all")


def test_header_of_a_newer_program(folder):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"loralloy": json.dumps({"version": 2})})
    refused(folder, "version 2", "update loralloy")
    save_file(load_file(file), file, {"loralloy": "{"})
    refused(folder, "'loralloy'", "not JSON")
    save_file(load_file(file), file, {"loralloy": "[]"})
    refused(folder, "'loralloy'")


def test_an_adapter_of_nothing():
    with pytest.raises(LoralloyError, match="adapter 'x': it has no LoRA module"):
        Adapter("x", {}, AdapterConfig(4, 4.0), BaseRef())


def test_converted_pissa_is_accepted(tmp_path):
    """The way out that the message names leads out."""
    base = Nest()
    model = peft_model(base, 1, target_modules=["lin"], init_lora_weights="pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "init"))
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    model.save_pretrained(str(tmp_path / "out"), path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    loaded = Adapter.load(tmp_path / "out").validate()
    assert loaded.max_rank == 8
