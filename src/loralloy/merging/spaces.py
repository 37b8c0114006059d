"""Spaces: where an entrywise rule works. Each turns a stack into pieces of entries and rebuilds a result from the merged ones.

| space | entries | back | source |
|---|---|---|---|
| factors | A_i and B_i, apart | dW = B A | peft 0.21.2 |
| delta | dW_i = s_i B_i A_i | as it is (dense) | the rules' own papers |
| knots | S V_i^T of [dW_1 \\| ... \\| dW_T] = U S [V_1; ...; V_T]^T | dW = U M | KnOTS, Stoica et al., ICLR 2025, section 4 |
| core | U^T dW_i V; U, V bases of [B_1 ... B_T] and [A_1; ...]^T | dW = U M V^T | Core Space, Panariello et al., NeurIPS 2025 |

KnOTS's and Core Space's own code leaves the scaling alpha / r out; here dW_i has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoralloyError
from . import kernels
from .entries import Entries, seeded
from .rule import Rule, Space
from .select import Blocks, Limits, limits_of
from .stack import LowRank, Stack
from .subspace import signs, span, svd, triplets, zero

_BLOCK = 1 << 22  # entries a block on a CPU; a GPU takes modules whole
_BLOCK_CUDA = 1 << 26


@dataclass(frozen=True)
class Piece:
    """One tensor of a space: T adapters' entries [L, size] in blocks that are made when asked for.

    `part(i, block)` gives adapter i's entries [L, n_b] of a block; `starts` the blocks' first indices.
    """

    shape: tuple[int, int]
    starts: Sequence[int]
    part: Callable[[int, int], Tensor]
    weights: Tensor
    shares: Tensor
    keys: Tensor
    dtype: torch.dtype
    stored: torch.dtype | None = None

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def blocks(self, adapter: int) -> Blocks:
        def run() -> Iterator[Tensor]:
            return (self.part(adapter, block) for block in range(len(self.starts)))

        return run

    def combined(self) -> Tensor:
        """The weighted sum of the entries, [L, rows, columns]; of pieces in one block."""
        values = [self.part(i, 0) for i in range(self.weights.shape[0])]
        entries = Entries(values, self.weights, self.shares, self.keys, None, 0, self.dtype)
        return entries.summed().reshape(-1, *self.shape)

    def apply(self, rule: Rule, limits: Sequence[Limits] | None) -> Tensor:
        """The rule's result, [L, rows, columns]."""
        for limit in limits or ():
            limit.rewind()
        merged = None
        for block, start in enumerate(self.starts):
            values = [self.part(i, block) for i in range(self.weights.shape[0])]
            if self.fused(rule, values, limits):
                return self.fuse(rule, values, _joined(limits) if limits else None)
            entries = Entries(values, self.weights, self.shares, self.keys, limits, start, self.dtype)
            done = rule.function(entries, **rule.values)
            if len(self.starts) == 1:
                merged = done
                break
            if merged is None:
                merged = done.new_empty(done.shape[0], self.size)
            merged[:, start : start + done.shape[1]] = done
        assert merged is not None
        return merged.reshape(-1, *self.shape)

    def fused(self, rule: Rule, values: Sequence[Tensor], limits: Sequence[Limits] | None) -> bool:
        """Whether the kernels take a block. Those count equals within a tensor, so it must be in one block, trimmed alone."""
        whole = len(self.starts) == 1 and (not limits or all(type(limit) is Limits for limit in limits))
        return rule.fused and whole and kernels.fits(values, self.dtype)

    def short(self, density: float) -> bool:
        """Whether the kernels can trim it too: one block of 16-bit entries, some of them kept and some not."""
        if self.stored is None or self.stored.itemsize != 2 or not 0 < int(density * self.size) < self.size:
            return False
        return kernels.fits([self.part(i, 0) for i in range(self.weights.shape[0])], self.dtype)

    def fuse(self, rule: Rule, values: Sequence[Tensor], limits: Limits | None, start: int = 0) -> Tensor:
        """The kernels' result on one block, [L, rows, columns]."""
        keys = seeded(self.keys, rule.values.get("seed", 0))
        return kernels.merge(values, self.weights, self.shares, keys, start, limits, rule.values).reshape(
            -1, *self.shape
        )


