"""linear: the weighted sum. Exact in delta space; PEFT's rough approximation in factors space."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import LoralloyError
from ..factors import LoraFactors, compute_dtype, weighted_sum
from .rule import Rule, Space


def linear(factors: Sequence[LoraFactors], weights: Sequence[float], space: Space = "delta") -> LoraFactors:
    """delta: dW = sum_i w_i s_i B_i A_i, exact, any ranks (task arithmetic; Ilharco et al. 2023, section 2).

    factors: PEFT's `linear`, A = sum_i sign(w_i s_i) sqrt(|w_i s_i|) A_i and B = sum_i sqrt(|w_i s_i|) B_i [peft 0.21.2,
    tuners/lora/model.py], whose product has cross terms B_i A_j and so is not the weighted sum. Equal ranks only.
    """
    if space == "delta":
        return weighted_sum(factors, weights)
    ranks = {f.rank for f in factors}
    if len(ranks) > 1:
        raise LoralloyError(
            f"rule 'linear' in factors space adds A to A, so ranks must be equal; they are {sorted(ranks)}. "
            "Use --space delta, which is exact for any ranks"
        )
    dtype = compute_dtype(*(f.A for f in factors))
    roots = [math.sqrt(abs(w * f.scaling)) for f, w in zip(factors, weights, strict=True)]
    signs = [math.copysign(1.0, w * f.scaling) for f, w in zip(factors, weights, strict=True)]
    a = sum((sign * root * f.a.to(dtype) for f, root, sign in zip(factors, roots, signs, strict=True)))
    b = sum((root * f.b.to(dtype) for f, root in zip(factors, roots, strict=True)))
    return factors[0].with_matrices(a, b)  # type: ignore[arg-type]


RULE = Rule(
    "linear",
    linear,
    ("delta", "factors"),
    "full",
    "the weighted sum of dW (delta), or of A and of B apart (factors, PEFT's)",
    "the default: exact in delta space. factors space only to reproduce PEFT",
    sums=("delta",),
)
