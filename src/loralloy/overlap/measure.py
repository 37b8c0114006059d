"""Measuring the overlap of a bank's adapters, module by module, without forming dW (but for its signs, by blocks)."""

from __future__ import annotations

import math
import re
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..bank import Bank
from ..errors import LoralloyError
from ..factors import LoraFactors, compute_dtype
from ..layerwise import layer_of
from ..side_by_side import in_order
from . import signs
from .group import Group, zeros

By: TypeAlias = Literal["layer", "projection", "module"]
EXACT_ENTRIES = 2**22  # modules with more entries have their signs counted on a sample of rows
NULL = 1e-6  # a singular value below this share of the largest is rounding, not a direction
SAR_ERROR = 0.05


@dataclass(frozen=True)
class Overlap:
    """The overlap of named adapters; `parts` has one group a module, from which every other is summed.

    Attributes:
        names: the adapters, in the order of every matrix.
        parts: one :class:`Group` a module, in natural order.
        ranks: adapter -> the ranks that its modules declare, ascending.
        modules: adapter -> how many modules it has.
        extra: adapter -> names of tensors that it saves whole, which are not compared.
        sampled: modules whose signs were counted on a sample of rows.
        exact_entries: the size of dW up to which every sign is counted.
        seed: what the sample is drawn with.
    """

    names: list[str]
    parts: list[Group]
    ranks: dict[str, list[int]]
    modules: dict[str, int]
    extra: dict[str, list[str]]
    sampled: list[str]
    exact_entries: int
    seed: int

    @cached_property
    def all(self) -> Group:
        """Every module together."""
        return Group.join("all", self.parts)

    def groups(self, by: By = "layer") -> list[Group]:
        """One group a layer (modules outside layers by their name), a projection, or a module."""
        if by == "module":
            return self.parts
        key = layer if by == "layer" else projection
        found: dict[int | str, list[Group]] = {}
        for part in self.parts:
            found.setdefault(key(str(part.name)), []).append(part)
        order = sorted(found, key=lambda name: (isinstance(name, str), name)) if by == "layer" else list(found)
        return [Group.join(name, found[name]) for name in order]

    def to_dict(self, by: By = "layer") -> dict[str, object]:
        """Everything as plain data: the adapters, all modules together, the groups, and what the numbers say."""
        from .verdict import candidates, verdict

        remarks = verdict(self)
        adapters = [
            {"name": name, "modules": self.modules[name], "ranks": self.ranks[name], "extra": self.extra.get(name, [])}
            for name in self.names
        ]
        signs_ = {"exact_entries": self.exact_entries, "seed": self.seed, "sampled_modules": self.sampled}
        return {
            "adapters": adapters,
            "signs": signs_,
            "all": self.all.to_dict(),
            "by": by,
            "groups": [group.to_dict() for group in self.groups(by)],
            "verdict": [remark.to_dict() for remark in remarks],
            "candidates": candidates(remarks),
        }


def layer(module: str) -> int | str:
    """The layer's number, or the module itself if it is in none."""
    found = layer_of(module)
    return module if found is None else found


def projection(module: str) -> str:
    """What a module is in its layer: ``self_attn.q_proj``; of an expert ``mlp.experts.*.w1``; outside layers its name."""
    inside = re.sub(r"^(?:.*?\.)??\d+\.", "", module, count=1)
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", inside)