def _joined(limits: Sequence[Limits]) -> Limits:
    """T adapters' limits as one, [T, L]."""
    bars = torch.stack([limit.magnitude for limit in limits])
    if all(limit.everything for limit in limits):
        return Limits(bars)
    # a limit without a quota keeps all that equal it
    big = torch.full_like(limits[0].magnitude, torch.iinfo(torch.int32).max, dtype=torch.int64)
    quotas = torch.stack([big if limit.quota is None else limit.quota for limit in limits])
    return Limits(bars, quotas, torch.zeros_like(quotas))


@dataclass(frozen=True)
class View:
    """A stack seen in a space."""

    pieces: list[Piece]
    rebuild: Callable[[list[Tensor]], LowRank | Tensor]


def view(stack: Stack, space: Space) -> View:
    """The stack's entries in a space."""
    return _VIEWS[space](stack)


def _whole(parts: Sequence[Tensor], stack: Stack, weights: Tensor, shares: Tensor, salt: int) -> Piece:
    """A piece whose entries are in memory, T tensors [L, rows, columns]."""
    flat, keys = [p.flatten(1) for p in parts], stack.keys ^ salt if salt else stack.keys
    shape = parts[0].shape[1], parts[0].shape[2]
    return Piece(shape, (0,), lambda i, _: flat[i], weights, shares, keys, stack.dtype, parts[0].dtype)


def _factors(stack: Stack) -> View:
    if len(set(stack.ranks)) > 1:
        raise LoralloyError(
            f"factors space combines A with A and B with B, so ranks must be equal; they are {sorted(set(stack.ranks))}. "
            "Use --space delta, which takes any ranks"
        )
    c = stack.weights * stack.scaling
    root, shares = c.abs().sqrt(), stack.weights.abs().sqrt()
    signed = root.copysign(c)
    pieces = [_whole(stack.A, stack, signed, shares, 0), _whole(stack.B, stack, root, shares, 0x0B << 56)]
    return View(pieces, lambda merged: LowRank(merged[0], merged[1]))


