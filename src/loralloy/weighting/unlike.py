"""How unlike anything in the index a query is: where its distance lies among those of the index's own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LoralloyError
from ..retrieval.rows import RAW
from ..weights import Weights

if TYPE_CHECKING:
    from .leave_one_out import LeftOut

NEAREST = 10


@dataclass(frozen=True)
class Unlike:
    """The tail probability of a query's distance under the index rows' own, each row left out of its neighbours.

    A query's distance is the mean cosine distance to its 10 nearest rows. With m rows that were left out in turn, and
    r of them nearer to their neighbours than the query is to its, the score is r / (m + 1): 0 is "as near as anything",
    and a query drawn as the rows were exceeds a threshold u with probability at most 1 - u (the rank of a new draw
    among m others; tasks count the same). Rows with the hint and raw texts lie at different distances, so each kind
    has its own sample, and a query takes that of its nearest row's kind.

    `samples`: ``"hinted"`` and/or ``"raw"`` -> rising distances [m].
    """

    samples: Mapping[str, np.ndarray]

    @staticmethod
    def of(left: LeftOut) -> Unlike:
        """From rows left out of their own neighbours."""
        reach = left.distances[:, :NEAREST].mean(axis=1)
        return Unlike({kind: np.sort(reach[left.nearest == kind]) for kind in sorted(set(left.nearest))})

    def score(self, ids: Sequence[str], distances: np.ndarray) -> float:
        """For one query: its nearest rows' ids and their cosine distances, nearest first (10 of them are read)."""
        kind = "raw" if ids[0].endswith(RAW) or "hinted" not in self.samples else "hinted"
        if kind not in self.samples:  # no left-out row had such a neighbour
            kind = next(iter(self.samples))
        sample = self.samples[kind]
        reach = float(np.mean(np.asarray(distances[:NEAREST], dtype=np.float64)))
        return int(np.searchsorted(sample, reach, side="left")) / (len(sample) + 1)


def usable_threshold(threshold: float, template: str) -> float:
    """`threshold`, or 1 (never fall back) for an index of one kind of rows: there the other kind of query is unlike all."""
    return check_threshold(threshold) if template == "both" else 1.0


def check_threshold(threshold: float) -> float:
    """`threshold` itself. Raises LoralloyError when it is not in (0, 1]."""
    if not 0 < threshold <= 1:
        raise LoralloyError(f"unlike is {threshold}; it must be above 0 and at most 1 (1: never fall back)")
    return threshold


def fall_back(weights: Weights, threshold: float) -> Weights:
    """`weights`, or the same adapters at 0 (the base model alone) when the query is too unlike the index.

    What was routed stays in ``explain["routed"]``, and ``explain["fallback"]`` holds the threshold that was exceeded.
    Weights without a score are returned as they are.
    """
    score = weights.explain.get("unlike")
    if score is None or score <= check_threshold(threshold):
        return weights
    explain = weights.explain | {"fallback": threshold, "routed": dict(weights.items())}
    return Weights(dict.fromkeys(weights.names, 0.0), weights.source, explain)
