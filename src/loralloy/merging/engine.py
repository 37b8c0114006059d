"""merge(): module by module through a rule, cut to a rank, cast, and measured against the exact weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..adapter import Adapter
from ..adapter_config import AdapterConfig
from ..bank import Bank
from ..errors import LoralloyError
from ..factors import LoraFactors, difference, norm, pad, truncate, weighted_sum, widest
from ..saving import cast, dtype_name
from ..weights import Weights
from .rule import Rule, Space

_NOTHING, _ROUNDING = 1e-12, 1e-6  # of the parts that were summed: what float64 leaves of zero, and what float32 does
_SMALL = 1e-3  # relative; float32 measures larger errors to four digits or better
Rank: TypeAlias = "int | Literal['max', 'full']"


@dataclass(frozen=True)
class ModuleError:
    """Frobenius norms of one module: of the exact sum, and of what was lost before the cast and as stored."""

    exact: float
    before_cast: float
    stored: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did and what it cost; errors are ||dW_merged - dW_exact||_F / ||dW_exact||_F."""

    rule: str
    space: str
    rank: str
    dtype: str
    modules: Mapping[str, ModuleError]
    notes: tuple[str, ...] = ()

    def _total(self, part: str) -> float:
        exact = math.sqrt(sum(m.exact**2 for m in self.modules.values()))
        lost = math.sqrt(sum(getattr(m, part) ** 2 for m in self.modules.values()))
        return lost / exact if exact else (0.0 if lost == 0 else math.inf)

    @property
    def error(self) -> float:
        """Relative error over all modules, as stored."""
        return self._total("stored")

    @property
    def error_before_cast(self) -> float:
        """Relative error over all modules, in the dtype of the computation."""
        return self._total("before_cast")

    def worst(self, n: int = 5) -> list[tuple[str, float]]:
        """The modules with the largest relative error as stored."""
        relative = {name: m.stored / m.exact if m.exact else m.stored for name, m in self.modules.items()}
        return sorted(relative.items(), key=lambda item: -item[1])[:n]


@dataclass(frozen=True)
class Merged:
    adapter: Adapter
    report: MergeReport


def merge(
    bank: Bank,
    weights: Weights,
    rule: str | Rule = "linear",
    space: Space = "delta",
    rank: Rank | None = None,
    dtype: torch.dtype | None = None,
    name: str = "merged",
    on_module: Callable[[str], None] | None = None,
) -> Merged:
    """Merge a bank's adapters under `weights` into one adapter, without the base model.

    Computes in float32 (float64 for float64 adapters) and stores in `dtype`; every module gets the same rank, padded
    with zeros where it needs less, so that any consumer of PEFT's format reads it right.

    Args:
        bank: adapters of one base model.
        weights: by adapter or by adapter and module; adapters that are not named do not take part.
        rule: a rule or its name (see `RULES`).
        space: "delta" acts on dW, "factors" on A and B apart as PEFT does.
        rank: a number, "max" (the largest parent rank), "full" (no cut), None for the rule's default.
        dtype: of the result; None for the parents' (float32 if they differ).
        name: of the result.
        on_module: called with each module's name when it is done (progress).

    Raises LoralloyError for weights of unknown adapters, ranks or shapes that a rule cannot combine, overflow in the cast,
    and fully saved tensors (modules_to_save) that conflict.
    """
    from . import get_rule

    chosen = get_rule(rule) if isinstance(rule, str) else rule
    space = chosen.check_space(space)
    bank.check_weights(weights)
    parents = [bank[n] for n in weights.names]
    if space == "delta":  # weight 0 is absence: of its rank, dtype and saved modules too (all zero: a merge to zero)
        parents = [p for p in parents if any(weights.of(p.name, m) for m in p)] or parents
    rank = chosen.default_rank if rank is None else rank
    if not (rank in ("max", "full") or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1)):
        raise LoralloyError(f"rank {rank!r} is not valid; give a positive number, 'max' or 'full'")
    dtype = dtype or _common_dtype(parents)

    any_weight = any(weights.of(p.name, m) for p in parents for m in p)
    merged: dict[str, LoraFactors] = {}
    errors: dict[str, ModuleError] = {}
    for module in dict.fromkeys(m for parent in parents for m in parent):
        having = [p for p in parents if module in p]
        if space == "delta" and any_weight:
            having = [p for p in having if weights.of(p.name, module)]
        ws = [weights.of(p.name, module) for p in having]
        if any_weight and not any(ws):
            continue
        try:
            merged[module], errors[module] = _merge_module([p[module] for p in having], ws, chosen, space, rank, dtype)
        except LoralloyError as error:
            raise error.within(f"module {module!r} of {', '.join(p.name for p in having)}") from None
        if on_module:
            on_module(module)
    top = max((f.rank for f in merged.values()), default=1)
    merged = {module: pad(f, top) for module, f in merged.items()}

    extra, notes = _extra(parents, weights)
    report = MergeReport(chosen.name, space, str(rank), dtype_name(dtype), errors, notes)
    licences = {p.licence for p in parents}
    adapter = Adapter(
        name,
        merged,
        _config(parents, set(merged), top, bank),
        bank.base,
        {key: cast(tensor, dtype, f"tensor {key!r}") for key, tensor in extra.items()},
        {"merge": _record(parents, weights, report)},
        licences.pop() if len(licences) == 1 else None,
    )
    return Merged(adapter, report)


