"""TaDA from end to end: probe the adapters on the domain's inputs, gate them module by module, merge them.

After the abstract of "TaDA: Calibrated Probe Gating for Task-Domain LoRA Merging" (To et al. 2026, arXiv 2606.05016). Its
formulas are not public: those of :mod:`.probed`, :mod:`.gating` and :mod:`loralloy.merging.tada` are this project's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..adapter import Adapter
from ..base_ref import BaseRef
from ..errors import LoralloyError
from ..live.fit import compare_base
from ..live.names import named_for
from ..merging import Merged, Plan, Rule
from ..merging.tada import RULE, Found, watched
from ..recipe import Recipe
from ..recipe.job import check_out
from ..weights import Weights
from .balance import ENOUGH, Balanced, balance
from .candidates import Candidates
from .common import freed_bank, taken
from .conflicts import Conflicts, conflicts_of
from .gating import Depth, Gate, depth_slope
from .hosts import check_hosts
from .levels import LEVELS, Answers, Level, choose_level
from .probed import Batch, Readings, probe

if TYPE_CHECKING:
    from ..bank import Bank


GATED_SUM = RULE(conflict="none")  # removal of conflicts has added nothing that could be measured (docs/tada.md)
COMMON = 1  # directions that the domain's adapters are freed of
_LEFT = 1e-6  # of ||dW||_F^2: an adapter of which less is left is nothing but rounding


@dataclass(frozen=True)
class Outcome:
    """What came out, and why.

    Attributes:
        merged: the adapter and its errors against the exact gated sum.
        weights: the gates, by the model's names of modules.
        own_weights: the same by the names in the adapters' files.
        readings, general: what the probe saw of the domain's inputs and of the general ones.
        depth: for every adapter but the first, how its log odds against the first change with depth (no interval where the
            gate reads no probe).
        conflicts: what the rule discarded, by module; empty for a rule that discards nothing.
        seconds: of the probe, the gates, the level and the merge with its writing.
        level: how strong the merge is, where that was chosen.
        balanced: how the shift of the answers was taken out, where that was asked for.
        freed: of each adapter that was freed of common directions, the share of ||dW||_F^2 that went with them.
        notes: what a reader would not expect.
    """

    merged: Merged
    weights: Weights
    readings: Readings
    general: Readings | None
    depth: Mapping[str, Depth]
    conflicts: Mapping[str, Conflicts]
    seconds: Mapping[str, float]
    level: Level | None = None
    balanced: Balanced | None = None
    freed: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    own_weights: Weights | None = None


def compose(
    adapters: Sequence[str | os.PathLike[str]],
    model: nn.Module,
    calibration: Iterable[Batch],
    out: str | os.PathLike[str] | None = None,
    *,
    general: Iterable[Batch] | None = None,
    gate: Gate | None = None,
    rule: Rule | None = None,
    judge: Literal["weights", "activations"] = "weights",
    common: int | None = None,
    common_of: Literal["all", "domain"] = "domain",
    answers: Answers | None = None,
    levels: Sequence[float] = LEVELS,
    directions: Tensor | None = None,
    read_at: int = -1,
    rank: int | str | None = None,
    dtype: str | None = None,
    base: BaseRef | None = None,
    assume_same_base: bool = False,
    overwrite: bool = False,
    on_inputs: Callable[[int], None] | None = None,
    on_level: Callable[[], None] | None = None,
    on_pass: Callable[[], None] | None = None,
    on_module: Callable[[str], None] | None = None,
) -> Outcome:
    """A task adapter and domain adapters in, one standard adapter out; nothing is trained.

    Args:
        adapters: folders or ``org/name@revision``: the task's first, then the domain's (one or more).
        model: the plain base.
        calibration: the model's arguments for each batch of the domain's inputs (32 inputs are the paper's number); no
            labels are read. :func:`.probed.text_batches` makes them of texts.
        out: a folder to write, or None. Without `directions` it also holds a recipe.yaml with the gates, and the directions that
            adapters were freed of, which repeats the merge without a model.
        general: batches of inputs of no domain, for gates whose `reference` is "general".
        gate: how the probe becomes weights; None for the defaults.
        rule: `tada` with its parameters, or any other: the gates are plain weights. None is `tada` without removing conflicts,
            and with it (`shared`) where they are judged on activations.
        judge: what conflicts of `tada` are judged on: dW, or what it answers to the calibration inputs (see
            :func:`loralloy.merging.tada.resolve`), which no recipe can repeat: `out` must be None then, and
            ``merged.adapter`` be saved.
        common: how many directions that the calibration inputs have in common the adapters are freed of before they are merged
            (ours; see :mod:`.common`); the gates are of the adapters as they came. None is 1, and 0 where conflicts are judged on
            activations.
        common_of: all adapters are freed, or all but the first.
        answers: the model's answers to unlabelled inputs, by which the level of all weights is chosen from `levels` (ours; see
            :func:`.levels.choose_level`); None, or no `levels`, leaves the gate's.
        directions: [k, out] of the k answers: their shift over the same inputs is taken out of the merged adapter (ours; see
            :func:`.balance.balance`); needs `answers`. No recipe repeats it: none is written. read_at: as `at` there.
        rank: of the result; None for the rule's own (`tada`: the largest parent's).
        dtype: "fp16", "bf16", "fp32" or None for the adapters'.
        base: what the model is, where known; checked against the adapters'.
        assume_same_base, overwrite: as :func:`loralloy.merge`.
        on_inputs, on_level, on_pass, on_module: progress.

    Raises LoralloyError for fewer than two adapters, another base model, and what the probe, the gate and the merge raise.
    """
    gate = gate or Gate()
    if len(adapters) < 2:
        raise LoralloyError("one adapter is nothing to gate; give the task's adapter and at least one of the domain")
    if gate.needs_general and general is None:
        raise LoralloyError("reference 'general' needs inputs of no domain; give them (`general`), or reference 'none'")
    on_activations = judge == "activations"
    rule = rule or (RULE if on_activations else GATED_SUM)
    common = (0 if on_activations else COMMON) if common is None else common
    removes = rule.name == RULE.name and rule.values["conflict"] != "none"
    if on_activations and (not removes or out is not None):
        raise LoralloyError(
            "conflicts are judged on activations by the rule 'tada' alone, where it has some to remove, and no recipe can repeat "
            "it: pass no `out`, and save the adapter that comes back"
        )
    if directions is not None and answers is None:
        raise LoralloyError("the answers' shift is measured on answers to unlabelled inputs; give `answers` too")
    if common < 0 or common_of not in ("all", "domain"):
        raise LoralloyError(
            f"common directions: {common} of {common_of!r}; give a number of 0 or more, of 'all' or 'domain'"
        )
    if common and on_activations:
        raise LoralloyError(
            "conflicts are judged on the activations of adapters as they came; leave `common` at 0 there"
        )
    if out is not None:
        check_out(Path(out).absolute(), overwrite)
    bank = _recipe(adapters, None, {"assume_same_base": assume_same_base}).prepare().bank
    _check_base(bank, base, model)
    bank = named_for(model, bank)
    if directions is not None:  # what the balance would refuse after all the work
        check_hosts(model, list(bank.values()), directions.shape[1], rank)
    named, clock = bank, time.perf_counter
    start = clock()
    readings = probe(model, bank, calibration, moments=on_activations, common=common, progress=on_inputs)
    reference = probe(model, bank, general, progress=on_inputs) if gate.needs_general and general is not None else None
    probed = clock()
    weights = gate.weights(readings, reference)
    measured = gate.kind in ("probe", "norm", "shuffled")
    depth = {
        name: depth_slope(gate, readings, reference, adapter)
        for adapter, name in enumerate(readings.adapters)
        if adapter and measured
    }
    lost: dict[str, float] = {}
    chosen = bank.names if common_of == "all" else bank.names[1:]
    if common:
        whole = bank
        bank = freed_bank(bank, readings.common, common, chosen)
        lost = {name: share for name, share in taken(whole, bank).items() if name in chosen}
        if gone := [name for name, share in lost.items() if share > 1 - _LEFT]:
            raise LoralloyError(
                f"{common} common directions leave nothing of adapter {gone[0]!r}: on these inputs it answers to nothing else; "
                "give fewer (--common), or more and longer texts"
            )
    gated = clock()
    level = None
    if answers is not None and levels:
        level = _level(model, bank, rule, rank, weights, answers, levels, base, on_level)
        weights = level.weights
    leveled = clock()
    device = next(model.parameters()).device
    settings = {
        "assume_same_base": assume_same_base, "rule": {"name": rule.name, **rule.values}, "rank": rank, "dtype": dtype,
        "device": str(device),
    }  # fmt: skip
    own = named.own_weights(weights)  # what a recipe means, which knows no model
    job = _recipe(adapters, own, settings).prepare()
    seen: list[Found] = []
    job = replace(job, given=weights, weights=weights, bank=bank)
    if common:
        job = replace(job, opened=named, freed=_directions(readings, named, chosen, common))
    if removes:
        moments = in_order(job.plan(), readings) if on_activations else None
        job = replace(job, rule=watched(job.rule, seen, moments))
    alone = not common and directions is None  # nothing to tell beside the merge
    merged = job.merge(out if alone else None, overwrite, on_module)
    made = clock()
    balanced = None
    if directions is not None and answers is not None:
        try:
            balanced = balance(model, merged.adapter, answers, directions, at=read_at, on_pass=on_pass)
        except LoralloyError as error:
            raise error.within("balance") from None
        merged = replace(merged, adapter=balanced.adapter)
    if not alone:
        merged = replace(
            merged, adapter=_told(merged.adapter, common, lost, balanced, None if out is None else Path(out).name)
        )
        if out is not None and directions is None:
            merged = replace(merged, adapter=job.write(merged.adapter, out, overwrite))
        elif out is not None:
            merged.adapter.save(out, overwrite)
    seconds = {"probe": probed - start, "gates": gated - probed, "merge": made - leveled}
    if level is not None:
        seconds["level"] = leveled - gated
    if balanced is not None:
        seconds["balance"] = clock() - made
    notes = [f"{len(of)} modules were not probed ({why})" for why, of in _reasons(readings).items()]
    notes += [*job.notes(), *merged.report.notes]
    if few := sum(found.directions.shape[1] < common for found in readings.common.values()):
        notes.append(
            f"the inputs of {few} modules have fewer than {common} directions: nothing that they hold is answered there"
        )
    if balanced is not None and balanced.after > ENOUGH:
        notes.append(
            f"the balance left a shift of {balanced.after:.2f} of {balanced.before:.2f} nats: what is written at module "
            f"{balanced.module} does not reach all of it"
        )
    if directions is not None and out is not None:
        notes.append("no recipe.yaml is written: balanced answers are only to be had from the model")
    found = conflicts_of(job, seen)
    return Outcome(
        merged, weights, readings, reference, depth, found, seconds, level, balanced, lost, tuple(notes), own
    )


def _directions(readings: Readings, bank: Bank, chosen: Sequence[str], count: int) -> dict[str, dict[str, Tensor]]:
    """Adapter -> module, as its files name it -> the directions that it is freed of."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in chosen:
        own = bank[name].own_names
        here = {m: readings.common[m].leading(count).directions for m in bank[name] if m in readings.common}
        found[name] = {own.get(m, m): q for m, q in here.items() if q.shape[1]}
    return found


