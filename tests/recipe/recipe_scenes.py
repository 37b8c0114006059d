"""Three small adapters, and the least recipe of two of them."""

from __future__ import annotations

import torch

from helpers import relative

MODULES = [f"model.layers.{n}.{p}" for n in range(4) for p in ("self_attn.q_proj", "mlp.up_proj")]
NAMES = ["spam", "weather", "cooking"]


def total(got, want):
    return relative(*(torch.cat([d[m].reshape(-1) for m in sorted(want)]) for d in (got, want)))


PLAIN = """\
version: 1
adapters:
  - BANK/spam
  - BANK/weather
"""