def _merge_module(
    factors: list[LoraFactors], weights: list[float], rule: Rule, space: Space, rank: Rank, dtype: torch.dtype
) -> tuple[LoraFactors, ModuleError]:
    exact = weighted_sum(factors, weights)
    summed = space in rule.sums
    result = exact if summed else rule.apply(factors, weights, space)
    limit = max(f.rank for f in factors) if rank == "max" else result.rank if rank == "full" else int(rank)
    lost = None
    if limit < result.rank:
        result, lost = truncate(result, limit)
    stored = result.with_matrices(cast(result.a, dtype, "A"), cast(result.b, dtype, "B"), result.scaling)
    return stored, _measure(result, stored, exact, factors, weights, lost if summed else None)


def _measure(
    result: LoraFactors,
    stored: LoraFactors,
    exact: LoraFactors,
    factors: list[LoraFactors],
    weights: list[float],
    lost: float | None,
) -> ModuleError:
    """The error of one module; `lost` is its relative error before the cast where the truncation has told it already.

    Small errors are measured again in float64 against a float64 sum: float32 has a rounding error of its own.
    """
    same = stored.A.dtype == result.A.dtype
    parts = sum(
        abs(w * f.scaling) * float(f.A.float().norm()) * float(f.B.float().norm())
        for f, w in zip(factors, weights, strict=True)
    )
    for wide in dict.fromkeys([exact.A.dtype, widest(exact.A.device)]):
        if wide != exact.A.dtype:
            exact, lost = weighted_sum([f.to(wide) for f in factors], weights), None
        total = norm(exact, wide)
        before = difference(result, exact, wide) if lost is None else lost * total
        after = before if same else difference(stored, exact, wide)
        if min(before, after) > _SMALL * total > _SMALL**2 * parts:
            break
    if total <= _NOTHING * parts:  # the weights cancel: a ratio of two roundings would say nothing
        total = 0.0
        before, after = (0.0 if lost <= _ROUNDING * parts else lost for lost in (before, after))
    return ModuleError(total, before, after)


def _common_dtype(parents: list[Adapter]) -> torch.dtype:
    dtypes = {p.dtype for p in parents}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _config(parents: list[Adapter], modules: set[str], rank: int, bank: Bank) -> AdapterConfig:
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


def _extra(parents: list[Adapter], weights: Weights) -> tuple[dict[str, Tensor], tuple[str, ...]]:
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


def _record(parents: list[Adapter], weights: Weights, report: MergeReport) -> dict[str, Any]:
    return {
        "rule": report.rule,
        "space": report.space,
        "rank": report.rank,
        "dtype": report.dtype,
        "weights_source": weights.source,
        "parents": [
            {
                "name": p.name,
                "hash": p.content_hash,
                "licence": p.licence,
                "weight": weights.to_dict()["weights"][p.name],
            }
            for p in parents
        ],
        "error": {"before_cast": report.error_before_cast, "stored": report.error},
    }
