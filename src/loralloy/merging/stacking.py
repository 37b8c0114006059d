"""Stacks: which modules of a group go through a rule together, and their factors in the dtype of the computation.

A batch's working set is bounded, so memory does not grow with the number of modules.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Adapter
from ..factors import LoraFactors
from . import spaces
from .measure import Measure
from .plan import Group
from .rule import Plugin, Rule, Space
from .stack import Stack

Fetch = Callable[[int, str], LoraFactors]
# Bytes of one batch's working set; constants, so that the same input gives the same bytes whatever memory is free.
_BUDGET = {"cpu": 48 << 20, "cuda": 12 << 30}


@dataclass(frozen=True)
class Settings:
    """How every batch is made: the parts of a plan that a batch needs."""

    rule: Rule
    space: Space
    before: Plugin | None
    after: Plugin | None
    dtype: torch.dtype
    device: torch.device
    measure: Measure


def keys_of(rule: Rule, parents: Sequence[Adapter] | Sequence[str]) -> Callable[[int, str], int]:
    """A 64-bit key of an adapter's content and a module's name, for rules that draw random masks."""
    if "seed" not in rule.parameters:
        return lambda i, module: 0

    def key(i: int, module: str) -> int:
        parent = parents[i]
        text = f"{parent if isinstance(parent, str) else parent.content_hash}|{module}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)

    return key


def chunks(group: Group, settings: Settings) -> Iterator[slice]:
    """Slices of a group's modules whose working set fits the budget."""
    out, inside = group.shape
    # entry by entry on A and on B, little is held but the entries, those that are kept, and the result
    by_entry = settings.space == "factors" and settings.rule.acts_on == "entries" and settings.before is None
    copies = 3 if by_entry else 6
    entries = (out + inside) * (sum(group.ranks) + group.rank) * copies
    if settings.space == "delta" and settings.rule.acts_on == "entries" and "delta" not in settings.rule.sums:
        entries += out * inside * (len(group.who) + 3)
    most = max(1, _BUDGET.get(settings.device.type, _BUDGET["cpu"]) // (4 * entries))
    total = len(group.modules)
    size = math.ceil(total / math.ceil(total / most))  # even: a short last batch costs as many calls as a full one
    return (slice(at, at + size) for at in range(0, total, size))


def load(group: Group, part: slice, settings: Settings, fetch: Fetch, keys: Callable[[int, str], int]) -> Stack:
    """The stack of some of a group's modules, in the dtype of the computation; 16 bits are kept until used on a GPU, and where
    entries are just added."""
    modules, plain = group.modules[part], group.outlines[0].kind != "conv"
    a, b = [], []
    for i in group.who:
        found = [fetch(i, m) for m in modules]
        a.append(_stack([f.A if plain else f.a for f in found], settings.device))
        b.append(_stack([f.B if plain else f.b for f in found], settings.device))
    rule = settings.rule
    adds = rule.acts_on == "entries" and not rule.parameters and settings.space not in rule.sums
    if settings.device.type != "cuda" and not adds:
        wide = torch.float64 if any(t.dtype == torch.float64 for t in (*a, *b)) else torch.float32
        a, b = [t.to(wide) for t in a], [t.to(wide) for t in b]
    wide = torch.float32 if settings.device.type == "mps" else torch.float64
    scaling, weights = (
        torch.tensor([row[part] for row in rows], dtype=wide).to(settings.device, non_blocking=True)
        for rows in (group.scaling, group.weights)
    )
    if "seed" in settings.rule.parameters:
        seeds = torch.tensor([[keys(i, m) for m in modules] for i in group.who], dtype=torch.int64)
    else:
        seeds = torch.zeros(len(group.who), len(modules), dtype=torch.int64)
    return Stack(tuple(a), tuple(b), scaling, weights, seeds.to(settings.device, non_blocking=True))


def _stack(tensors: list[Tensor], device: torch.device) -> Tensor:
    """[L, m, n] of L matrices; by `cat`, which does not first make a view of each, as `stack` does."""
    if tensors[0].device != device:
        tensors = [t.to(device, non_blocking=True) for t in tensors]
    return torch.cat(tensors).view(len(tensors), *tensors[0].shape) if len(tensors) > 1 else tensors[0][None]


def prepared(stack: Stack, settings: Settings) -> Stack:
    """The stack that the rule sees."""
    if settings.before is not None:
        stack = settings.before.function(stack, **settings.before.values)
    if settings.rule.values.get("prune") == "merged":
        if settings.space == "factors":
            seen = spaces.view(stack, "factors")
            a, b = (piece.combined() for piece in seen.pieces)
        else:
            total = stack.weighted_sum()
            a, b = total.A, total.B
        ones = torch.ones_like(stack.weights[:1])
        stack = Stack((a,), (b,), ones, ones, stack.keys[:1])
    return stack
