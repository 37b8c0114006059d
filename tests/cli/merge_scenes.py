"""What `loralloy merge` should have written, and a strict reload of what it wrote."""

from __future__ import annotations

import torch

from helpers import dense_sum, relative
from loralloy.adapter import Adapter

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml"]
NAMES = ["spam", "weather", "cooking"]


def written(out):
    """A strict reload: no stranger in the folder, no leftover beside it, every tensor read."""
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []
    return Adapter.load(out).validate()


def expected(folders, weights):
    loaded = [Adapter.load(f) for f in folders]
    return {m: dense_sum([a[m] for a in loaded], weights) for m in loaded[0]}


def error(got, want):
    both = [torch.cat([d[m].reshape(-1) for m in sorted(want)]) for d in (got, want)]
    return relative(*both)
