"""merge(): a plan carried out batch by batch, kept in memory or streamed to disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapter import Adapter
from ..atomic import atomic_folder, check_free
from ..bank import Bank
from ..errors import LoralloyError
from ..factors import LoraFactors
from ..saving import AdapterWriter, cast, dtype_name, header, outline
from ..tensor_file import metadata_room
from ..weights import Weights
from .added import added, adds
from .assemble import extra_tensors, merged_config, record
from .batches import Batch, by_energy, fits_fp32, run_batches, unstack
from .linear import linear
from .measure import Measure, MergeReport, ModuleError
from .plan import Plan, Rank, check_plugin, check_rank, check_rule, make_groups, make_plan
from .rule import Plugin, Rule, Space
from .stacking import Settings, keys_of


@dataclass(frozen=True)
class Merged:
    adapter: Adapter
    report: MergeReport


def merge(
    bank: Bank,
    weights: Weights,
    rule: str | Rule = "linear",
    space: Space | None = None,
    rank: Rank | None = None,
    dtype: torch.dtype | None = None,
    name: str = "merged",
    on_module: Callable[[str], None] | None = None,
    *,
    energy: float | None = None,
    before: str | Plugin | None = None,
    after: str | Plugin | None = None,
    device: str | torch.device = "cpu",
    measure: Measure = "exact",
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Merged:
    """Merge a bank's adapters under `weights` into one adapter, without the base model.

    Computes in float32 (float64 for float64 adapters) and stores in `dtype`; every module gets the same rank, padded
    with zeros where it needs less, so that any consumer of PEFT's format reads it right.

    Args:
        bank: adapters of one base model.
        weights: by adapter or by adapter and module; adapters that are not named do not take part.
        rule: a rule or its name (see `RULES`), ``Ties(density=0.2)`` for one with parameters.
        space: "delta" acts on dW, "factors" on A and B apart as PEFT does; "knots" and "core" are aligned spaces. None for
            the rule's default.
        rank: a number, "max" (the largest parent rank), "full" (no cut), None for the rule's default.
        dtype: of the result; None for the parents' (float32 if they differ).
        name: of the result.
        on_module: called with each module's name when it is done (progress).
        energy: instead of a rank: the smallest that keeps this fraction of ||dW||_F^2 over all modules.
        before, after: plug-ins around the rule, by name or as objects.
        device: where to compute.
        measure: the error "exact"ly, "estimate"d from probes, or "none".
        out: a folder to stream the result to, module by module; the adapter that is returned reads from there.
        overwrite: replace an existing `out`.

    Raises LoralloyError for weights of unknown adapters, ranks or shapes that a rule cannot combine, overflow in the cast,
    and fully saved tensors (modules_to_save) that conflict.
    """
    plan = make_plan(
        bank, weights, rule, space, rank, dtype, name,
        energy=energy, before=before, after=after, device=device, measure=measure,
    )  # fmt: skip
    return run(plan, bank, on_module, out, overwrite)


def run(
    plan: Plan,
    bank: Bank,
    on_module: Callable[[str], None] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Merged:
    """Carry out a plan (see :func:`merge`)."""
    if out is not None:
        check_free(Path(out).absolute(), overwrite)
    parents = plan.parents
    extra, extra_notes = extra_tensors(parents)
    licences = {p.licence for p in parents}
    licence = licences.pop() if len(licences) == 1 else None
    settings = Settings(plan.rule, plan.space, plan.before, plan.after, plan.dtype, plan.device, plan.measure)
    keys = keys_of(plan.rule, parents)
    if "seed" in plan.rule.parameters:
        for parent in parents:  # masks are keyed by it; here once, not in two threads
            parent.content_hash  # noqa: B018
    groups = plan.groups
    if plan.energy is not None:
        groups = by_energy(groups, settings, lambda i, m: parents[i][m], keys, plan.energy)
    top = max((g.rank for g in groups), default=1)
    modules = [m for g in groups for m in g.modules]
    config = merged_config(parents, set(modules), top, bank)
    errors: dict[str, ModuleError] = {}

    through = plan.measure == "none" and _carries(plan)

    def fetch(i: int, module: str) -> LoraFactors:
        return parents[i].unchecked(module) if through else parents[i][module]

    def merged() -> Iterator[tuple[str, LoraFactors]]:
        names = [p.name for p in parents]
        by_block, rest = [g for g in groups if adds(g, settings)], [g for g in groups if not adds(g, settings)]
        by_shape = run_batches(rest, settings, fetch, keys, names)
        for batch in itertools.chain(added(by_block, settings, fetch, names), by_shape):
            if through:
                _check_parents(batch, parents)
            batch.check(names, fits_fp32(settings, fetch, keys))
            errors.update(zip(batch.modules, batch.errors, strict=True))
            for module, f in unstack(batch, top):
                yield module, f
                if on_module:
                    on_module(module)

    def report() -> MergeReport:
        rank = str(plan.rank) if plan.energy is None else f"{top} (energy {plan.energy:g})"
        notes = plan.notes + extra_notes
        return MergeReport(str(plan.rule), plan.space, rank, dtype_name(plan.dtype), dict(errors), notes, plan.measure)

    # sha256 and reading leave the interpreter to the others: hashing costs little beside the merge
    with ThreadPoolExecutor(_hashers(len(parents), all(adds(g, settings) for g in groups))) as hashing:
        hashes = [hashing.submit(getattr, p, "content_hash") for p in parents]
        if out is None:
            done = dict(merged())
            ordered = {m: done[m] for p in parents for m in p if m in done}
            carried = {key: cast(tensor, plan.dtype, f"tensor {key!r}") for key, tensor in extra.items()}
            said = report()
            provenance = {"merge": record(plan, said, _hashes(parents, hashes))}
            return Merged(Adapter(plan.name, ordered, config, bank.base, carried, provenance, licence), said)
        outlines = {
            m: outline(
                (top, *g.outlines[0].A.shape[1:]), _b_shape(g.outlines[0], top), plan.dtype, 1.0, g.outlines[0].kind
            )
            for g in groups
            for m in g.modules
        }
        ordered_names = {m: outlines[m] for p in parents for m in p if m in outlines}
        expected = {"merge": record(plan, report(), ["sha256:" + "0" * 64] * len(parents))}
        with (
            atomic_folder(out, overwrite) as folder,
            AdapterWriter(
                folder,
                plan.name,
                bank.base,
                config,
                ordered_names,
                {name: (tensor.dtype, tensor.shape) for name, tensor in extra.items()},
                plan.dtype,
                metadata_room(header(bank.base, expected)) + 256,
            ) as writer,
        ):
            for module, f in merged():
                writer.write(module, f)
            for name, tensor in extra.items():
                writer.write_extra(name, tensor)
            said = report()
            writer.finish({"merge": record(plan, said, _hashes(parents, hashes))}, licence)
    return Merged(Adapter.load(out, plan.name), said)


def _hashers(parents: int, alone: bool) -> int:
    """Threads that hash: as many as there are parents and cores that the merge leaves; it takes one if it goes `alone`.

    At least one. More threads than cores make those of torch wait for each other, in turns of milliseconds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(parents, cores - (1 if alone else torch.get_num_threads())))


