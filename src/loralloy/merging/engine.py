"""merge(): same-shaped modules in batches through a rule, cut to a rank, cast, measured, and kept or streamed to disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter
from ..atomic import atomic_folder
from ..bank import Bank
from ..errors import LoralloyError
from ..factors import LoraFactors
from ..saving import AdapterWriter, cast, dtype_name, header, outline
from ..tensor_file import metadata_room
from ..weights import Weights
from . import spaces
from .assemble import extra_tensors, merged_config, record
from .cut import Cut, cut, cut_dense, dense_spectrum, spectrum, whole
from .measure import Measure, MergeReport, ModuleError, measure
from .plan import Group, Plan, Rank, make_groups, make_plan
from .rule import Plugin, Rule, Space
from .select import GlobalLimits, Limits
from .stack import LowRank, Stack

_UNKNOWN = ModuleError(*[float("nan")] * 5)
Fetch = Callable[[int, str], LoraFactors]
# Bytes of one batch's working set; constants, so that the same input gives the same bytes whatever memory is free.
_BUDGET = {"cpu": 48 << 20, "cuda": 12 << 30}
_CACHED = 16 << 20


@dataclass(frozen=True)
class Merged:
    adapter: Adapter
    report: MergeReport


@dataclass(frozen=True)
class Batch:
    """One batch's result: factors [L, k, in] and [L, out, k] of `modules`, in the stored dtype, and their errors.

    `range` holds the smallest and largest entries of A and of B: infinite where the cast overflowed, which :meth:`check`
    looks at when the device is done.
    """

    group: Group
    modules: list[str]
    stored: LowRank
    errors: list[ModuleError]
    range: Tensor
    fallbacks: int = 0

    def check(self, names: Sequence[str]) -> None:
        """Raises LoralloyError naming the first module whose cast overflowed."""
        if bool(torch.isfinite(self.range).all()):
            return
        for module, a, b in zip(self.modules, self.stored.A, self.stored.B, strict=True):
            for side, tensor in (("A", a), ("B", b)):
                if not bool(torch.isfinite(tensor).all()):
                    who = ", ".join(names[i] for i in self.group.who)
                    raise LoralloyError(
                        f"module {module!r} of {who}: {side} overflows {dtype_name(tensor.dtype)}; store it as bf16 or fp32 "
                        "(--dtype)"
                    )


@dataclass(frozen=True)
class Recipe:
    """How every batch is made: the parts of a plan that a batch needs."""

    rule: Rule
    space: Space
    before: Plugin | None
    after: Plugin | None
    dtype: torch.dtype
    device: torch.device
    measure: Measure


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
    parents = plan.parents
    extra, extra_notes = extra_tensors(parents, plan.weights)
    licences = {p.licence for p in parents}
    licence = licences.pop() if len(licences) == 1 else None
    recipe = Recipe(plan.rule, plan.space, plan.before, plan.after, plan.dtype, plan.device, plan.measure)
    keys = _keys(plan.rule, parents)
    groups = plan.groups
    if plan.energy is not None:
        groups = _by_energy(groups, recipe, lambda i, m: parents[i][m], keys, plan.energy)
    top = max((g.rank for g in groups), default=1)
    modules = [m for g in groups for m in g.modules]
    config = merged_config(parents, set(modules), top, bank)
    errors: dict[str, ModuleError] = {}

    def merged() -> Iterator[tuple[str, LoraFactors]]:
        for batch in _batches(groups, recipe, lambda i, m: parents[i][m], keys, [p.name for p in parents]):
            batch.check([p.name for p in parents])
            errors.update(zip(batch.modules, batch.errors, strict=True))
            for module, f in _unstack(batch, top):
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
    recipe = Recipe(rule, space, before, after, dtype or first.dtype, first.device, "none")
    names = [f"adapter {i}" for i in range(len(adapters))]
    result: dict[str, LoraFactors] = {}
    batches = list(_batches(groups, recipe, lambda i, m: adapters[i][m], _keys(rule, names), names))
    for batch in batches:
        result.update(_unstack(batch, batch.stored.rank))
    if not bool(torch.isfinite(torch.stack([batch.range for batch in batches])).all()):
        for batch in batches:
            batch.check(names)
    return result


# -- batches -----------------------------------------------------------------------------------------------------------


def _keys(rule: Rule, parents: Sequence[Adapter] | Sequence[str]) -> Callable[[int, str], int]:
    """A 64-bit key of an adapter's content and a module's name, for rules that draw random masks."""
    if "seed" not in rule.parameters:
        return lambda i, module: 0

    def key(i: int, module: str) -> int:
        parent = parents[i]
        text = f"{parent if isinstance(parent, str) else parent.content_hash}|{module}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)

    return key


def _chunks(group: Group, recipe: Recipe) -> Iterator[slice]:
    """Slices of a group's modules whose working set fits the budget."""
    out, inside = group.shape
    entries = (out + inside) * (sum(group.ranks) + group.rank) * 6
    if recipe.space == "delta" and recipe.rule.acts_on == "entries" and "delta" not in recipe.rule.sums:
        entries += out * inside * (len(group.who) + 3)
    budget = _BUDGET.get(recipe.device.type, _BUDGET["cpu"])
    if recipe.device.type == "cpu" and recipe.space == "factors" and "factors" not in recipe.rule.sums:
        budget = _CACHED  # dozens of light passes over the same entries: they should stay in the cache
    size = max(1, budget // (4 * entries))
    return (slice(at, at + size) for at in range(0, len(group.modules), size))


def _load(group: Group, part: slice, recipe: Recipe, fetch: Fetch, keys: Callable[[int, str], int]) -> Stack:
    """The stack of some of a group's modules. On a CPU in the dtype of the computation; a GPU keeps 16 bits until used."""
    modules = group.modules[part]
    a, b = [], []
    for i in group.who:
        found = [fetch(i, m) for m in modules]
        a.append(_stack([f.a for f in found], recipe.device))
        b.append(_stack([f.b for f in found], recipe.device))
    if recipe.device.type != "cuda":
        wide = torch.float64 if any(t.dtype == torch.float64 for t in (*a, *b)) else torch.float32
        a, b = [t.to(wide) for t in a], [t.to(wide) for t in b]
    wide = torch.float32 if recipe.device.type == "mps" else torch.float64
    scaling, weights = (
        torch.tensor([row[part] for row in rows], dtype=wide).to(recipe.device, non_blocking=True)
        for rows in (group.scaling, group.weights)
    )
    if "seed" in recipe.rule.parameters:
        seeds = torch.tensor([[keys(i, m) for m in modules] for i in group.who], dtype=torch.int64)
    else:
        seeds = torch.zeros(len(group.who), len(modules), dtype=torch.int64)
    return Stack(tuple(a), tuple(b), scaling, weights, seeds.to(recipe.device, non_blocking=True))


def _stack(tensors: list[Tensor], device: torch.device) -> Tensor:
    """[L, m, n] of L matrices; by `cat`, which does not first make a view of each, as `stack` does."""
    if tensors[0].device != device:
        tensors = [t.to(device, non_blocking=True) for t in tensors]
    return torch.cat(tensors).view(len(tensors), *tensors[0].shape) if len(tensors) > 1 else tensors[0][None]


def _batches(
    groups: list[Group], recipe: Recipe, fetch: Fetch, keys: Callable[[int, str], int], names: Sequence[str]
) -> Iterator[Batch]:
    """Every batch of every group, done."""
    trims = _counted(groups, recipe, fetch, keys) if recipe.rule.values.get("trim") == "all" else None
    for group in groups:
        for part in _chunks(group, recipe):
            modules = group.modules[part]
            try:
                stack = _load(group, part, recipe, fetch, keys)
                yield _merge_batch(group, modules, stack, recipe, trims)
            except LoralloyError as error:
                if len(modules) > 1:  # say which one
                    error = _blame(group, part, recipe, fetch, keys, trims) or error
                where = str(error).split(":")[0] if str(error).startswith("module ") else f"module {modules[0]!r}"
                said = str(error)[len(where) + 2 :] if str(error).startswith("module ") else str(error)
                raise LoralloyError(f"{where} of {', '.join(names[i] for i in group.who)}: {said}") from None


def _blame(
    group: Group, part: slice, recipe: Recipe, fetch: Fetch, keys: Callable[[int, str], int], trims: GlobalLimits | None
) -> LoralloyError | None:
    """The error of the first module of a batch that fails on its own, with its name."""
    for at in range(part.start, min(part.stop, len(group.modules))):
        one = slice(at, at + 1)
        try:
            _merge_batch(group, group.modules[one], _load(group, one, recipe, fetch, keys), recipe, trims)
        except LoralloyError as error:
            return error.within(f"module {group.modules[at]!r}")
    return None


def _prepared(stack: Stack, recipe: Recipe) -> tuple[Stack, Tensor | None]:
    """The stack that the rule sees, and the factor that a plug-in asks the result to be multiplied with."""
    scale = None
    if recipe.before is not None:
        stack, scale = recipe.before.function(stack, **recipe.before.values)
    if recipe.rule.values.get("prune") == "merged":
        if recipe.space == "factors":
            seen = spaces.view(stack, "factors")
            a, b = (piece.combined() for piece in seen.pieces)
        else:
            total = stack.weighted_sum()
            a, b = total.A, total.B
        ones = torch.ones_like(stack.weights[:1])
        stack = Stack((a,), (b,), ones, ones, stack.keys[:1])
    return stack, scale


def _rule_result(
    original: Stack, recipe: Recipe, rank: int | None, keepers: Sequence[Limits] | None
) -> LowRank | Tensor:
    """What the rule makes of a stack, before any cut."""
    rule, space = recipe.rule, recipe.space
    stack, scale = _prepared(original, recipe)
    result: LowRank | Tensor
    # where nothing follows, the sum is rounded once, straight to the stored dtype
    raw = rank is None and recipe.measure == "none" and scale is None and recipe.after is None
    if space in rule.sums:
        result = stack.weighted_sum(recipe.dtype if raw else None)
    elif rule.acts_on == "stack":
        result = rule.function(stack, **rule.values)
    else:
        result = spaces.apply(rule, stack, space, keepers)
    if scale is not None:
        factor = scale.to(stack.dtype)[:, None, None]
        result = LowRank(result.A, result.B * factor) if isinstance(result, LowRank) else result * factor
    if recipe.before is not None and recipe.before.finish is not None:
        result = recipe.before.finish(result, original, **recipe.before.values)
    if recipe.after is not None:
        result = recipe.after.function(result, original, rank, **recipe.after.values)
    return result


def _merge_batch(group: Group, modules: list[str], stack: Stack, recipe: Recipe, trims: GlobalLimits | None) -> Batch:
    keepers = _keepers(trims, group, modules, recipe)
    result = _rule_result(stack, recipe, group.rank if group.cut else None, keepers)
    done: Cut | None = None
    if isinstance(result, Tensor):
        if group.cut:
            done = cut_dense(result, group.rank)
        else:
            done = Cut(whole(result), stack.scaling[0], stack.scaling[0])  # nothing was cut: its norms are not read
        small = done.result
    elif group.cut:
        done = cut(result, group.rank)
        small = done.result
    else:
        small = result
    stored = LowRank(small.A.to(recipe.dtype), small.B.to(recipe.dtype))
    ends = torch.stack([end for t in (stored.A, stored.B) for end in torch.aminmax(t)])
    if recipe.measure == "none":
        return Batch(group, modules, stored, [_UNKNOWN] * len(modules), ends, done.fallbacks if done else 0)
    exact, before, after, own = measure(stack, small, stored, recipe.measure)
    # a module that was not cut lost nothing of its own norm
    full, lost = (done.total.sqrt(), done.lost.sqrt()) if done and group.cut else (own, torch.zeros_like(own))
    columns = torch.stack([column.double().cpu() for column in (exact, before, after, full, lost)], 1)
    errors = [ModuleError(*row) for row in columns.tolist()]
    return Batch(group, modules, stored, errors, ends, done.fallbacks if done else 0)


def _unstack(batch: Batch, top: int) -> Iterator[tuple[str, LoraFactors]]:
    """A batch's modules one by one, padded with zeros to one rank."""
    a, b = batch.stored.A, batch.stored.B
    if top > batch.stored.rank:
        missing = top - batch.stored.rank
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        b = torch.nn.functional.pad(b, (0, missing))
    first = batch.group.outlines[0]
    plain = first.kind != "conv"
    for module, x, y in zip(batch.modules, a.unbind(0), b.unbind(0), strict=True):
        yield module, (LoraFactors(x, y, 1.0, first.kind) if plain else first.with_matrices(x, y))


# -- passes before the merge -------------------------------------------------------------------------------------------


def _counted(groups: list[Group], recipe: Recipe, fetch: Fetch, keys: Callable[[int, str], int]) -> GlobalLimits:
    """Trimming limits over all modules: passes over every adapter's entries."""
    merged = recipe.rule.values.get("prune") == "merged"
    adapters = 1 if merged else 1 + max(i for g in groups for i in g.who)
    limits = GlobalLimits(adapters, recipe.rule.values["density"], recipe.device)
    for take in limits.passes():
        for group in groups:
            for part in _chunks(group, recipe):
                limits.begin(group.modules[part])
                stack, _ = _prepared(_load(group, part, recipe, fetch, keys), recipe)
                for piece in spaces.view(stack, recipe.space).pieces:
                    for t in range(stack.adapters):
                        for x in piece.blocks(t)():
                            take(0 if merged else group.who[t], x)
    return limits


def _keepers(trims: GlobalLimits | None, group: Group, modules: Sequence[str], recipe: Recipe) -> list[Limits] | None:
    """The limits of a batch, in the order of the stack that the rule sees."""
    if trims is None:
        return None
    who = (0,) if recipe.rule.values.get("prune") == "merged" else group.who
    return [trims.keeper(i, modules) for i in who]


def _by_energy(
    groups: list[Group], recipe: Recipe, fetch: Fetch, keys: Callable[[int, str], int], energy: float
) -> list[Group]:
    """The groups with the smallest one rank that keeps a fraction of ||dW||^2 over all modules; a pass over the merge."""
    trims = _counted(groups, recipe, fetch, keys) if recipe.rule.values.get("trim") == "all" else None
    held = torch.zeros(1, dtype=torch.float64)
    for group in groups:
        for part in _chunks(group, recipe):
            keepers = _keepers(trims, group, group.modules[part], recipe)
            result = _rule_result(_load(group, part, recipe, fetch, keys), recipe, None, keepers)
            values = (spectrum(result) if isinstance(result, LowRank) else dense_spectrum(result)).sum(0).cpu()
            width = max(held.numel(), values.numel())
            held, values = (torch.nn.functional.pad(v, (0, width - v.numel())) for v in (held, values))
            held = held + values
    kept = held.cumsum(0)
    enough = (kept >= (energy - 1e-12) * kept[-1]).nonzero()
    rank = int(enough[0]) + 1 if len(enough) else 1
    return [
        replace(g, rank=min(rank, *g.shape), cut=True) if rank < g.rank else g for g in groups
    ]  # fmt: skip