def _told(
    adapter: Adapter, common: int, lost: Mapping[str, float], balanced: Balanced | None, name: str | None
) -> Adapter:
    """The adapter with what no recipe says of it in its provenance."""
    told: dict[str, Any] = {}
    if common:
        told["freed"] = {"directions": common, "share": dict(lost)}
    if balanced is not None:
        told["balanced"] = {"module": balanced.module, "before": balanced.before, "after": balanced.after}
    extra = {name: adapter.extra_tensor(name) for name in adapter.extra}
    said = {**adapter.provenance, "tada": told}
    return Adapter(name or adapter.name, dict(adapter), adapter.config, adapter.base, extra, said, adapter.licence)


def _level(
    model: nn.Module,
    bank: Bank,
    rule: Rule,
    rank: int | str | None,
    weights: Weights,
    answers: Answers,
    levels: Sequence[float],
    base: BaseRef | None,
    on_level: Callable[[], None] | None,
) -> Level:
    """Conflicts are judged on dW here, also where the merge judges them on activations."""
    held = Candidates(model, bank, rule, None, rank or rule.default_rank, base=base)  # type: ignore[arg-type]
    try:
        return choose_level(held, weights, answers, levels, on_level)
    finally:
        held.remove()


def in_order(plan: Plan, readings: Readings) -> list[Tensor]:
    """The probe's moments of a plan's modules, of the adapters that take part, in the order of its batches.

    Raises LoralloyError for a module that was not probed.
    """
    names, found = [p.name for p in plan.parents], []
    for group in plan.groups:
        for module in group.modules:
            if module not in readings.moments:
                raise LoralloyError(f"module {module!r} was not probed, so nothing is known of its activations")
            found.append(readings.moments[module].of([names[i] for i in group.who]))
    return found


def _recipe(adapters: Sequence[str | os.PathLike[str]], weights: Weights | None, settings: Mapping[str, Any]) -> Recipe:
    entries: list[dict[str, Any]] = [{"path": os.fspath(path)} for path in adapters]
    if weights is not None:
        found = weights.to_dict()["weights"]
        entries = [e | {"weight": found[name]} for e, name in zip(entries, weights.names, strict=True)]
    fields = {name: value for name, value in settings.items() if value is not None}
    return Recipe.from_dict({"version": 1, "adapters": entries, **fields})


def _check_base(bank: Bank, base: BaseRef | None, model: nn.Module) -> None:
    if base is None or bank.assume_same_base:
        return
    verdict, why = compare_base(bank, base, model)
    if verdict != "same":
        said = "but the loaded model is" if verdict == "different" else "and it cannot be told whether that is"
        raise LoralloyError(
            f"the adapters are of {bank.base}, {said} {base}: {why}; load the model that they were trained on, or pass "
            "--assume-same-base"
        )


def _reasons(readings: Readings) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for module, why in readings.left_out.items():
        reasons.setdefault(why, []).append(module)
    return reasons
