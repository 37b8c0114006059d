"""Adapters of vision transformers under the names that older versions of transformers gave their modules."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from helpers import adapter, factors, generator
from loralloy.adapter import Adapter
from loralloy.base_ref import BaseRef

Old = TypeVar("Old", str, Adapter)
# written down from both versions' models, not taken from transformers' list of renamings
_ATTENTION = [
    (r"attention\.q_proj", "attention.attention.query"), (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"), (r"attention\.o_proj", "attention.output.dense"),
]  # fmt: skip
_VIT = [(r"^layers\.", "encoder.layer."), (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense")]


def older(what: Old) -> Old:
    """A name, or an adapter with its names, as DINOv2 (until 5.17) or ViT (until 4) had it."""
    if isinstance(what, Adapter):
        return adapter({older(module): what[module] for module in what}, what.name, what.base)
    for new, old in _ATTENTION + (_VIT if what.startswith("layers.") else []):
        what = re.sub(new, old, what)
    return what


def tiny_vit(seed: int = 0) -> Any:
    """A random ViT for 28 x 28 pixels, float32, eval mode."""
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            intermediate_size=32,
            image_size=28,
            patch_size=14,
        )
        model = ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def vision_adapter(model: nn.Module, name: str, seed: int, base: BaseRef | None = None) -> Adapter:
    """An adapter of every linear layer; ranks and scalings differ from module to module."""
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    parts = {
        n: factors(m.out_features, m.in_features, 2 + i % 3, 100 * seed + i, scaling=0.0625 * (1 + i % 2))
        for i, (n, m) in enumerate(linear.items())
    }
    return adapter(parts, name, base)


def pixels(n: int, seed: int = 0) -> Tensor:
    """[n, 3, 28, 28]."""
    return torch.randn(n, 3, 28, 28, generator=generator(seed))