def _hashes(parents: Sequence[Adapter], begun: Sequence[Future[str]]) -> list[str]:
    """The parents' hashes; this thread helps with those that no other has begun."""
    for parent, future in zip(reversed(parents), reversed(begun), strict=True):
        if future.cancel():
            parent.content_hash  # noqa: B018 - kept by the adapter
    return [p.content_hash if h.cancelled() else h.result() for p, h in zip(parents, begun, strict=True)]


def _carries(plan: Plan) -> bool:
    """Whether NaN and infinity in a parent are certain to be in the result: where entries are scaled and added, no more.

    Then looking at the result, which is done anyway, is looking at the parents. Even a weight of 0 makes NaN of them.
    """
    changed = plan.before is not None or plan.after is not None or plan.energy is not None
    if changed or any(g.cut for g in plan.groups):
        return False
    return plan.space in plan.rule.sums or plan.rule.function is linear


def _check_parents(batch: Batch, parents: Sequence[Adapter]) -> None:
    """Raises LoralloyError naming the adapter and the tensor that a batch's NaN or infinity came from, if one did."""
    if bool(torch.isfinite(batch.range).all()):
        return
    for module in batch.modules:
        for i in batch.group.who:
            try:
                parents[i][module]
            except LoralloyError as error:
                who = ", ".join(parents[i].name for i in batch.group.who)
                raise error.within(f"module {module!r} of {who}") from None


def _b_shape(f: LoraFactors, rank: int) -> tuple[int, ...]:
    return f.B.shape[0], rank, *f.B.shape[2:]


def merge_factors(
    adapters: Sequence[Mapping[str, LoraFactors]],
    weights: Sequence[float],
    rule: str | Rule,
    space: Space | None = None,
    rank: Rank | None = None,
    dtype: torch.dtype | None = None,
    before: str | Plugin | None = None,
    after: str | Plugin | None = None,
) -> dict[str, LoraFactors]:
    """The merge alone, factors in and factors out, on the device they are on: no files, no record, no error measured.

    Arguments as :func:`merge`; one weight an adapter. Random masks are keyed by the adapters' order here.

    Raises LoralloyError for no adapters or none with a module, a weight too few, and what :func:`merge` raises of the others.
    """
    if not adapters:
        raise LoralloyError("no adapters given; give at least one, each a mapping from modules to factors")
    if len(adapters) != len(weights):
        raise LoralloyError(f"{len(adapters)} adapters but {len(weights)} weights; give one weight an adapter")
    chosen, space = check_rule(rule, space)
    first, last = check_plugin(before, "before"), check_plugin(after, "after")
    modules = dict.fromkeys(m for a in adapters for m in a)
    groups = make_groups(
        modules,
        len(adapters),
        lambda i, m: adapters[i].get(m),
        lambda i, _: weights[i],
        chosen,
        space,
        check_rank(chosen.default_rank if rank is None else rank),
    )
    if not groups:
        raise LoralloyError("none of the adapters has a module; there is nothing to merge")
    a = groups[0].outlines[0].A
    settings = Settings(chosen, space, first, last, dtype or a.dtype, a.device, "none")
    names = [f"adapter {i}" for i in range(len(adapters))]
    result: dict[str, LoraFactors] = {}
    keys = keys_of(chosen, names)

    def fetch(i: int, module: str) -> LoraFactors:
        return adapters[i][module]

    batches = list(run_batches(groups, settings, fetch, keys, names))
    for batch in batches:
        result.update(unstack(batch, batch.stored.rank))
    if not bool(torch.isfinite(torch.stack([batch.range for batch in batches])).all()):
        for batch in batches:
            batch.check(names, fits_fp32(settings, fetch, keys))
    return result
