"""Terms: what an entrywise rule makes of one tensor, as a function of the adapters' coefficients that gradients flow through.

With PEFT's defaults (vote "unweighted", normaliser "count") no mask of ties, dare_ties, dare_linear or magnitude_prune depends
on the coefficients, so the result is linear in them: out = sum_i u_i T_i with constant T_i, and its gradient is exact. Where a
mask does depend on them it is made again from their values at each call and held there: the gradient is that of the rule
with its masks fixed, which is the rule's own wherever no entry is about to change its side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import LoralloyError
from .entries import Entries, Majority, Normaliser
from .rule import Rule
from .select import Limits, largest, limits_of
from .spaces import Piece

How: TypeAlias = Literal["sum", "share", "vote", "prune"]
_WIDE = 1 << 24  # entries of 16-bit terms that are widened at once on a CPU


def wide_of(x: Tensor) -> torch.dtype:
    """What coefficients of x are in: in 16 bits they would move in coarse steps."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Combine(torch.autograd.Function):
    """onto + sum_i w_i T_i in float32 (float64 where T is), rounded once to `onto`'s dtype; differentiable in w alone.

    T [n, ...], w [n], onto [...] or None. The gradient of w is <G, T_i> for each i: nothing is kept but T and w's dtype.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, terms: Tensor, onto: Tensor | None) -> Tensor:
        ctx.terms, ctx.given = terms, w.dtype
        wide = wide_of(terms)
        w = w.to(wide)
        with torch.autocast(terms.device.type, enabled=False):  # a coefficient in 16 bits would move in coarse steps
            if terms.dtype == wide:
                flat = terms.flatten(1).T
                if onto is not None and onto.dtype == wide and onto.is_contiguous():
                    return torch.addmv(onto.view(-1), flat, w).view(onto.shape)
                total = (flat @ w).view(terms.shape[1:])
                total = total if onto is None else total.add_(onto)
            else:
                total = terms.new_zeros(terms.shape[1:], dtype=wide) if onto is None else onto.to(wide, copy=True)
                for term, c in zip(terms, w, strict=True):
                    total.addcmul_(term, c)
        return total if onto is None else total.to(onto.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        terms, grad = ctx.terms.flatten(1), grads[0].flatten()
        with torch.autocast(terms.device.type, enabled=False):
            if _slow(terms):
                return _products(terms, grad).to(ctx.given), None, None
            return (terms @ grad.to(terms.dtype)).to(ctx.given), None, None


class CombineMany(torch.autograd.Function):
    """What `Combine` makes of m tensors at once, without `onto`: sum_i w_i T_i in float32 (float64); differentiable in w.

    w [m, n], T [m, n, ...]; [m, ...].
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, terms: Tensor) -> Tensor:
        ctx.terms, ctx.given = terms, w.dtype
        wide = wide_of(terms)
        w, flat = w.to(wide), terms.flatten(2)
        with torch.autocast(terms.device.type, enabled=False):
            if terms.dtype == wide:
                total = torch.bmm(w[:, None], flat)
            else:
                total = flat.new_zeros(flat.shape[0], flat.shape[2], dtype=wide)
                for i in range(terms.shape[1]):
                    total.addcmul_(flat[:, i], w[:, i, None])
        return total.view(terms.shape[:1] + terms.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        terms, grad = ctx.terms.flatten(2), grads[0].flatten(1)
        with torch.autocast(terms.device.type, enabled=False):
            if _slow(terms):
                rows = [_products(t, g) for t, g in zip(terms, grad, strict=True)]
                return torch.stack(rows).to(ctx.given), None
            return torch.bmm(terms, grad.to(terms.dtype)[:, :, None])[:, :, 0].to(ctx.given), None


class Roots(torch.autograd.Function):
    """sign(w) sqrt(|w|) and sqrt(|w|), both of w's shape; their gradients are infinite at 0, where 0 is taken."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.w = w  # not saved for one backward alone: two losses under one composition may each have theirs
        root = w.abs().sqrt_()
        return root.copysign(w), root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        sign = ctx.w.sign()
        slope = ctx.w.abs().rsqrt_().mul_(0.5).masked_fill_(sign == 0, 0.0)
        return torch.addcmul(grads[0], grads[1], sign).mul_(slope)


def _slow(terms: Tensor) -> bool:
    """16-bit products of a matrix and a vector are not fast on a CPU."""
    return terms.dtype.itemsize <= 2 and terms.device.type == "cpu"


def _products(terms: Tensor, grad: Tensor) -> Tensor:
    """<grad [size], T_i> for each T_i of terms [n, size], [n] float32, widened a part at a time."""
    rows = []
    for term in terms:
        parts = zip(term.split(_WIDE), grad.split(_WIDE), strict=True)
        zero = grad.new_zeros((), dtype=torch.float32)
        rows.append(sum((torch.dot(x.float(), g.float()) for x, g in parts), zero))
    return torch.stack(rows)


@dataclass(frozen=True)
class Terms:
    """One tensor of a rule's result as a function of coefficients u [n].

    Attributes:
        values: [n, rows, columns], what u multiplies.
        how: "sum": sum_i u_i x_i. "share": that, divided at each entry by sum_i |u_i| over the x_i that are not 0. "vote": the
            sign is elected among u_i x_i, those that have it are added and divided by their number or sum |u_i|. "prune": the
            largest magnitudes of the sum.
        majority, normaliser, density: of the rule, where `how` asks for them.
    """

    values: Tensor
    how: How = "sum"
    majority: Majority = "total"
    normaliser: Normaliser = "count"
    density: float = 1.0

    def at(self, u: Tensor, onto: Tensor | None = None) -> Tensor:
        """onto + the result [rows, columns], differentiable in u."""
        if self.how == "sum":
            return Combine.apply(u, self.values, onto)  # type: ignore[no-any-return]
        x = self.values
        u = u.to(x.dtype if x.dtype.itemsize > 2 else torch.float32)
        spread = u[:, None, None]
        if self.how == "prune":
            total = Combine.apply(u, x, None)
            flat = total.detach().reshape(1, -1)
            limit = largest(lambda: iter([flat]), flat.shape[1], int(self.density * flat.shape[1]), True)
            total = total * (limit.keep(flat) != 0).view_as(total)
        else:
            with torch.no_grad():
                agree = self._agreeing(x, spread)
            total = (x * agree * spread).sum(0)
            if self.normaliser == "count":
                total = total / agree.sum(0).clamp_(min=1)
            else:
                size = (agree * spread.abs()).sum(0)
                total = total / (size + (size == 0))
        return total if onto is None else (onto + total).to(onto.dtype)

    def _agreeing(self, x: Tensor, u: Tensor) -> Tensor:
        """Which entries are averaged, [n, rows, columns]; the sign is + where the vote is 0, as in PEFT."""
        if self.how == "share":
            return x != 0
        x = x * u
        poll = (x if self.majority == "total" else x.sign()).sum(0)
        return x * torch.where(poll >= 0, 1.0, -1.0).to(x.dtype) > 0


def make_terms(piece: Piece, rule: Rule, limits: list[Limits] | None, dtype: torch.dtype) -> Terms:
    """The terms of one module's piece (L = 1) whose weights are those of coefficients 1.

    Args:
        piece: entries of n adapters.
        rule: an entrywise rule.
        limits: of n adapters over all modules, where the rule trims that way.
        dtype: of the terms; they are made in the piece's own.
    """
    given, n = rule.values, piece.weights.shape[0]
    merged = given.get("prune") == "merged"
    if limits is None and "trim" in given and not merged:
        parts = [piece.blocks(i) for i in range(n)]
        limits = limits_of(parts, piece.size, given["density"], len(piece.starts) == 1)
    for limit in limits or ():
        limit.rewind()
    elects, normaliser = "majority" in given, given.get("normaliser", "count")
    how: How = "sum"
    if merged:
        how = "prune"
    elif elects and given["vote"] == "weighted":
        how = "vote"
    elif elects and normaliser == "weights":
        how = "share"
    values = torch.empty(n, piece.size, dtype=dtype, device=piece.weights.device)
    for block, start in enumerate(piece.starts):
        parts_ = [piece.part(i, block) for i in range(n)]
        entries = Entries(parts_, piece.weights, piece.shares, piece.keys, limits, start, piece.dtype)
        kept = _kept(rule, entries, merged)
        if how in ("sum", "share") and elects:
            kept = _elected(kept, given["majority"], how == "sum")
        for i, x in enumerate(kept):
            values[i, start : start + x.shape[1]] = x[0] * piece.weights[i, 0].to(x.dtype)
    density = given.get("density", 1.0)
    return Terms(values.view(n, *piece.shape), how, given.get("majority", "total"), normaliser, density)


def _kept(rule: Rule, entries: Entries, merged: bool) -> list[Tensor]:
    """The entries after trimming or dropping, before any vote: what no coefficient changes."""
    name, given = rule.name, rule.values
    if name == "linear" or merged:
        return [x.to(entries.dtype) for x in entries.values]
    if name in ("dare_linear", "dare_ties"):
        return entries.dropped(given["density"], given["seed"])
    if name in ("ties", "magnitude_prune"):
        return [x.to(entries.dtype) for x in entries.trimmed()]
    raise LoralloyError(f"rule {name!r} has no terms")  # LEARNABLE has seen to it


def _elected(kept: list[Tensor], majority: Majority, divided: bool) -> list[Tensor]:
    """The entries that have the elected sign, else 0; `divided` by how many they are (TIES, Yadav et al. 2023, step 3)."""
    poll = torch.zeros_like(kept[0])
    for x in kept:
        poll += x if majority == "total" else x.sign()
    sign = torch.copysign(poll.new_ones(()), poll)
    agreeing = [x * ((x * sign) > 0) for x in kept]
    if not divided:
        return agreeing
    count = torch.zeros_like(poll)
    for x in agreeing:
        count += x != 0
    count.clamp_(min=1.0)
    return [x.div_(count) for x in agreeing]
