"""Cells of what trains: coefficients that are learned from labels, or from unlabelled answers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from plan import Cell

from loralloy.bank import Bank
from loralloy.live.learnable import Learnable
from loralloy.merging import get_rule


def learned(
    inner: Any, bank: Bank, cell: Cell, domain: str, few: bool, score: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What is told of a cell whose method trains. inner: the half's site, with nothing in its model. few: a toy's steps."""
    from loralloy.weighting.adamerging import CONFIG, adamerging
    from loralloy.weighting.learned import LearnConfig, learn

    method = cell.method
    entropy = method.trains == "entropy"
    objective = inner.objective(domain, method.trains, cell.seed)
    config = dataclasses.replace(CONFIG if entropy else LearnConfig(), seed=cell.seed, rows_at_once=64)
    if few:
        config = dataclasses.replace(config, steps=2)
    rule = get_rule(method.rule)(**method.values) if method.values else get_rule(method.rule)
    live = Learnable(inner.model, bank, rule, method.space)
    began = time.perf_counter()
    try:
        done = (adamerging if entropy else learn)(
            inner.model, bank, objective, rule=rule, space=method.space, granularity=method.grain,  # type: ignore[arg-type]
            config=config, learnable=live, progress=False, **({} if entropy else {"b_max": 3.0}),
        )  # fmt: skip
        seconds = {"learn": time.perf_counter() - began}
        with torch.no_grad(), live.at(done.weights):
            return {**score(), "seconds": seconds, "rows": objective.size}
    finally:
        live.remove()
