"""Merged adapters of a run: made on the device when a batch needs them, kept under (weights, rule, space, rank)."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ...errors import LoralloyError

if TYPE_CHECKING:
    import torch

    from ...bank import Bank
    from ...factors import LoraFactors
    from ...merging import Rule, Space
    from ...merging.engine import Rank

Coefficients: TypeAlias = tuple[tuple[str, float], ...]
"""(adapter, weight), by name."""


def rounded(weights: Mapping[str, float], step: float) -> dict[str, float]:
    """Weights in units of `step`, their sum kept (largest remainders take what rounding down leaves); zeros are dropped.

    >>> rounded({"a": 0.62, "b": 0.33, "c": 0.05}, 0.1)
    {'a': 0.6, 'b': 0.3, 'c': 0.1}

    A step of 0 leaves them as they are. Raises LoralloyError for a negative weight or a step that is not in [0, 1].
    """
    if not 0 <= step <= 1:
        raise LoralloyError(f"step is {step}; weights are rounded to a step from 0 (not at all) to 1")
    if step == 0:
        return {name: w for name, w in weights.items() if w != 0}
    if any(w < 0 for w in weights.values()):
        raise LoralloyError("only weights that are not negative can be rounded with their sum kept; set step to 0")
    units = {name: w / step for name, w in weights.items()}
    whole = {name: math.floor(u + 1e-9) for name, u in units.items()}
    left = round(sum(units.values())) - sum(whole.values())
    order = sorted(units, key=lambda name: (-round(units[name] - whole[name], 9), name))
    for name in order[: max(0, left)]:
        whole[name] += 1
    return {name: round(n * step, 12) for name, n in whole.items() if n}


@dataclass(frozen=True)
class How:
    """A rule with its parameters, where it acts, and the rank its result is cut to."""

    rule: Rule
    space: Space
    rank: Rank | None

    @property
    def key(self) -> str:
        return json.dumps([str(self.rule), self.space, self.rank])


class Merges:
    """A cache of merged adapters over one bank, the bank held on the device once.

    Args:
        bank: the adapters.
        device: where merging happens and the results stay.
        limit: bytes of results to keep; the least recently used go first.
    """

    def __init__(self, bank: Bank, device: torch.device, limit: int = 4 << 30) -> None:
        self.bank, self.device, self.limit = bank, device, limit
        self._parents: dict[str, dict[str, LoraFactors]] = {}
        self._kept: OrderedDict[tuple[str, Coefficients], dict[str, LoraFactors]] = OrderedDict()
        self._size = 0

    def __contains__(self, key: tuple[How, Coefficients]) -> bool:
        return (key[0].key, key[1]) in self._kept

    def get(self, how: How, weights: Coefficients) -> dict[str, LoraFactors]:
        """module -> merged factors on the device, float32."""
        key = how.key, weights
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._merge(how, weights)
        self._kept[key] = made
        self._size += size_of(made)
        while self._size > self.limit and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._size -= size_of(gone)
        return made

    def _merge(self, how: How, weights: Coefficients) -> dict[str, LoraFactors]:
        import torch

        from ...merging import merge_factors

        if not weights:
            raise LoralloyError("nothing to merge: all weights are 0")
        parents = [self.parent(name) for name, _ in weights]
        with torch.no_grad():
            return merge_factors(parents, [w for _, w in weights], how.rule, how.space, how.rank)

    def parent(self, name: str) -> dict[str, LoraFactors]:
        """One adapter's factors on the device, float32."""
        import torch

        if name not in self._parents:
            adapter = self.bank[name]
            self._parents[name] = {m: adapter[m].to(torch.float32, self.device) for m in adapter}
        return self._parents[name]


def size_of(factors: Mapping[str, LoraFactors], itemsize: int | None = None) -> int:
    """Bytes of A and B over all modules; with `itemsize`, as they would be stored in a dtype of so many bytes."""
    return sum(t.numel() * (itemsize or t.element_size()) for f in factors.values() for t in (f.A, f.B))


def coefficients(weights: Mapping[str, float], step: float = 0.0) -> Coefficients:
    """Weights as a key: rounded, without zeros, by name."""
    return tuple(sorted(rounded(weights, step).items()))


def unique(rows: Sequence[Coefficients]) -> list[Coefficients]:
    return list(dict.fromkeys(rows))
