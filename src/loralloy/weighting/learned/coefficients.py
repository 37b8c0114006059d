"""Coefficients: what is learned, and how it becomes weights.

The poster's form ("Adaptive LoRA Merging for Efficient Domain Incremental Learning", Coleman et al. 2024): alpha_i =
sigmoid(c_i) b with b = 1 + (b_max - 1) sigmoid(b_raw), one shared b. The other forms, granularities and starts are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ...errors import LoralloyError
from ...layerwise import group_of
from ...weights import Coefficient, Weights

Form: TypeAlias = Literal["sigmoid", "signed", "softmax"]
Granularity: TypeAlias = Literal["adapter", "layer", "module"]
WIDE = (0.4, 0.55, 0.75, 1.0, 1.35, 1.8)  # shares of a scale that a line search tries
NEAR = (0.7, 0.84, 1.0, 1.2, 1.4)


class Coefficients(nn.Module):
    """A table of weights [modules, adapters] as a function of c and b_raw, the parameters.

    | form | alpha | range |
    |---|---|---|
    | sigmoid (the poster's) | sigmoid(c) b | (0, b_max) |
    | signed | tanh(c) b | (-b_max, b_max) |
    | softmax | softmax of c over the adapters that have the module, times b | (0, b_max), and they sum to b |

    b = 1 + (b_max - 1) sigmoid(b_raw). For b_max below 1 that would lie above b_max; there b is b_max itself (ours).

    Args:
        names, modules: what columns and rows are of.
        granularity: one c an adapter (the poster's), an adapter and layer, or an adapter and module. A module without a layer
            number is a layer of its own.
        start: "zero", the poster's (read from its tables): all alpha are alpha_0 = b / 2 with b_raw = 0, so (1 + b_max) / 4;
            c = 0 under sigmoid, and softmax starts at b / n. Or a scale that all alpha start from.
        present: [modules, n] bool, which adapter has which module; None for all.

    Raises LoralloyError for a form or granularity that is not known, b_max not above 0, and a start outside the range.
    """

    c: nn.Parameter
    """[rows, n]; rows are 1, layers or modules."""
    b_raw: nn.Parameter

    def __init__(
        self,
        names: Sequence[str],
        modules: Sequence[str],
        form: Form = "sigmoid",
        granularity: Granularity = "adapter",
        b_max: float = 3.0,
        start: float | Literal["zero"] = "zero",
        present: Tensor | None = None,
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise LoralloyError(f"form {form!r} is not known; choose {', '.join(get_args(Form))}")
        if granularity not in get_args(Granularity):
            raise LoralloyError(f"granularity {granularity!r} is not known; choose {', '.join(get_args(Granularity))}")
        if isinstance(b_max, bool) or not (isinstance(b_max, int | float) and 0 < b_max < math.inf):
            raise LoralloyError(f"b_max {b_max!r} is not valid; give a number above 0, the bound of every weight")
        self.names, self.module_names = list(names), list(modules)
        self.form, self.granularity, self.b_max = form, granularity, float(b_max)
        groups = [group_of(m, granularity) for m in modules]
        self.groups = list(dict.fromkeys(groups))
        """What the rows of `c` are of."""
        at = {group: i for i, group in enumerate(self.groups)}
        self.row: Tensor
        self.register_buffer("row", torch.tensor([at[g] for g in groups], dtype=torch.int64), persistent=False)
        everywhere = torch.ones(len(self.module_names), len(self.names), dtype=torch.bool)
        self.present: Tensor
        self.register_buffer("present", everywhere if present is None else present.clone(), persistent=False)
        self.c = nn.Parameter(torch.zeros(len(self.groups), len(self.names)))
        self.b_raw = nn.Parameter(torch.zeros(()), requires_grad=b_max > 1)
        self.reset(start)

    @property
    def b(self) -> Tensor:
        """The shared bound, a number between 1 and b_max."""
        return min(self.b_max, 1.0) + max(self.b_max - 1.0, 0.0) * torch.sigmoid(self.b_raw)

    @property
    def range(self) -> tuple[float, float]:
        """The uniform scales that can be started from: above the first and below the second."""
        if self.form == "softmax":
            n = len(self.names)
            return min(self.b_max, 1.0) / n, self.b_max / n
        return 0.0, self.b_max

    def holds(self, scale: float) -> bool:
        """Whether all alpha can be this scale."""
        low, high = self.range
        return low < scale < high or (self.form == "softmax" and self.b_max <= 1 and math.isclose(scale, high))

    def scales(self, around: float = 1.0, shares: Sequence[float] = WIDE) -> list[float]:
        """A grid of uniform scales within the range: shares of one of them. For softmax, all over its range."""
        low, high = self.range
        if self.form == "softmax":
            return [low + (high - low) * f for f in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)] if high > low else [high]
        most = 0.9 * high
        grid = [around * f for f in shares]
        within = [s for s in grid if s < most]
        return [*within, most] if 0 < len(within) < len(grid) else within or [most / 3, most * 2 / 3, most]

    @torch.no_grad()
    def reset(self, start: float | Literal["zero"]) -> None:
        """Start over from a uniform scale, or "zero". Raises LoralloyError for a scale outside the range."""
        b = min(self.b_max, 1.0) + max(self.b_max - 1.0, 0.0) / 2
        self.c.zero_()
        self.b_raw.zero_()
        if start == "zero":
            if self.form == "signed":  # c = 0 would be no adapter at all, where roots and masks have no gradient
                self.c.fill_(math.atanh(0.5))
        elif isinstance(start, str | bool) or not self.holds(float(start)):
            low, high = self.range
            raise LoralloyError(
                f"start {start!r} is not within ({low:g}, {high:g}); give a scale between them, or 'zero'"
            )
        elif self.form == "softmax":
            total = start * len(self.names)
            if self.b_max > 1:
                self.b_raw.fill_(_logit((total - 1.0) / (self.b_max - 1.0)))
        else:
            if start > 0.9 * b and self.b_max > 1:  # near the end of c's range it would hardly move: raise b
                b = min(max(math.sqrt(start * self.b_max), start / 0.95), (start + 3 * self.b_max) / 4)
                b = max(b, 1.0 + 0.05 * (self.b_max - 1.0))  # b lies above 1, however little room b_max leaves
                self.b_raw.fill_(_logit((b - 1.0) / (self.b_max - 1.0)))
            self.c.fill_(math.atanh(start / b) if self.form == "signed" else _logit(start / b))

    def forward(self) -> Tensor:
        """The weights, [modules, n]; 0 where an adapter has no such module."""
        if self.form == "sigmoid":
            table = torch.sigmoid(self.c)[self.row]
        elif self.form == "signed":
            table = torch.tanh(self.c)[self.row]
        else:
            table = self.c[self.row].masked_fill(~self.present, -torch.inf).softmax(1)
        return table * self.b * self.present

    def state(self) -> Tensor:
        """c and b_raw as one vector, detached: to be kept and given back to `restore`."""
        return torch.cat([self.c.detach().flatten(), self.b_raw.detach()[None]])

    @torch.no_grad()
    def restore(self, state: Tensor) -> None:
        """The parameters from what `state` gave."""
        self.c.copy_(state[:-1].view_as(self.c))
        self.b_raw.copy_(state[-1])

    def weights(self, explain: dict[str, Any] | None = None) -> Weights:
        """As Weights, source "learned"; per module unless granularity is "adapter" (or softmax over differing modules)."""
        with torch.no_grad():
            table, present, b = self().double().cpu(), self.present.cpu(), float(self.b)
        found: dict[str, Coefficient] = {}
        for i, name in enumerate(self.names):
            column = {
                m: float(v) for m, v, there in zip(self.module_names, table[:, i], present[:, i], strict=True) if there
            }
            same = self.granularity == "adapter" and len(set(column.values())) == 1
            found[name] = next(iter(column.values())) if same else column
        used = table[present]
        settings = {"form": self.form, "b_max": self.b_max, "granularity": self.granularity, "b": b}
        alpha = [float(used.min()), float(used.max())]
        return Weights(found, "learned", {**settings, "alpha": alpha, **(explain or {})})


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)
