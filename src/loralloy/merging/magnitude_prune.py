"""magnitude_prune: keep the largest entries, add."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from .entries import Entries, Trim
from .rule import Param, Rule
from .ties import DENSITY, TRIM


def magnitude_prune(
    entries: Entries,
    *,
    density: Annotated[float, DENSITY] = 0.8,
    prune: Annotated[
        Literal["each", "merged"],
        Param("prune each adapter, then add (each, PEFT's), or prune the sum (merged, the retrieval paper's text)"),
    ] = "each",
    trim: Annotated[Trim, TRIM] = "tensor",
) -> Tensor:
    """each: out = sum_i w_i top(x_i); merged: out = top(sum_i w_i x_i), top keeping the largest magnitudes.

    In factors space, with `prune="each"`, PEFT 0.21.2's `magnitude_prune`. `merged` is what "Task-Aware LoRA Adapter
    Composition" (arXiv 2602.21222), section 3, writes: the merged update is pruned. (The engine hands it the sum.)
    """
    return entries.summed(entries.trimmed())


RULE = Rule(
    "magnitude_prune",
    magnitude_prune,
    "keep each adapter's largest entries (or the sum's), add",
    "small entries are noise to you and signs agree; at a density near 1 it is the weighted sum",
    "PEFT 0.21.2; arXiv 2602.21222",
    spaces=("delta", "factors", "knots", "core"),
    fused=True,
)