def natural(module: str) -> list[tuple[bool, int | str]]:
    """Sorts layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in module.split(".")]


def overlap(
    bank: Bank,
    *,
    exact_entries: int = EXACT_ENTRIES,
    seed: int = 0,
    on_module: Callable[[str], None] | None = None,
) -> Overlap:
    """Measure what the adapters of a bank share. Reads every tensor once.

    Args:
        bank: at least two adapters.
        exact_entries: signs are counted on every entry of a dW up to this size; above it on a seeded sample of rows with
            about so many entries, and the standard error is kept.
        seed: of that sample.
        on_module: called after each module, for progress.

    Raises LoralloyError for fewer than two adapters, or when no two have a module in common.
    """
    names = bank.names
    if len(names) < 2:
        raise LoralloyError(f"overlap needs two adapters or more; only {names[0]!r} was given")
    modules = sorted(bank.modules, key=natural)
    if not any(sum(module in adapter for adapter in bank.values()) > 1 for module in modules):
        has = "; ".join(f"{name} has {_example(list(a))}" for name, a in bank.items())
        raise LoralloyError(f"no two of these adapters have a module in common, so nothing can overlap: {has}")
    reading = threading.Lock()

    def measure(module: str) -> tuple[Group, bool]:
        with reading:
            factors = bank.factors(module)
        index = torch.tensor([names.index(name) for name in factors])
        group = _measure(module, list(factors.values()), index, len(names), exact_entries, seed)
        return group, len(factors) > 1 and math.prod(next(iter(factors.values())).shape) > exact_entries

    parts, sampled = [], []
    for module, (group, some) in zip(modules, in_order(measure, modules), strict=True):
        parts.append(group)
        sampled += [module] if some else []
        if on_module:
            on_module(module)
    return Overlap(
        names,
        parts,
        {name: sorted({a.rank(m) for m in a}) for name, a in bank.items()},
        {name: len(a) for name, a in bank.items()},
        {name: a.extra for name, a in bank.items() if a.extra},
        sampled,
        exact_entries,
        seed,
    )


def _example(modules: list[str]) -> str:
    return f"{modules[0]} and {len(modules) - 1} more" if len(modules) > 1 else ", ".join(modules) or "none"


def _measure(module: str, factors: list[LoraFactors], index: Tensor, n: int, exact_entries: int, seed: int) -> Group:
    """One module's sums. `index` says which of the n adapters the factors are of."""
    out, inside = factors[0].shape
    u, sigma, v, owner = _svds(factors)
    t = len(factors)
    of = torch.nn.functional.one_hot(owner, t).double()  # [R, t]: which adapter a direction belongs to

    def by_pair(x: Tensor) -> Tensor:
        return of.T @ x @ of

    square, quartic, rank = of.T @ sigma**2, of.T @ sigma**4, of.sum(0)
    top = torch.stack([sigma[owner == i].max() if rank[i] else sigma.new_zeros(()) for i in range(t)])
    left, right = u.T @ u, v.T @ v
    energy = torch.outer(sigma**2, sigma**2)
    own = {
        "has": torch.ones(t), "zero": (rank == 0).double(), "square": square, "rank": rank,
        "stable": torch.where(rank > 0, square / torch.where(top > 0, top, 1.0) ** 2, 0.0),
    }  # fmt: skip
    own["kept"], own["kept_cut"] = (of.T @ kept for kept in _kept(u, sigma, v, max(f.rank for f in factors)))
    pair = {
        "common": torch.ones(t, t), "inner": by_pair(torch.outer(sigma, sigma) * left * right),
        "common_square": square[:, None].expand(t, t), "quartic": quartic[:, None].expand(t, t),
        "directions": torch.minimum(rank[:, None], rank),
        "angles_out": by_pair(left**2), "angles_out_chance": torch.outer(rank, rank) / out,
        "angles_in": by_pair(right**2), "angles_in_chance": torch.outer(rank, rank) / inside,
        "weighted_out": by_pair(energy * left**2), "weighted_out_chance": torch.outer(square, square) / out,
        "weighted_in": by_pair(energy * right**2), "weighted_in_chance": torch.outer(square, square) / inside,
    }  # fmt: skip
    sums = zeros(n)
    for key, value in own.items():
        sums[key][index] = value.double()
    for key, value in pair.items():
        sums[key][index[:, None], index] = value.double()
    live = [i for i in range(t) if rank[i]]
    if len(live) > 1:
        found = _signs(module, [factors[i] for i in live], square[live].sqrt(), exact_entries, seed)
        at = index[live]
        for key, value in found.items():
            sums[key][at[:, None], at] = value
    elif live:  # alone: it agrees with itself, and no entry need be looked at
        at = index[live[0]]
        sums["entries"][at, at], sums["mass"][at, at] = float(out * inside), square[live[0]]
    return Group(module, (module,), sums)


