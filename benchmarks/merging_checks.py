"""Whether what benchmarks/merging.py timed is right: against PEFT's dW, and against the optimum that the rank allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loralloy.factors import LoraFactors
from loralloy.merging import merge_factors
from merging_worker import WEIGHTS

COMPARED = ("linear", "ties", "magnitude_prune", "cat")  # deterministic, and PEFT's result is the same dW


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def spectrum(dense: Tensor) -> Tensor:
    """Singular values, descending, from the eigenvalues of the smaller Gram matrix in float64 (a dense SVD takes minutes)."""
    small = dense if dense.shape[0] <= dense.shape[1] else dense.T
    return torch.linalg.eigvalsh(small.double() @ small.double().T).flip(0).clamp(min=0).sqrt()


def optimum(adapters: list[dict[str, LoraFactors]], name: str, rank: int, got: LoraFactors) -> dict[str, float]:
    """A module's relative error against the exact sum, and the least that the rank allows (dense, float64)."""
    exact = sum((w * a[name].dense() for a, w in zip(adapters, WEIGHTS, strict=True)))
    assert isinstance(exact, Tensor)
    s = spectrum(exact)
    best = float(s[rank:].norm() / s.norm())
    ours = relative(got.dense(), exact)
    return {"ours": ours, "optimum": best, "above": ours / best - 1 if best else ours}


def checked(
    label: str, adapters: list[dict[str, LoraFactors]], rule: Any, rank: int, result: dict[str, LoraFactors], model: Any
) -> dict[str, Any]:
    """What a row says of correctness; `model` holds PEFT's result of the same as "merged"."""
    if label == "svd":
        ends = ("0", str(max(int(n.split(".")[2]) for n in result)))
        picked = [n for n in result if n.split(".")[2] in ends and ("q_proj" in n or "down" in n)][:3]
        return {"error": {n: optimum(adapters, n, rank, result[n]) for n in picked}}
    if label == "ties on dW":
        return {"error": dense_check(adapters, rule, rank, result)}
    if label not in COMPARED or model is None:
        return {}
    worst = 0.0
    for n in list(result)[:: max(1, len(result) // 12)]:
        layer = model.base_model.model.get_submodule(n)
        worst = max(worst, relative(result[n].dense(torch.float32), layer.get_delta_weight("merged")))
    return {"from peft": worst}


def dense_check(
    adapters: list[dict[str, LoraFactors]], rule: Any, rank: int, result: dict[str, LoraFactors]
) -> dict[str, Any]:
    """TIES on dW of two modules: energy that our cut captures and its error, against the dense optimum of the same dW."""
    said = {}
    for name in [n for n in result if ".0." in n and ("q_proj" in n or "k_proj" in n)]:
        one = [{name: a[name]} for a in adapters]
        dense = merge_factors(one, WEIGHTS, rule, "delta", "full", torch.float32)[name].dense()
        s = spectrum(dense)
        best = float((s[:rank] ** 2).sum())
        cut = merge_factors(one, WEIGHTS, rule, "delta", rank, torch.float32)[name].dense()
        error, least = float((cut - dense).norm() / s.norm()), float(s[rank:].norm() / s.norm())
        said[name] = {"captured": (1 - error**2) * float((s**2).sum()) / best, "error above dense": error / least - 1}
    return said
