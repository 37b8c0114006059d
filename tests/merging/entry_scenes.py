"""Random banks and weights for entrywise rules, and dense float64 oracles of those rules written from the papers' formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from helpers import BASE, adapter, delta, relative
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.factors import LoraFactors
from loralloy.merging import DareLinear, DareTies, MagnitudePrune, Rule, Space, Ties, make_plan, merge
from loralloy.merging.entries import random_mask
from loralloy.merging.stacking import keys_of as _keys
from loralloy.weights import Weights

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SPACES: list[Space] = ["delta", "factors"]
ALL_SPACES: list[Space] = ["delta", "factors", "knots", "core"]
B_SALT = 0x0B << 56


# -- random banks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    bank: Bank
    weights: dict[str, float]

    @property
    def near(self) -> float:
        return 1e-11 if any(self.bank[n].dtype == torch.float64 for n in self.bank) else 2e-5

    def merged(self, rule: Rule, space: Space, weights: dict[str, float] | None = None) -> dict[str, Tensor]:
        """module -> dW of the uncut result, float64."""
        return merged(self.bank, weights or self.weights, rule, space)


def merged(bank: Bank, weights: dict[str, float], rule: Rule, space: Space) -> dict[str, Tensor]:
    wide = torch.float64 if any(bank[n].dtype == torch.float64 for n in weights) else torch.float32
    return delta(merge(bank, Weights(weights), rule, space, "full", wide, measure="none").adapter)


def close(got: dict[str, Tensor], want: dict[str, Tensor], near: float, c: float = 1.0) -> None:
    """got = c * want; a module of zeros may be missing."""
    assert set(got) <= set(want)
    for m, x in want.items():
        assert relative(got[m], c * x) < near if m in got else float(x.norm()) == 0, (m, got.get(m), c * x)


@st.composite
def scenes(
    draw: st.DrawFn,
    space: Space = "delta",
    least: int = 1,
    grid: bool | None = None,
    weights: list[float] | None = None,
) -> Scene:
    """1 to 5 adapters with some of 3 modules of 2 shapes; alpha / r and alpha / sqrt(r); equal ranks for factors space.

    On the grid factors are small whole numbers and scalings powers of 2: every dW is exact in float32, and many entries and
    votes are equal or cancel, so that whatever is said of equals is tried.
    """
    seed, count = draw(st.integers(0, 2**20)), draw(st.integers(least, 5))
    grid = draw(st.booleans()) if grid is None else grid
    dtype = draw(st.sampled_from(DTYPES))
    sides = st.integers(1, 9)
    shapes = [(draw(sides), draw(sides)) for _ in range(2)]
    modules = {"p": shapes[0], "q": shapes[1], "r": shapes[0]}
    g = torch.Generator().manual_seed(seed)
    common, adapters = draw(st.integers(1, 4)), []
    for i in range(count):
        rank = common if space == "factors" else draw(st.integers(1, 4))
        alpha, rs = draw(st.sampled_from([1, 3, 8])), draw(st.booleans())
        scaling = 2.0 ** (alpha - 3) if grid else alpha / (math.sqrt(rank) if rs else rank)
        has = draw(st.sets(st.sampled_from(sorted(modules)), min_size=1))
        parts = {}
        for m in sorted(has):
            out, inside = modules[m]
            a, b = (
                torch.randint(-3, 4, s, generator=g).double() if grid else torch.randn(s, generator=g).double()
                for s in ((rank, inside), (out, rank))
            )
            parts[m] = LoraFactors(a.to(dtype), b.to(dtype), scaling)
        adapters.append(adapter(parts, f"n{i}", BaseRef(BASE)))
    weight = st.sampled_from(weights or [-1.5, -0.25, 0.0, 0.5, 1.0, 2.0])
    given = {a.name: draw(weight) for a in adapters}
    assume(any(given.values()))
    return Scene(Bank(adapters), given)


densities = st.sampled_from([0.0, 0.05, 0.2, 0.37, 0.5, 0.8, 0.99, 1.0])
majorities, normalisers = st.sampled_from(["total", "frequency"]), st.sampled_from(["count", "weights"])
votes = st.sampled_from(["unweighted", "weighted"])
_election = {"majority": majorities, "normaliser": normalisers, "vote": votes}
ANY_RULE = st.one_of(
    st.builds(Ties, density=densities, **_election),
    st.builds(DareTies, density=densities, seed=st.integers(0, 99), **_election),
    st.builds(DareLinear, density=densities, seed=st.integers(0, 99)),
    st.builds(MagnitudePrune, density=densities, prune=st.sampled_from(["each", "merged"])),
)
TRIMMED = st.one_of(
    st.builds(Ties, density=densities, majority=majorities, normaliser=normalisers, trim=st.just("all")),
    st.builds(MagnitudePrune, density=densities, trim=st.just("all"), prune=st.sampled_from(["each", "merged"])),
)


# -- the papers' formulas ----------------------------------------------------------------------------------------------


def trim(xs: list[np.ndarray], k: int) -> list[np.ndarray]:
    """All but the k largest magnitudes of several tensors set to 0; the first among equals stays (TIES, step 1)."""
    flat = np.concatenate([x.ravel() for x in xs])
    kept = np.zeros_like(flat)
    order = np.argsort(-np.abs(flat), kind="stable")[:k]
    kept[order] = flat[order]
    parts = np.split(kept, np.cumsum([x.size for x in xs])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, xs, strict=True)]


def elect_and_mean(xs: list[np.ndarray], ws: list[float], shares: list[float], v: dict[str, str]) -> np.ndarray:
    """Entry by entry: the elected sign gamma, A = {t: sgn(x_t) = gamma}, the (weighted) mean over A (TIES, steps 2 and 3)."""
    result = np.zeros_like(xs[0])
    for at in np.ndindex(result.shape):
        x = np.array([one[at] for one in xs])
        said = x * ws if v["vote"] == "weighted" else x
        gamma = 1 if (said if v["majority"] == "total" else np.sign(said)).sum() >= 0 else -1
        agree = [t for t in range(len(x)) if np.sign(said[t]) == gamma]
        below = len(agree) if v["normaliser"] == "count" else sum(shares[t] for t in agree)
        result[at] = sum(ws[t] * x[t] for t in agree) / below if below else 0.0
    return result


def expected(scene: Scene, rule: Rule, space: Space) -> dict[str, Tensor]:
    """dW by the formulas, dense, in float64."""
    v = rule.values
    plan = make_plan(scene.bank, Weights(scene.weights), rule, space)
    key = _keys(rule, plan.parents)
    found: dict[tuple[str, str], tuple[list[np.ndarray], list[int], list[float], list[float]]] = {}
    for group in plan.groups:
        for module in group.modules:
            fs = [plan.parents[i][module] for i in group.who]
            ws = [scene.weights[plan.parents[i].name] for i in group.who]
            who = list(group.who)
            if space == "delta":
                found[module, "dW"] = [f.dense().numpy() for f in fs], who, ws, [abs(w) for w in ws]
            else:
                root = [math.sqrt(abs(w * f.scaling)) for w, f in zip(ws, fs, strict=True)]
                share = [math.sqrt(abs(w)) for w in ws]
                signed = [math.copysign(r, w) for r, w in zip(root, ws, strict=True)]
                found[module, "A"] = [f.A.double().numpy() for f in fs], who, signed, share
                found[module, "B"] = [f.B.double().numpy() for f in fs], who, root, share
    if v.get("prune") == "merged":
        found = {
            at: ([sum(w * x for w, x in zip(ws, xs, strict=True))], [0], [1.0], [1.0])
            for at, (xs, _, ws, _) in found.items()
        }
    if "trim" in v:
        for i in {i for _, who, _, _ in found.values() for i in who}:
            mine = [(xs, who.index(i)) for xs, who, _, _ in found.values() if i in who]
            tensors = [xs[t] for xs, t in mine]
            groups = [tensors] if v["trim"] == "all" else [[x] for x in tensors]
            trimmed = [x for part in groups for x in trim(part, int(v["density"] * sum(x.size for x in part)))]
            for (xs, t), x in zip(mine, trimmed, strict=True):
                xs[t] = x
    result: dict[tuple[str, str], np.ndarray] = {}
    for (module, side), (xs, who, ws, shares) in found.items():
        if "seed" in v:  # DARE: x' = m * x / (1 - p)
            for t, i in enumerate(who):
                seeds = torch.tensor([key(i, module) ^ (B_SALT if side == "B" else 0)])
                mask = random_mask(seeds, 0, xs[t].size, v["density"], v["seed"])[0].numpy().reshape(xs[t].shape)
                xs[t] = mask * xs[t] / v["density"] if v["density"] else 0 * xs[t]
        elects = "majority" in v
        result[module, side] = (
            elect_and_mean(xs, ws, shares, v) if elects else sum(w * x for w, x in zip(ws, xs, strict=True))
        )
    names = dict.fromkeys(m for m, _ in result)
    if space == "delta":
        return {m: torch.from_numpy(result[m, "dW"]) for m in names}
    return {m: torch.from_numpy(result[m, "B"] @ result[m, "A"]) for m in names}
