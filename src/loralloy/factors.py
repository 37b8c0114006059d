"""LoraFactors: the A, B and scaling of one module, and exact algebra on dW = scaling * B @ A that never forms dW.

Everything here works in "r-space". With thin QRs B = Q_b R_b and A^T = Q_a R_a, dW = Q_b (s R_b R_a^T) Q_a^T, so the small
core s R_b R_a^T has the norm, the singular values and the truncations of dW. QR is used rather than Gram matrices because
near-duplicate adapters square the condition number of a Gram matrix away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .errors import LoralloyError

Kind: TypeAlias = Literal["linear", "embedding", "conv"]


@dataclass(frozen=True)
class LoraFactors:
    """One module's low-rank update dW = scaling * B @ A, shape [out, in].

    Attributes:
        A: [r, in]; for a convolution [r, in, *kernel]; for an embedding [r, vocabulary].
        B: [out, r]; for a convolution [out, r, 1, ...]; for an embedding [dimension, r].
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        kind: what the module is. An embedding's own weight is dW^T, [vocabulary, dimension], as in PEFT.

    Raises LoralloyError when A and B do not fit.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    kind: Kind = "linear"

    def __post_init__(self) -> None:
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            raise LoralloyError(
                f"A {list(a)} and B {list(b)} do not fit; expected A [r, in] and B [out, r] of one rank r"
            )
        if self.kind != "conv" and (len(a) != 2 or len(b) != 2):
            raise LoralloyError(f"A {list(a)} and B {list(b)} of a {self.kind} module must be matrices")
        if self.kind == "conv" and (len(a) < 3 or len(a) != len(b) or any(k != 1 for k in b[2:])):
            raise LoralloyError(
                f"A {list(a)} and B {list(b)} of a convolution must be [r, in, *kernel] and [out, r, 1, ...]"
            )
        if not math.isfinite(self.scaling):
            raise LoralloyError(f"scaling is {self.scaling}; it must be finite")

    # -- shapes --------------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Number of rows of A (the numerical rank may be lower)."""
        return self.A.shape[0]

    @property
    def a(self) -> Tensor:
        """A as a matrix, [r, in] ([r, in * kernel] for a convolution)."""
        return self.A if self.A.ndim == 2 else self.A.flatten(1)

    @property
    def b(self) -> Tensor:
        """B as a matrix, [out, r]."""
        return self.B if self.B.ndim == 2 else self.B.flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of dW as a matrix."""
        return self.B.shape[0], self.a.shape[1]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LoraFactors:
        """The same factors in another dtype or on another device."""
        return replace(self, A=self.A.to(device=device, dtype=dtype), B=self.B.to(device=device, dtype=dtype))

    def with_matrices(self, a: Tensor, b: Tensor, scaling: float = 1.0) -> LoraFactors:
        """New factors of this module's kind and kernel from matrices a [k, in] and b [out, k]."""
        if self.kind == "conv":
            a = a.reshape(a.shape[0], *self.A.shape[1:])
            b = b.reshape(*b.shape, *([1] * (self.A.ndim - 2)))
        return LoraFactors(a.contiguous(), b.contiguous(), scaling, self.kind)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """dW itself, [out, in]. For tests and small modules: everything else avoids it."""
        return self.scaling * (self.b.to(dtype) @ self.a.to(dtype))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: what algebra on these factors runs in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _check_same_module(factors: Sequence[LoraFactors]) -> None:
    if not factors:
        raise LoralloyError("no factors given; at least one adapter must have this module")
    first = factors[0]
    for other in factors[1:]:
        if other.kind != first.kind or other.shape != first.shape or other.A.shape[1:] != first.A.shape[1:]:
            raise LoralloyError(
                f"modules do not match: {first.kind} {list(first.shape)} (A {list(first.A.shape)}) against "
                f"{other.kind} {list(other.shape)} (A {list(other.A.shape)}); the adapters are not of one base model"
            )


def inner(f: LoraFactors, g: LoraFactors) -> float:
    """<dW_f, dW_g> = s_f s_g <B_f^T B_g, A_f A_g^T>, in float64 where the device has it."""
    _check_same_module([f, g])
    wide = widest(f.A.device)
    left = f.b.to(wide).T @ g.b.to(wide)
    right = f.a.to(wide) @ g.a.to(wide).T
    return f.scaling * g.scaling * float((left * right).sum())


def norm(f: LoraFactors, dtype: torch.dtype | None = None) -> float:
    """||dW||_F, from the core of the two QRs, computed in `dtype` (float64 where the device has it)."""
    return float(torch.linalg.matrix_norm(_core(f, dtype)))


def cosine(f: LoraFactors, g: LoraFactors) -> float:
    """Cosine of the angle between dW_f and dW_g; 0.0 when either is zero."""
    lengths = norm(f) * norm(g)
    return inner(f, g) / lengths if lengths > 0 else 0.0


