"""The base model: references, refusals, dtypes, and a fingerprint that knows the weights and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from loralloy.errors import LoralloyError
from loralloy.live.base import _fast_cpu_dtype, agree_on_the_end, base_fingerprint, load_base, pick_device, pick_dtype


def test_refusals_say_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(LoralloyError, match="make setup"):
        load_base("./no/such/folder")
    with pytest.raises(LoralloyError, match=r"config\.json"):
        load_base(str(tmp_path))
    with pytest.raises(LoralloyError, match=r"no-org/no-model@0"):  # the tests run offline
        load_base("no-org/no-model@0")
    with pytest.raises(LoralloyError, match="org/model@<commit or tag>"):  # an unpinned id is another model next year
        load_base("org/model")
    with pytest.raises(LoralloyError, match="int8"):
        load_base(str(tiny.save_model(tmp_path / "m")), "int8", "cpu")
    with pytest.raises(LoralloyError, match="warp"):
        pick_device("warp")


def test_the_tokenizer_ends_where_the_model_does(tmp_path: Path) -> None:
    """An adapter trained with another eos would never end its answers (transformers 5.17 on SmolLM2's GGUF)."""
    model, tokenizer = load_base(str(tiny.save_model(tmp_path / "m")), "float32", "cpu")
    right = tokenizer.eos_token_id
    assert right == model.config.eos_token_id
    tokenizer.eos_token = "<pad>"
    agree_on_the_end(model, tokenizer)
    assert tokenizer.eos_token_id == right and tokenizer.eos_token == "<eos>"


def test_dtype_auto() -> None:
    assert pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert pick_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    pick_dtype("auto", torch.device("cpu"))
    assert _fast_cpu_dtype.cache_info().misses == 1  # measured once


def test_fingerprint_knows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    one = tiny.save_model(tmp_path / "one", seed=1, dtype="bfloat16")
    marks = [base_fingerprint(load_base(str(one), dtype, "cpu")[0]) for dtype in ("float32", "bfloat16")]
    assert marks[0] == marks[1] and marks[0].startswith("bf16-sampled-v1:") and len(marks[0]) == 16 + 64
    model, tokenizer = load_base(str(one), "float32", "cpu")
    assert tokenizer.padding_side == "left" and not model.training
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert base_fingerprint(wrapped) == marks[0]
    with torch.no_grad():
        wrapped.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] += 1
    assert base_fingerprint(wrapped) != marks[0]
    other = load_base(str(tiny.save_model(tmp_path / "two", seed=2)), "float32", "cpu")[0]
    assert base_fingerprint(other) != marks[0]
    with pytest.raises(LoralloyError, match="not loaded"):
        base_fingerprint(other.to("meta"))


@pytest.mark.real
def test_fingerprint_of_the_real_base_does_not_depend_on_the_dtype(real_model_folder: Path) -> None:
    marks = []
    for dtype in ("bfloat16", "float32"):
        model, _ = load_base(str(real_model_folder), dtype, "cpu")
        marks.append(base_fingerprint(model))
    assert marks[0] == marks[1]
