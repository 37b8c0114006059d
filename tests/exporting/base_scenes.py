"""Bases and adapters for the export, and what is compared of them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from helpers import PROJECTIONS

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def tied_llama(seed: int = 0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert_config(**more):
    return BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, **more,
    )  # fmt: skip


def saved(model: nn.Module, folder: Path, **more) -> Path:
    model.save_pretrained(str(folder), **more)
    (folder / "tokenizer_config.json").write_text('{"a": 1}')
    return folder


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def untouched_are_equal(base: Path, out: Path, touched: set[str]) -> None:
    before, after = whole(base), whole(out)
    for name, tensor in before.items():
        same = tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
        assert same == (name not in touched), name


def causal(folder: Path, **more):
    return AutoModelForCausalLM.from_pretrained(str(folder), **more).eval()


LLAMA = {"target_modules": PROJECTIONS, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}
