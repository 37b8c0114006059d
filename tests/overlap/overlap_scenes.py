"""Random adapters, and their overlap from dense float64 computations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helpers import adapter, generator
from loralloy.bank import Bank
from loralloy.factors import LoraFactors
from loralloy.overlap import Overlap, overlap, tables

WHOLE = ("cosine", "gain", "norm", "sar", "sar_cut", "stable_rank")


def made(out: int, inside: int, rank: int, seed: int, scaling: float = 1.0, kind: str = "linear") -> LoraFactors:
    """Random factors of unequal singular values, of any kind; `inside` is that of the matrix."""
    g = generator(seed)
    a = torch.randn(rank, inside, generator=g) * torch.logspace(0, -1, rank)[:, None]
    b = torch.randn(out, rank, generator=g)
    if kind == "conv":
        return LoraFactors(a.reshape(rank, inside // 2, 2), b[..., None], scaling, "conv")
    return LoraFactors(a, b, scaling, kind)  # type: ignore[arg-type]


def measured(*parts: dict[str, LoraFactors], **options) -> Overlap:
    return overlap(Bank([adapter(p, f"a{i}") for i, p in enumerate(parts)]), **options)


def one(*factors: LoraFactors, **options) -> Overlap:
    return measured(*({"layers.0.q": f} for f in factors), **options)


# -- the oracle: everything from dense float64 dW ----------------------------------------------------------------------


def div(x: float, y: float) -> float:
    return x / y if y > 0 else math.nan


def dense_overlap(parts: list[dict[str, LoraFactors]], modules: list[str]) -> dict[str, Tensor]:
    n = len(parts)
    dw = [{m: p[m].dense() for m in modules if m in p} for p in parts]
    keys = ["cosine", "out", "in", "out_plain", "in_plain", "out_chance", "in_plain_chance", "signs", "signs_plain"]
    pair = {key: torch.full((n, n), math.nan, dtype=torch.float64) for key in keys}
    for i in range(n):
        for j in range(n):
            both = [m for m in modules if m in dw[i] and m in dw[j]]
            x = torch.cat([dw[i][m].flatten() for m in both] or [torch.zeros(0)]).double()
            y = torch.cat([dw[j][m].flatten() for m in both] or [torch.zeros(0)]).double()
            pair["cosine"][i, j] = div(float(x @ y), float(x.norm() * y.norm()))
            there = (x != 0) & (y != 0)
            pair["signs_plain"][i, j] = div(float((there & (x * y < 0)).sum()), float(there.sum()))
            pair["signs"][i, j] = div(float((x * y).clamp(max=0).sum().neg()), float((x * y).abs().sum()))
            for side in ("out", "in"):
                s = [(dw[i][m], dw[j][m]) if side == "out" else (dw[i][m].T, dw[j][m].T) for m in both]
                grams = [(p @ p.T, q @ q.T) for p, q in s]
                below = math.sqrt(
                    sum(float((p * p).sum()) for p, _ in grams) * sum(float((q * q).sum()) for _, q in grams)
                )
                pair[side][i, j] = div(sum(float((p * q).sum()) for p, q in grams), below)
                chance = sum(float(p.trace() * q.trace()) / p.shape[0] for p, q in grams)
                if side == "out":
                    pair["out_chance"][i, j] = div(chance, below)
                spaces = [(columns(p), columns(q)) for p, q in s]
                angles = sum(
                    float(torch.linalg.svdvals(p.T @ q).square().sum()) for p, q in spaces if p.numel() and q.numel()
                )
                fewest = sum(min(p.shape[1], q.shape[1]) for p, q in spaces)
                pair[f"{side}_plain"][i, j] = div(angles, fewest)
                if side == "in":
                    chance = sum(p.shape[1] * q.shape[1] / p.shape[0] for p, q in spaces)
                    pair["in_plain_chance"][i, j] = div(chance, fewest)
    squares = torch.tensor([sum(float(d.square().sum()) for d in x.values()) for x in dw], dtype=torch.float64)
    kept, cut = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    plain_sum = 0.0
    for m in modules:
        has = [i for i in range(n) if m in dw[i]]
        merge = sum(dw[i][m] for i in has) / len(has)
        plain_sum += float((merge * len(has)).square().sum())
        u, s, _ = torch.linalg.svd(merge)
        if float(s[0]) < 1e-12:
            continue
        k = next(k for k in range(len(s) + 1) if float(s[k:].norm()) <= 0.05 * float(s.norm()))
        top = min(max(parts[i][m].rank for i in has), int((s > 1e-6 * s[0]).sum()))
        for i in has:
            kept[i] += float((u[:, :k].T @ dw[i][m]).square().sum())
            cut[i] += float((u[:, :top].T @ dw[i][m]).square().sum())
    zero = squares == 0
    stable = [
        [float(d.square().sum() / torch.linalg.matrix_norm(d, 2) ** 2) for d in x.values() if d.any()] for x in dw
    ]
    has_any = torch.tensor([bool(x) for x in dw])
    return pair | {
        "norm": torch.where(has_any, squares.sqrt(), math.nan),
        "sar": torch.where(zero, math.nan, (kept / squares).sqrt()),
        "sar_cut": torch.where(zero, math.nan, (cut / squares).sqrt()),
        "stable_rank": torch.tensor([sum(x) / len(x) if x else math.nan for x in stable], dtype=torch.float64),
        "gain": torch.tensor(div(plain_sum, float(squares.sum())), dtype=torch.float64),
    }


def columns(x: Tensor) -> Tensor:
    """An orthonormal basis of the column space."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-6 * s[0]] if float(s[0]) > 0 else u[:, :0]


def same(group, want: dict[str, Tensor], within: float = 1e-6) -> None:
    got = {name: torch.as_tensor(getattr(group, name), dtype=torch.float64) for name in WHOLE} | {
        "out": group.alignment("out"), "in": group.alignment("in"), "out_plain": group.alignment("out", False),
        "in_plain": group.alignment("in", False), "out_chance": group.chance("out"),
        "in_plain_chance": group.chance("in", False), "signs": group.sign_conflict(), "signs_plain": group.sign_conflict(False),
    }  # fmt: skip
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-5 if "sign" in name else within, rtol=1e-5,
                                   equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")  # fmt: skip


def text(found: Overlap, by: str = "layer") -> str:
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in tables(found, by):
        console.print(part)
    return console.export_text()