def weighted_sum(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """sum_i w_i dW_i, exactly, as one set of factors of rank sum_i r_i (scaling 1).

    sqrt(|w_i s_i|) goes to each side, its sign to A, so that neither side over- or underflows in a 16-bit dtype.
    Adapters of weight 0 are left out. Raises LoralloyError on modules that do not match or a weight missing.
    """
    _check_same_module(factors)
    if len(factors) != len(weights):
        raise LoralloyError(f"{len(factors)} adapters but {len(weights)} weights; give one weight an adapter")
    dtype = compute_dtype(*(t for f in factors for t in (f.A, f.B)))
    parts = [(f, w * f.scaling) for f, w in zip(factors, weights, strict=True) if w * f.scaling != 0]
    first = factors[0]
    if not parts:
        zeros = first.a.new_zeros((1, first.shape[1]), dtype=dtype), first.b.new_zeros((first.shape[0], 1), dtype=dtype)
        return first.with_matrices(*zeros)
    a = torch.cat([f.a.to(dtype) * math.copysign(math.sqrt(abs(c)), c) for f, c in parts], 0)
    b = torch.cat([f.b.to(dtype) * math.sqrt(abs(c)) for f, c in parts], 1)
    return first.with_matrices(a, b)


class _Householder:
    """The QR of x [m, n] with Q kept as reflectors: applying them to a few columns costs less than forming Q."""

    def __init__(self, x: Tensor) -> None:
        self.q: Tensor | None = None
        self.rows = x.shape[0]
        if x.device.type == "mps":  # has no ormqr
            self.q, self.r = torch.linalg.qr(x)
        else:
            reflectors, self.tau = torch.geqrf(x)
            self.reflectors, self.r = reflectors[:, : self.tau.numel()], reflectors[: self.tau.numel()].triu()

    def apply(self, small: Tensor) -> Tensor:
        """Q @ small, [m, k]."""
        if self.q is not None:
            return self.q @ small
        padded = small.new_zeros(self.rows, small.shape[1])
        padded[: small.shape[0]] = small
        return torch.ormqr(self.reflectors, self.tau, padded)


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _core(f: LoraFactors, dtype: torch.dtype | None = None) -> Tensor:
    """s R_b R_a^T, [<= r, <= r], with the norm and the singular values of dW; float64 where the device has it."""
    wide = dtype or widest(f.A.device)
    r_b = torch.linalg.qr(f.b.to(wide), mode="r").R
    r_a = torch.linalg.qr(f.a.to(wide).T, mode="r").R
    return f.scaling * (r_b @ r_a.T)


def singular_values(f: LoraFactors) -> Tensor:
    """Singular values of dW, descending, [min(out, in, r)]."""
    return torch.linalg.svdvals(_core(f))


def truncate(f: LoraFactors, rank: int) -> tuple[LoraFactors, float]:
    """The best rank-`rank` approximation of dW (Eckart-Young), and its relative error ||dW_k - dW||_F / ||dW||_F.

    With thin QRs B = Q_b R_b, A^T = Q_a R_a and the SVD U S V^T of the core, dW = (Q_b U) S (Q_a V)^T is its own SVD: cost
    O((out + in) r^2 + r^3), dW is never formed.
    Signs are fixed (the largest entry of each left vector is positive), so that equal input gives equal bytes.
    The square root of each singular value goes to each side.
    """
    if rank < 1:
        raise LoralloyError(f"rank {rank} is not positive; give a rank of at least 1")
    dtype = compute_dtype(f.A, f.B)
    left, right = _Householder(f.b.to(dtype)), _Householder(f.a.to(dtype).T)
    small_u, s, small_vh = torch.linalg.svd(f.scaling * (left.r @ right.r.T), full_matrices=False)
    k = min(rank, s.numel())
    u, v = left.apply(small_u[:, :k]), right.apply(small_vh[:k].T)
    top = u.abs().argmax(0)
    sign = torch.sign(u.gather(0, top[None])[0])
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    root = s[:k].sqrt()
    total = float(torch.linalg.vector_norm(s))
    lost = float(torch.linalg.vector_norm(s[k:])) if k < s.numel() else 0.0
    result = f.with_matrices((v * (root * sign)).T, u * (root * sign))
    return result, (lost / total if total > 0 else 0.0)


def relative_error(f: LoraFactors, exact: LoraFactors) -> float:
    """||dW_f - dW_exact||_F / ||dW_exact||_F by a QR of the stacked factors; inf if only dW_exact is zero."""
    lost, total = difference(f, exact), norm(exact)
    return lost / total if total > 0 else (0.0 if lost == 0 else math.inf)


def difference(f: LoraFactors, g: LoraFactors, dtype: torch.dtype | None = None) -> float:
    """||dW_f - dW_g||_F, without cancellation: the norm of one stacked set of factors, computed in `dtype` as `norm`."""
    wide = dtype or widest(f.A.device)
    return norm(weighted_sum([f.to(wide), g.to(wide)], [1.0, -1.0]), wide)


def pad(f: LoraFactors, rank: int) -> LoraFactors:
    """The same dW with zero rows and columns added up to `rank`, for formats that want one rank everywhere."""
    if f.rank >= rank:
        return f
    missing = rank - f.rank
    a = torch.cat([f.A, f.A.new_zeros(missing, *f.A.shape[1:])], 0)
    b = torch.cat([f.B, f.B.new_zeros(f.B.shape[0], missing, *f.B.shape[2:])], 1)
    return replace(f, A=a, B=b)
