"""Where a cell's coefficients come from, and what a merge looks like without running it. Settings are the library's defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from cells import Cell

from loralloy.bank import Bank
from loralloy.continual.buffer import BufferRow
from loralloy.live.learnable import Learnable
from loralloy.weights import Weights

if TYPE_CHECKING:
    from work import Site

    from loralloy.weighting.learned import LearnConfig


def coefficients(
    site: Site, cell: Cell, live: Learnable, bank: Bank, rows: Sequence[BufferRow]
) -> tuple[Weights, dict[str, Any]]:
    """The weights of a cell, and what there is to say of how they were found."""
    workshop = site.workshop(cell.head)
    if cell.how == "fixed":
        assert cell.weight is not None
        return Weights(dict.fromkeys(bank.names, cell.weight), "fixed"), {}
    if cell.how == "regmean":
        from loralloy.weighting.regmean import regmean

        inputs = {name: workshop.inputs([row for row in rows if row.domain == name]) for name in bank.names}
        solved = regmean(
            workshop.model, bank, inputs, rule=live.rule, space=live.space, granularity=cell.grain,  # type: ignore[arg-type]
            base=workshop.base, progress=False,
        )  # fmt: skip
        return solved.weights, {}
    if cell.how == "search":
        from loralloy.weighting.candidates import Candidates
        from loralloy.weighting.searched import SearchConfig, search

        few = {} if site.bench.toy_steps is None else {"budget": 3}
        found = search(
            workshop.model, bank, workshop.objective(rows), config=SearchConfig(seed=cell.seed, **few), progress=False,
            candidates=Candidates(workshop.model, bank, live.rule, live.space, learnable=live),
        )  # fmt: skip
        return found.weights, {"evaluations": len(found.history)}
    from loralloy.weighting.adamerging import CONFIG, adamerging
    from loralloy.weighting.learned import learn

    entropy = cell.how == "entropy"
    # prototypes are made of all rows at every call: in one part, they are made once a step
    at_once = len(rows) if cell.head == "prototypes" else site.bench.rows_at_once
    config = dataclasses.replace(CONFIG if entropy else begun(cell, live), seed=cell.seed, rows_at_once=max(1, at_once))
    if site.bench.toy_steps is not None:
        config = dataclasses.replace(config, steps=site.bench.toy_steps, scales=(0.3, 0.75))
    objective = workshop.objective(rows, "entropy" if entropy else "answer")
    done = (adamerging if entropy else learn)(
        workshop.model, bank, objective, rule=live.rule, space=live.space, b_max=cell.b_max, granularity=cell.grain,  # type: ignore[arg-type]
        config=config, learnable=live, progress=False,
    )  # fmt: skip
    steps = done.history
    told = {
        "start_scale": done.start_scale, "searched": done.searched, "best_step": done.best_step, "steps": len(steps) - 1,
        "loss": [steps[0]["loss"], steps[-1]["loss"]], "moved": _moved(steps), "b": done.weights.explain.get("b"),
    }  # fmt: skip
    return done.weights, told


def begun(cell: Cell, live: Learnable) -> LearnConfig:
    """The learner's settings by the name of their start; `cells.STARTS` are tried beside "scale".

    scale: the library's wide search. near: its search close to an adapter's length. match: the scale at which the merge is as
    long as an adapter, without a search. zero: the poster's. With _pull: the regularisation is 1, whatever the rows (10 times the
    default for one row a class). With _noise: one answer of ten is taken to be by chance; no other start takes any. With _still:
    no gradient steps. With _long: four times as many steps, and as much patience. So "scale" is what the library does from
    `tables.ENOUGH` rows a class on, and `cells.NOISY` what it does below them.
    """
    from loralloy.weighting.learned import LearnConfig

    start, _, more = (cell.start or "scale").partition("_")
    if start == "match":
        config = LearnConfig(start=min(live.matching_scale(), 0.95 * (cell.b_max or 3.0)))
    elif start == "zero":
        config = LearnConfig(start="zero")
    else:
        config = LearnConfig(scales="near" if start == "near" else "wide")
    config = dataclasses.replace(config, label_noise=0.0)
    if more == "noise":
        return dataclasses.replace(config, label_noise=0.1)
    if more == "pull":
        return dataclasses.replace(config, regularisation=1.0)
    if more == "long":
        return dataclasses.replace(config, steps=4 * config.steps, patience=4 * config.patience)
    return dataclasses.replace(config, steps=0) if more == "still" else config


def _moved(history: Sequence[dict[str, Any]]) -> float:
    """The largest change of a coefficient (its mean over modules) from the start to the end."""
    first, last = history[0]["alpha"], history[-1]["alpha"]
    return max(abs(last[n] - first[n]) for n in first)


@torch.no_grad()
def geometry(live: Learnable, bank: Bank) -> dict[str, Any]:
    """Norms over all modules at W = 1; all of them grow as W does, so ratios hold for every W.

    merged: ||dW|| over the root mean square of the adapters' own ||dW_i||. diagonal, cross: in factors space
    dW = sum_i B_i A_i + sum_{i != j} B_i A_j, of the rule's own A_i and B_i; cross terms are what no adapter was trained for.
    cosine: the mean of cos(dW_i, dW_j) over pairs.
    """
    total = diagonal = cross = 0.0
    n = len(bank.names)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for part, name in zip(live._parts, live.modules, strict=True):
        basis = part.basis
        ones = torch.ones(n, device=live.device)
        whole = basis.combine(ones).double()
        total += float(whole.square().sum())
        if basis.kind == "low_rank_factors":
            a, b = (term.values.double() for term in basis.terms)
            own = torch.einsum("nor,nri->oi", b, a)
            diagonal += float(own.square().sum())
            cross += float((whole - own).square().sum())
        dense = {
            who: ((f.b.to(live.device).float() @ f.a.to(live.device).float()) * f.scaling).flatten()
            for who, f in bank.factors(name).items()
        }
        places = [bank.names.index(who) for who in dense]
        stacked = torch.stack(list(dense.values()))
        gram[torch.tensor(places)[:, None], torch.tensor(places)] += (stacked @ stacked.T).double().cpu()
    norms = gram.diagonal().sqrt()
    cosine = gram / (norms[:, None] * norms)
    pairs = cosine[~torch.eye(n, dtype=torch.bool)]
    found: dict[str, Any] = {
        "norms": dict(zip(bank.names, norms.tolist(), strict=True)),
        "merged": math.sqrt(total) / float(norms.square().mean().sqrt()),
        "cosine": float(pairs.mean()) if n > 1 else None,
    }
    if diagonal:
        found |= {"cross_over_sum": math.sqrt(cross / diagonal), "cross_share": cross / (cross + diagonal)}
    return found
