"""merge(): a plan carried out batch by batch, kept in memory or streamed to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from .assemble import extra_tensors, merged_config, record
from .batches import Settings, by_energy, keys_of, run_batches, unstack
from .measure import Measure, MergeReport, ModuleError
from .plan import Plan, Rank, make_groups, make_plan
from .rule import Plugin, Rule, Space


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
    extra, extra_notes = extra_tensors(parents, plan.weights)
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

    def merged() -> Iterator[tuple[str, LoraFactors]]:
        for batch in run_batches(groups, settings, lambda i, m: parents[i][m], keys, [p.name for p in parents]):
            batch.check([p.name for p in parents])
            errors.update(zip(batch.modules, batch.errors, strict=True))
            for module, f in unstack(batch, top):
                yield module, f
                if on_module:
                    on_module(module)

    def report() -> MergeReport:
        rank = str(plan.rank) if plan.energy is None else f"{top} (energy {plan.energy:g})"
        notes = plan.notes + extra_notes
        return MergeReport(str(plan.rule), plan.space, rank, dtype_name(plan.dtype), dict(errors), notes, plan.measure)

    # sha256 leaves the interpreter to the others, and both read the same pages: hashing costs little beside the merge
    with ThreadPoolExecutor(1) as hashing:
        hashes = [hashing.submit(getattr, p, "content_hash") for p in parents]
        if out is None:
            done = dict(merged())
            ordered = {m: done[m] for p in parents for m in p if m in done}
            carried = {key: cast(tensor, plan.dtype, f"tensor {key!r}") for key, tensor in extra.items()}
            said = report()
            provenance = {"merge": record(plan, said, [h.result() for h in hashes])}
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
            writer.finish({"merge": record(plan, said, [h.result() for h in hashes])}, licence)
    return Merged(Adapter.load(out, plan.name), said)


def _b_shape(f: LoraFactors, rank: int) -> tuple[int, ...]:
    return f.B.shape[0], rank, *f.B.shape[2:]


def merge_factors(
    adapters: Sequence[Mapping[str, LoraFactors]],
    weights: Sequence[float],
    rule: Rule,
    space: Space | None = None,
    rank: Rank | None = None,
    dtype: torch.dtype | None = None,
    before: Plugin | None = None,
    after: Plugin | None = None,
) -> dict[str, LoraFactors]:
    """The merge alone, factors in and factors out, on the device they are on: no files, no record, no error measured.

    Arguments as :func:`merge`; one weight an adapter. Random masks are keyed by the adapters' order here.
    """
    if len(adapters) != len(weights):
        raise LoralloyError(f"{len(adapters)} adapters but {len(weights)} weights; give one weight an adapter")
    space = rule.check_space(rule.spaces[0] if space is None else space)
    modules = dict.fromkeys(m for a in adapters for m in a)
    groups = make_groups(
        modules,
        len(adapters),
        lambda i, m: adapters[i].get(m),
        lambda i, _: weights[i],
        rule,
        space,
        rule.default_rank if rank is None else rank,
    )
    first = groups[0].outlines[0].A
    settings = Settings(rule, space, before, after, dtype or first.dtype, first.device, "none")
    names = [f"adapter {i}" for i in range(len(adapters))]
    result: dict[str, LoraFactors] = {}
    batches = list(run_batches(groups, settings, lambda i, m: adapters[i][m], keys_of(rule, names), names))
    for batch in batches:
        result.update(unstack(batch, batch.stored.rank))
    if not bool(torch.isfinite(torch.stack([batch.range for batch in batches])).all()):
        for batch in batches:
            batch.check(names)
    return result
