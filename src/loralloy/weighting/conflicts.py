"""What the rule `tada` discarded, by module and by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..layerwise import layer_of
from ..merging.tada import Found
from ..recipe.job import Job


@dataclass
class Conflicts:
    """What was discarded in some modules: counts by adapter, and norms whose squares add up over modules.

    `removed` is ||what was discarded||_F over `total`, ||the gated sum||_F.
    """

    components: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    cleared: dict[str, int] = field(default_factory=dict)
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def removed(self) -> float:
        return math.sqrt(self.squares[0] / self.squares[1]) if self.squares[1] else 0.0

    @staticmethod
    def join(parts: Iterable[Conflicts]) -> Conflicts:
        """Of several modules as one."""
        whole = Conflicts()
        for part in parts:
            for name in ("components", "dropped", "cleared"):
                mine = getattr(whole, name)
                for adapter, count in getattr(part, name).items():
                    mine[adapter] = mine.get(adapter, 0) + count
            whole.squares = [a + b for a, b in zip(whole.squares, part.squares, strict=True)]
        return whole

    def to_dict(self) -> dict[str, Any]:
        return {
            "components": self.components, "dropped": self.dropped, "cleared": self.cleared, "removed": self.removed,
        }  # fmt: skip


def by_layer(conflicts: Mapping[str, Conflicts]) -> dict[int | str, Conflicts]:
    """Joined by layer, in order; modules without a layer under their own names."""
    groups: dict[int | str, list[Conflicts]] = {}
    for module, found in conflicts.items():
        layer = layer_of(module)
        groups.setdefault(module if layer is None else layer, []).append(found)
    order = sorted(groups, key=lambda key: (isinstance(key, str), key))
    return {key: Conflicts.join(groups[key]) for key in order}


def conflicts_of(job: Job, seen: Sequence[Found]) -> dict[str, Conflicts]:
    """By module: batches come in the order of the plan's groups, and a batch lies within one of them."""
    if not seen:
        return {}
    plan = job.plan()
    names = [p.name for p in plan.parents]
    batches = iter(seen)
    result: dict[str, Conflicts] = {}
    for group in plan.groups:
        who, left = [names[i] for i in group.who], list(group.modules)
        while left:
            found = next(batches)
            counts = [t.cpu() for t in (found.components, found.dropped, found.cleared)]  # [T, L]
            squares = torch.stack([found.removed, found.total], 1).cpu().double().square().tolist()
            for at, pair in enumerate(squares):
                made = [dict(zip(who, t[:, at].tolist(), strict=True)) for t in counts]
                result[left.pop(0)] = Conflicts(made[0], made[1], made[2], pair)
    return result
