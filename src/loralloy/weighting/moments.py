"""Second moments of what adapters' A answer to real inputs: by them conflicts are judged on activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """The mean over tokens of (A x)(A x)^T at a module, A being the adapters' A as stored, one on the other.

    What :func:`loralloy.merging.tada.resolve` judges conflicts on activations by. Attributes: ranks, by adapter in the order
    of the rows of A; matrix, [R, R] float64, R = sum of ranks.
    """

    ranks: Mapping[str, int]
    matrix: Tensor

    def of(self, names: Sequence[str]) -> Tensor:
        """The part of these adapters, in this order."""
        ends = np.cumsum([0, *self.ranks.values()]).tolist()
        place = {name: range(ends[i], ends[i + 1]) for i, name in enumerate(self.ranks)}
        rows = torch.tensor([k for name in names for k in place[name]])
        return self.matrix[rows][:, rows]