def _delta(stack: Stack) -> View:
    out, inside = stack.shape
    limit = _BLOCK_CUDA if stack.device.type == "cuda" else _BLOCK
    rows = max(1, min(out, limit // inside))
    scaling = stack.scaling.to(stack.dtype)

    def part(i: int, block: int) -> Tensor:
        b = stack.B[i][:, block * rows : (block + 1) * rows].to(stack.dtype) * scaling[i, :, None, None]
        return (b @ stack.A[i].to(stack.dtype)).flatten(1)

    starts = range(0, out * inside, rows * inside)
    piece = Piece((out, inside), starts, part, stack.weights, stack.weights.abs(), stack.keys, stack.dtype)
    return View([piece], lambda merged: merged[0])


def _knots(stack: Stack) -> View:
    """U and s of [dW_1 | ... | dW_T] = U s [V_1; ...; V_T]^T in r-space; s V_i^T = U^T dW_i.

    Only directions with s above 3e-6 of the largest (3e-13 in float64) have a row, as the official code keeps s > 1e-5: an
    absolute limit would make merging depend on the scale of dW. Modules are taken together by how many rows they have, so
    that a density counts the rows that there are.
    """
    parts = stack.absorbed()
    left = span(torch.cat([p.B for p in parts], 2))
    blocks = left.r.split(list(stack.ranks), 2)
    small = torch.cat([x @ span(p.A.mT).r.mT for x, p in zip(blocks, parts, strict=True)], 2)
    _, s, u = svd(small.mT, stack.dtype)
    basis = left.lift(u)
    u, basis = u * (sign := signs(basis)), (basis * sign).to(stack.dtype)
    aligned = [((u.mT @ x) @ p.A.to(u.dtype)).to(stack.dtype) for x, p in zip(blocks, parts, strict=True)]
    counts = (s > zero(stack.dtype) * s[:, :1]).sum(1).clamp(min=1, max=min(stack.shape[0], s.shape[1]))
    heights = sorted(set(counts.tolist()))
    top = heights[-1]
    if len(heights) == 1:
        piece = _whole([x[:, :top] for x in aligned], stack, stack.weights, stack.weights.abs(), 0)
        return View([piece], lambda merged: _narrow(merged[0], basis[:, :, :top]))
    pieces, where = [], []
    for rows in heights:
        at = (counts == rows).nonzero().flatten()
        some = stack.only(at)
        pieces.append(_whole([x[at, :rows] for x in aligned], some, some.weights, some.weights.abs(), 0))
        where.append(at)

    def rebuild(merged: list[Tensor]) -> LowRank:
        a = merged[0].new_zeros(stack.modules, top, stack.shape[1])
        for x, at in zip(merged, where, strict=True):
            a[at, : x.shape[1]] = x
        return _narrow(a, basis[:, :, :top])

    return View(pieces, rebuild)


def _narrow(a: Tensor, b: Tensor) -> LowRank:
    """b @ a at a rank of at most min(out, in), which a has more rows than where `in` is below the ranks and `out`."""
    inside = a.shape[2]
    if a.shape[1] <= inside:
        return LowRank(a, b)
    return LowRank(torch.eye(inside, dtype=a.dtype, device=a.device).repeat(a.shape[0], 1, 1), b @ a)


def _core(stack: Stack) -> View:
    """M_i = U^T dW_i V, [min(R, out), min(R, in)], U the left singular vectors of [B_1 ... B_T] and V of [A_1; ...; A_T]^T.

    Each adapter enters in its balanced form, B_i = U_i sqrt(s_i), A_i = sqrt(s_i) V_i^T from the SVD of dW_i, so that the
    result is a function of dW_i alone. The paper stacks the factors as they were trained: equally lossless, but an entrywise
    rule would then give another dW for (G A, B G^-1). U and V are the eigenvectors of sum_i U_i s_i U_i^T and of
    sum_i V_i s_i V_i^T. Directions that no adapter has are rows and columns of zeros and count in a density, as in the paper.
    """
    t = triplets(stack)
    u, v = (_eigenvectors(side, t.s, n) for side, n in ((t.u, stack.shape[0]), (t.v, stack.shape[1])))
    left, right = t.left.lift(u), t.right.lift(v)
    sign_u, sign_v = signs(left), signs(right)
    cores = [
        (((u * sign_u).mT @ x * s[:, None]) @ (y.mT @ (v * sign_v))).to(stack.dtype)
        for x, s, y in zip(t.u, t.s, t.v, strict=True)
    ]
    piece = _whole(cores, stack, stack.weights, stack.weights.abs(), 0)
    basis, across = (left * sign_u).to(stack.dtype), (right * sign_v).mT.to(stack.dtype)
    if basis.shape[2] <= across.shape[1]:
        return View([piece], lambda merged: LowRank(merged[0] @ across, basis))
    return View([piece], lambda merged: LowRank(across, basis @ merged[0]))


def _eigenvectors(x: Sequence[Tensor], s: Sequence[Tensor], most: int) -> Tensor:
    """Eigenvectors of sum_i x_i diag(s_i) x_i^T, the largest eigenvalues first, at most `most`: [L, R, min(R, most)]."""
    total = torch.cat([a * b[:, None] for a, b in zip(x, s, strict=True)], 2) @ torch.cat(list(x), 2).mT
    return torch.linalg.eigh((total + total.mT) / 2).eigenvectors.flip(-1)[:, :, :most]


_VIEWS: dict[str, Callable[[Stack], View]] = {"factors": _factors, "delta": _delta, "knots": _knots, "core": _core}


def apply(rule: Rule, stack: Stack, space: Space, limits: Sequence[Limits] | None = None) -> LowRank | Tensor:
    """An entrywise rule on one stack: low-rank factors, or dW itself [L, out, in] from delta space.

    `limits` are those of T adapters over all modules, from a pass before; without them a rule that trims does so by tensor.
    """
    seen = view(stack, space)
    merged = []
    for piece in seen.pieces:
        own: Sequence[Limits] | None = limits
        if own is None and "trim" in rule.values and rule.fused and piece.short(rule.values["density"]):
            values = [piece.part(i, 0) for i in range(stack.adapters)]
            every = kernels.largest16(values, int(rule.values["density"] * piece.size))
            merged.append(piece.fuse(rule, values, every))
            continue
        if own is None and "trim" in rule.values:
            parts = [piece.blocks(i) for i in range(stack.adapters)]
            own = limits_of(parts, piece.size, rule.values["density"], len(piece.starts) == 1)
        merged.append(piece.apply(rule, own))
    return seen.rebuild(merged)
