"""Batches: same-shaped modules (see :mod:`.stacking`) through a rule, cut, cast and measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import LoralloyError
from ..factors import LoraFactors
from ..saving import dtype_name
from . import spaces
from .cut import Cut, cut, cut_dense, dense_spectrum, spectrum, whole
from .measure import ModuleError, measure
from .plan import Group
from .select import GlobalLimits, Limits
from .stack import LowRank, Stack
from .stacking import Fetch, Settings, chunks, load, prepared

UNKNOWN = ModuleError(*[float("nan")] * 5)
_FREED = (32 << 20) - (64 << 10)  # bytes; a block of 32 MiB and more would leave the threshold as it is


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

    def check(self, names: Sequence[str], fits: Callable[[Group, str], bool]) -> None:
        """Raises LoralloyError naming the first module whose cast overflowed; `fits` says whether it would in float32."""
        if bool(torch.isfinite(self.range).all()):
            return
        for module, a, b in zip(self.modules, self.stored.A, self.stored.B, strict=True):
            for side, tensor in (("A", a), ("B", b)):
                if not bool(torch.isfinite(tensor).all()):
                    who = ", ".join(names[i] for i in self.group.who)
                    narrow = tensor.dtype == torch.float16 and fits(self.group, module)
                    what, way_out = dtype_name(tensor.dtype), "store it as bf16 or fp32 (--dtype)"
                    if not narrow:
                        what, way_out = "fp32", "its weights or factors are too large"
                    raise LoralloyError(f"module {module!r} of {who}: {side} overflows {what}; {way_out}")


@functools.cache
def _keep_freed() -> None:
    """Let glibc keep what one batch frees for the next: fresh pages cost a quarter of an entrywise merge on a CPU.

    It keeps twice the largest block that was ever freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD); this one is not
    touched, so it costs nothing. Other allocators, and a threshold that is set, are left as they are.
    """
    torch.empty(_FREED, dtype=torch.uint8)


def run_batches(
    groups: list[Group], settings: Settings, fetch: Fetch, keys: Callable[[int, str], int], names: Sequence[str]
) -> Iterator[Batch]:
    """Every batch of every group, done, in order."""
    if settings.device.type == "cpu":
        _keep_freed()
    trims = _counted(groups, settings, fetch, keys) if settings.rule.values.get("trim") == "all" else None

    for group in groups:
        for part in chunks(group, settings):
            modules = group.modules[part]
            try:
                yield _merge_batch(group, modules, load(group, part, settings, fetch, keys), settings, trims)
            except LoralloyError as error:
                where, cause = f"module {modules[0]!r}", error
                if len(modules) > 1:  # say which one
                    where, cause = _blame(group, part, settings, fetch, keys, trims) or (where, error)
                raise cause.within(f"{where} of {', '.join(names[i] for i in group.who)}") from None


def fits_fp32(settings: Settings, fetch: Fetch, keys: Callable[[int, str], int]) -> Callable[[Group, str], bool]:
    """For :meth:`Batch.check`: (group, module) -> whether the result is finite in float32, by merging that module again."""

    def fits(group: Group, module: str) -> bool:
        at = group.modules.index(module)
        wide = replace(settings, dtype=torch.float32, measure="none")
        try:  # trimmed by itself, whatever the scope: its magnitudes are the same
            again = _merge_batch(group, [module], load(group, slice(at, at + 1), wide, fetch, keys), wide, None)
        except LoralloyError:
            return False
        return bool(torch.isfinite(again.range).all())

    return fits


def _blame(
    group: Group,
    part: slice,
    settings: Settings,
    fetch: Fetch,
    keys: Callable[[int, str], int],
    trims: GlobalLimits | None,
) -> tuple[str, LoralloyError] | None:
    """The error of the first module of a batch that fails on its own, with its name."""
    for at in range(part.start, min(part.stop, len(group.modules))):
        one = slice(at, at + 1)
        try:
            _merge_batch(group, group.modules[one], load(group, one, settings, fetch, keys), settings, trims)
        except LoralloyError as error:
            return f"module {group.modules[at]!r}", error
    return None


def _rule_result(
    original: Stack, settings: Settings, rank: int | None, keepers: Sequence[Limits] | None
) -> LowRank | Tensor:
    """What the rule makes of a stack, before any cut."""
    rule, space = settings.rule, settings.space
    stack = prepared(original, settings)
    result: LowRank | Tensor
    # where nothing follows, the sum is rounded once, straight to the stored dtype
    raw = rank is None and settings.measure == "none" and settings.before is None and settings.after is None
    if space in rule.sums:
        result = stack.weighted_sum(settings.dtype if raw else None)
    elif rule.acts_on == "stack":
        result = rule.function(stack, **rule.values)
    else:
        result = spaces.apply(rule, stack, space, keepers)
    if settings.before is not None and settings.before.finish is not None:
        result = settings.before.finish(result, original, **settings.before.values)
    if settings.after is not None:
        result = settings.after.function(result, original, rank, **settings.after.values)
    return result


def _merge_batch(
    group: Group, modules: list[str], stack: Stack, settings: Settings, trims: GlobalLimits | None
) -> Batch:
    keepers = _keepers(trims, group, modules, settings)
    result = _rule_result(stack, settings, group.rank if group.cut else None, keepers)
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
    stored = LowRank(small.A.to(settings.dtype), small.B.to(settings.dtype))
    ends = torch.stack([end for t in (stored.A, stored.B) for end in torch.aminmax(t)])
    if settings.measure == "none":
        return Batch(group, modules, stored, [UNKNOWN] * len(modules), ends)
    exact, before, after, own = measure(stack, small, stored, settings.measure)
    # a module that was not cut lost nothing of its own norm
    full, lost = (done.total.sqrt(), done.lost.sqrt()) if done and group.cut else (own, torch.zeros_like(own))
    columns = torch.stack([column.cpu().double() for column in (exact, before, after, full, lost)], 1)
    errors = [ModuleError(*row) for row in columns.tolist()]
    return Batch(group, modules, stored, errors, ends)


def unstack(batch: Batch, top: int) -> Iterator[tuple[str, LoraFactors]]:
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


def _counted(groups: list[Group], settings: Settings, fetch: Fetch, keys: Callable[[int, str], int]) -> GlobalLimits:
    """Trimming limits over all modules: passes over every adapter's entries."""
    merged = settings.rule.values.get("prune") == "merged"
    adapters = 1 if merged else 1 + max(i for g in groups for i in g.who)
    limits = GlobalLimits(adapters, settings.rule.values["density"], settings.device)
    for take in limits.passes():
        for group in groups:
            for part in chunks(group, settings):
                limits.begin(group.modules[part])
                stack = prepared(load(group, part, settings, fetch, keys), settings)
                for piece in spaces.view(stack, settings.space).pieces:
                    for t in range(stack.adapters):
                        for x in piece.blocks(t)():
                            take(0 if merged else group.who[t], x)
    return limits


