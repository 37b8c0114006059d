"""What goes beside the merged factors: the configuration, fully saved tensors, and the record of how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..adapter_config import AdapterConfig
from ..bank import Bank
from ..errors import LoralloyError
from .measure import MergeReport
from .plan import Plan


def merged_config(parents: Sequence[Adapter], modules: set[str], rank: int, bank: Bank) -> AdapterConfig:
    """The merged configuration. The parents' target_modules are kept only where they mean the same modules again."""
    first = parents[0].config
    transposed = {p.config.fan_in_fan_out for p in parents}
    if len(transposed) > 1:
        raise LoralloyError(
            f"adapters {', '.join(p.name for p in parents)} disagree on fan_in_fan_out; set the field to what the base's "
            "layers need (true for GPT-2's Conv1D) in each adapter_config.json"
        )
    alike = all(
        p.config.target_modules == first.target_modules
        and p.config.layers_to_transform == first.layers_to_transform
        and set(p) == modules
        for p in parents
    )
    tasks = {p.config.task_type for p in parents}
    return AdapterConfig(
        rank=rank,
        alpha=float(rank),
        fan_in_fan_out=first.fan_in_fan_out,
        modules_to_save=tuple(dict.fromkeys(m for p in parents for m in p.config.modules_to_save)),
        target_modules=first.target_modules if alike else None,
        layers_to_transform=first.layers_to_transform if alike else None,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        base_name=bank.base.name,
        base_revision=bank.base.revision,
    )


def extra_tensors(parents: Sequence[Adapter]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Fully saved tensors: carried when every adapter that has one agrees to the bit, refused when two differ."""
    carried: dict[str, tuple[str, Tensor]] = {}
    lacking: list[str] = []
    for parent in parents:
        for name in parent.extra:
            tensor = parent.extra_tensor(name)
            if name not in carried:
                carried[name] = (parent.name, tensor)
            elif carried[name][1].shape != tensor.shape:
                raise LoralloyError(
                    f"tensor {name!r} is {list(carried[name][1].shape)} in adapter {carried[name][0]!r} but "
                    f"{list(tensor.shape)} in {parent.name!r} (tokens added, or another head); they cannot be merged"
                )
            elif not torch.equal(carried[name][1], tensor):
                raise LoralloyError(
                    f"adapters {carried[name][0]!r} and {parent.name!r} each saved their own {name!r} (modules_to_save); there "
                    "is no right way to add them. Merge adapters without saved modules, or keep one of them"
                )
    for name, (owner, _) in carried.items():
        if any(name not in parent.extra for parent in parents):
            lacking.append(f"{name} is carried whole from {owner}; it is not scaled by the weight")
    return {name: tensor for name, (_, tensor) in carried.items()}, tuple(lacking)


def record(plan: Plan, report: MergeReport, hashes: Sequence[str]) -> dict[str, Any]:
    """What the result's file and card say about the merge; `hashes` are the parents' content hashes."""
    weights = plan.weights.to_dict()["weights"]
    measured = {} if report.measured == "exact" else {"measured": report.measured}
    plugins = {
        when: {"name": plugin.name, "parameters": plugin.values}
        for when, plugin in (("before", plan.before), ("after", plan.after))
        if plugin is not None
    }
    known = report.measured != "none"
    return {
        "rule": plan.rule.name,
        "parameters": plan.rule.values,
        "space": report.space,
        "rank": report.rank,
        "dtype": report.dtype,
        **plugins,
        "weights_source": plan.weights.source,
        "parents": [
            {"name": p.name, "hash": content, "licence": p.licence, "weight": weights[p.name]}
            | ({"freed_from": p.freed_from} if p.freed_from else {})
            for p, content in zip(plan.parents, hashes, strict=True)
        ],
        "error": {
            "before_cast": report.error_before_cast if known else None,
            "stored": report.error if known else None,
            "cut": report.cut if known else None,
            **measured,
        },
    }
