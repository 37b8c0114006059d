"""Small banks of adapters that differ in modules, ranks and scalings, and what rules on dW make of them, dense, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import (
    adapter,
    factors,
)
from loralloy.bank import Bank
from loralloy.merging import RULES, Rule, get_rule, stacking
from loralloy.merging.entries import random_mask
from loralloy.weights import Weights

SHAPES = {"q": (14, 10), "k": (14, 10), "v": (6, 10), "mlp": (10, 22)}
HAVE = {"a": ["q", "k", "v", "mlp"], "b": ["mlp", "q", "x"], "c": ["k", "q", "v"]}
RANKS = {"a": 2, "b": 5, "c": 30}
WEIGHTS = Weights({"b": {"*": 0.7, "q": 0.0}, "a": -0.4, "c": {"v": 1.0, "q": 0.5}})
EVERYWHERE = [(name, space) for name, rule in RULES.items() for space in rule.spaces]


def bank(dtype: torch.dtype = torch.float32, ranks: dict[str, int] = RANKS) -> Bank:
    shapes = {**SHAPES, "x": (6, 10)}
    return Bank(
        adapter({m: factors(*shapes[m], ranks[n], 10 * i + j, 0.3 + i, dtype) for j, m in enumerate(have)}, n)
        for i, (n, have) in enumerate(HAVE.items())
    )


def alike() -> Bank:
    """Equal ranks, as factors space wants them."""
    return bank(ranks=dict.fromkeys(RANKS, 4))


# -- oracles: rules on dW, dense, float64 ------------------------------------------------------------------------------


def top(x: Tensor, density: float) -> Tensor:
    kept = x.flatten().abs().sort(descending=True, stable=True).indices[: int(density * x.numel())]
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.reshape(x.shape), x, 0)


def elect(parts: list[Tensor], weights: list[float]) -> Tensor:
    x, w = torch.stack(parts), torch.tensor(weights, dtype=torch.float64)[:, None, None]
    agrees = x * torch.where(x.sum(0) >= 0, 1.0, -1.0) > 0
    return (torch.where(agrees, x, 0) * w).sum(0) / agrees.sum(0).clamp(min=1)


def oracle(rule: Rule, parts: list[Tensor], weights: list[float], keys: list[int]) -> Tensor:
    v = rule.values
    total = sum((w * x for x, w in zip(parts, weights, strict=True)), torch.zeros_like(parts[0]))
    if rule.name in ("linear", "cat", "svd"):
        return total
    if rule.name == "magnitude_prune" and v["prune"] == "merged":
        return top(total, v["density"])
    if rule.name.startswith("dare"):
        kept = [random_mask(torch.tensor([k]), 0, parts[0].numel(), v["density"], v["seed"])[0] for k in keys]
        parts = [torch.where(m.reshape(x.shape), x / v["density"], 0) for x, m in zip(parts, kept, strict=True)]
    else:
        parts = [top(x, v["density"]) for x in parts]
    if rule.name.endswith("ties"):
        return elect(parts, weights)
    return sum((w * x for x, w in zip(parts, weights, strict=True)), torch.zeros_like(parts[0]))


ORACLES = ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
BOUND = [get_rule(n) for n in ORACLES] + [
    RULES["ties"](density=0.7),
    RULES["dare_ties"](density=0.9, seed=5),
    RULES["magnitude_prune"](density=0.4, prune="merged"),
]


def expected(rule: Rule, of: Bank, weights: Weights, dense: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a rule makes of dense[adapter][module]."""
    key = stacking.keys_of(rule, [of[n] for n in weights.names])
    result = {}
    for m in dict.fromkeys(m for n in weights.names for m in dense[n]):
        who = [(i, n) for i, n in enumerate(weights.names) if m in dense[n] and weights.of(n, m)]
        if who:
            parts, w = [dense[n][m].double() for _, n in who], [weights.of(n, m) for _, n in who]
            result[m] = oracle(rule, parts, w, [key(i, m) for i, _ in who])
    return result
