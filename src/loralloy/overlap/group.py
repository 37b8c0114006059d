"""What adapters share in a group of modules (one, a layer, all of them), as ratios of sums over those modules.

Every measure is that of the modules laid side by side as one block-diagonal dW, so it adds up: a layer's cosine is the
cosine of the layer's concatenated dW, not a mean of cosines in which small modules weigh as much as large ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ADAPTER = ("has", "zero", "square", "rank", "stable", "kept", "kept_cut")  # sums of shape [n]
PAIR = (
    "common", "inner", "common_square", "quartic", "directions",
    "angles_out", "angles_in", "angles_out_chance", "angles_in_chance",
    "weighted_out", "weighted_in", "weighted_out_chance", "weighted_in_chance",
    "opposed", "entries", "opposed_mass", "mass", "count_xx", "count_xy", "count_yy", "mass_xx", "mass_xy", "mass_yy",
)  # fmt: skip  # sums of shape [n, n]


def zeros(adapters: int) -> dict[str, Tensor]:
    """All sums at zero."""
    shapes = dict.fromkeys(ADAPTER, (adapters,)) | dict.fromkeys(PAIR, (adapters, adapters))
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Group:
    """Overlap of n adapters over some modules. Pairwise measures, [n, n], are over the modules that both have.

    What is undefined (a zero dW, no common module) is NaN here, None in :meth:`to_dict` and a dash in print.

    Attributes:
        name: a layer's number, a projection, a module, or ``all``.
        modules: the modules in it.
        sums: what the measures are ratios of, by name; [n] or [n, n], float64.
    """

    name: int | str
    modules: tuple[str, ...]
    sums: Mapping[str, Tensor]

    @staticmethod
    def join(name: int | str, parts: Sequence[Group]) -> Group:
        """The modules of several groups as one."""
        sums = {key: torch.stack([p.sums[key] for p in parts]).sum(0) for key in parts[0].sums}
        return Group(name, tuple(m for p in parts for m in p.modules), sums)

    # -- of one adapter, [n] -------------------------------------------------------------------------------------------

    @property
    def norm(self) -> Tensor:
        """||dW||_F; NaN where the adapter has none of the modules."""
        return torch.where(self.sums["has"] > 0, self.sums["square"].sqrt(), math.nan)

    @property
    def rank(self) -> Tensor:
        """Mean number of directions of dW: singular values above 1e-6 of the largest."""
        return ratio(self.sums["rank"], self.sums["has"])

    @property
    def stable_rank(self) -> Tensor:
        """Mean of ||dW||_F^2 / ||dW||_2^2 over the modules where dW is not zero."""
        return ratio(self.sums["stable"], self.sums["has"] - self.sums["zero"])

    @property
    def sar(self) -> Tensor:
        """SAR (Marczak et al. 2025, eq. 5): ||P_k dW||_F / ||dW||_F, P_k onto the top k left singular vectors of the uniform
        merge, k the fewest that leave it a relative error of at most 5 % in the Frobenius norm."""
        return ratio(self.sums["kept"], self.sums["square"]).sqrt().clamp(max=1)

    @property
    def sar_cut(self) -> Tensor:
        """The same with k the largest rank of the adapters: what a merge cut to their rank still reaches."""
        return ratio(self.sums["kept_cut"], self.sums["square"]).sqrt().clamp(max=1)

    # -- of two adapters, [n, n] ---------------------------------------------------------------------------------------

    @property
    def cosine(self) -> Tensor:
        """<dW_i, dW_j> / (||dW_i||_F ||dW_j||_F)."""
        square = self.sums["common_square"]
        return ratio(self.sums["inner"], (square * square.T).sqrt()).clamp(-1, 1)

    def alignment(self, side: str, weighted: bool = True) -> Tensor:
        """How far two adapters use the same directions: of their outputs (columns of dW) or inputs (rows); 0 to 1.

        Unweighted: the mean squared cosine of the principal angles between the two spaces. Weighted by singular values:
        the cosine of dW_i dW_i^T and dW_j dW_j^T (of dW^T dW for the inputs), so weak directions count little.
        """
        if not weighted:
            return ratio(self.sums[f"angles_{side}"], self.sums["directions"]).clamp(max=1)
        return ratio(self.sums[f"weighted_{side}"], self._quartic).clamp(max=1)

    def chance(self, side: str, weighted: bool = True) -> Tensor:
        """The mean of :meth:`alignment` for random directions with the same singular values: E (u . v)^2 = 1 / dimension."""
        if not weighted:
            return ratio(self.sums[f"angles_{side}_chance"], self.sums["directions"])
        return ratio(self.sums[f"weighted_{side}_chance"], self._quartic)

    @property
    def _quartic(self) -> Tensor:
        return (self.sums["quartic"] * self.sums["quartic"].T).sqrt()

    def sign_conflict(self, weighted: bool = True) -> Tensor:
        """The share of entries with opposite signs, of those where neither is zero; weighted by |dW_i| |dW_j|."""
        x, y = ("opposed_mass", "mass") if weighted else ("opposed", "entries")
        return ratio(self.sums[x], self.sums[y]).clamp(0, 1)

    def sign_error(self, weighted: bool = True) -> Tensor:
        """Standard error of :meth:`sign_conflict`: 0 where every entry was looked at."""
        name, share = ("mass" if weighted else "count"), self.sign_conflict(weighted)
        xx, xy, yy = (self.sums[f"{name}_{key}"] for key in ("xx", "xy", "yy"))
        total = self.sums["mass" if weighted else "entries"]
        return ratio((xx - 2 * share * xy + share**2 * yy).clamp(min=0).sqrt(), total)

    # -- of all --------------------------------------------------------------------------------------------------------

    @property
    def gain(self) -> float:
        """||sum_i dW_i||^2 / sum_i ||dW_i||^2: 1 if they are orthogonal, n if they are equal, 0 if they cancel."""
        total = float(self.sums["square"].sum())
        return max(0.0, float(self.sums["inner"].sum())) / total if total > 0 else math.nan

    def to_dict(self) -> dict[str, object]:
        """Every measure as plain lists; None where it is undefined."""
        data: dict[str, object] = {"name": self.name, "modules": len(self.modules), "gain": plain(self.gain)}
        for name in ("norm", "rank", "stable_rank", "sar", "sar_cut"):
            data[name] = plain(getattr(self, name))
        data["common_modules"] = self.sums["common"].int().tolist()
        data["cosine"] = plain(self.cosine)
        for side in ("out", "in"):
            for label, weighted in (("", True), ("_unweighted", False)):
                data[f"alignment_{side}{label}"] = plain(self.alignment(side, weighted))
                data[f"alignment_{side}{label}_chance"] = plain(self.chance(side, weighted))
        for label, weighted in (("", True), ("_unweighted", False)):
            data[f"sign_conflict{label}"] = plain(self.sign_conflict(weighted))
            data[f"sign_conflict{label}_error"] = plain(self.sign_error(weighted))
        return data


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, NaN where y is 0."""
    return torch.where(y > 0, x / torch.where(y > 0, y, 1.0), math.nan)


def plain(value: Tensor | float) -> object:
    """Numbers as lists, NaN as None."""
    listed = value.tolist() if isinstance(value, Tensor) else value
    if isinstance(listed, list):
        return [plain(v) for v in listed]
    return None if math.isnan(listed) else listed