def _svds(factors: list[LoraFactors]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The SVDs of every dW, stacked: U [k, R], sigma [R], V [k', R] and whose each direction is, [R].

    U and V are in orthonormal coordinates common to the adapters: R of one QR of all B side by side (of all A). That keeps
    every inner product and needs no Q. Null directions (below 1e-6 of the largest singular value) are left out.
    """
    ranks = [f.rank for f in factors]
    b = torch.linalg.qr(torch.cat([f.b.double() for f in factors], 1), mode="r").R.split(ranks, 1)
    a = torch.linalg.qr(torch.cat([f.a.double() for f in factors], 0).T, mode="r").R.split(ranks, 1)
    found = []
    for i, (left, right, f) in enumerate(zip(b, a, factors, strict=True)):
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(left), torch.linalg.qr(right)
        small_u, s, small_vh = torch.linalg.svd(f.scaling * (r_b @ r_a.T), full_matrices=False)
        most = abs(f.scaling) * float(left.norm() * right.norm())
        keep = s > max(NULL * float(s[0]), 1e-12 * most)
        found.append((q_b @ small_u[:, keep], s[keep], q_a @ small_vh[keep].T, torch.full((int(keep.sum()),), i)))
    u, s, v, owner = zip(*found, strict=True)
    return torch.cat(u, 1), torch.cat(s), torch.cat(v, 1), torch.cat(owner)


def _kept(u: Tensor, sigma: Tensor, v: Tensor, cut: int) -> tuple[Tensor, Tensor]:
    """||P_k u sigma||^2 of each direction, [R], for the uniform merge's top k left singular vectors: k at 5 % error, k = cut."""
    if not sigma.numel():
        return sigma, sigma
    left, s, _ = torch.linalg.svd((u * sigma) @ v.T, full_matrices=False)
    projected = (left.T @ (u * sigma)) ** 2  # [k, R]
    if float(s[0]) <= 1e-12 * float(sigma.norm()):  # the merge is zero: it reaches nothing
        return projected.new_zeros(sigma.shape), projected.new_zeros(sigma.shape)
    lost = (s**2).flip(0).cumsum(0).flip(0)  # lost[k]: what the first k leave
    k = int((lost > SAR_ERROR**2 * lost[0]).sum())
    some = min(cut, int((s > NULL * s[0]).sum()))
    return projected[:k].sum(0), projected[:some].sum(0)


def _signs(module: str, factors: list[LoraFactors], norms: Tensor, exact_entries: int, seed: int) -> dict[str, Tensor]:
    """Sign sums of adapters whose dW is not zero. Entries are taken of dW / ||dW||, whose scale float32 holds."""
    dtype = compute_dtype(*(t for f in factors for t in (f.A, f.B)))
    parts = []
    for f, size in zip(factors, norms.tolist(), strict=True):
        b, a = f.b.double(), f.a.double()
        length = float(b.norm())
        parts.append(((b / length).to(dtype), (a * (f.scaling * length / size)).to(dtype)))
    out, inside = factors[0].shape
    if out * inside <= exact_entries:
        found = signs.exact(parts)
    else:
        rows = min(out, max(2, exact_entries // inside))
        found = signs.sampled(parts, rows, seed ^ zlib.crc32(module.encode()))
    scale = torch.outer(norms, norms)
    for key in found:
        if key in ("opposed_mass", "mass"):
            found[key] = found[key] * scale
        elif key.startswith("mass_"):
            found[key] = found[key] * scale**2
    return found