def _keepers(
    trims: GlobalLimits | None, group: Group, modules: Sequence[str], settings: Settings
) -> list[Limits] | None:
    """The limits of a batch, in the order of the stack that the rule sees."""
    if trims is None:
        return None
    who = (0,) if settings.rule.values.get("prune") == "merged" else group.who
    return [trims.keeper(i, modules) for i in who]


def by_energy(
    groups: list[Group], settings: Settings, fetch: Fetch, keys: Callable[[int, str], int], energy: float
) -> list[Group]:
    """The groups with the smallest one rank that keeps a fraction of ||dW||^2 over all modules; a pass over the merge.

    Of the sums as computed, whatever is measured of them later.
    """
    settings = replace(settings, measure="exact")
    trims = _counted(groups, settings, fetch, keys) if settings.rule.values.get("trim") == "all" else None
    held = torch.zeros(1, dtype=torch.float64)
    for group in groups:
        for part in chunks(group, settings):
            keepers = _keepers(trims, group, group.modules[part], settings)
            try:
                result = _rule_result(load(group, part, settings, fetch, keys), settings, None, keepers)
                values = (spectrum(result) if isinstance(result, LowRank) else dense_spectrum(result)).sum(0).cpu()
            except LoralloyError as error:
                raise error.within(f"modules like {group.modules[part][0]!r}") from None
            width = max(held.numel(), values.numel())
            held, values = (torch.nn.functional.pad(v, (0, width - v.numel())) for v in (held, values))
            held = held + values
    kept = held.cumsum(0)
    enough = (kept >= (energy - 1e-12) * kept[-1]).nonzero()
    rank = int(enough[0]) + 1 if len(enough) else 1
    return [
        replace(g, rank=min(rank, *g.shape), cut=True) if rank < g.rank else g for g in groups
    ]  # fmt: skip
