"""What a merge will do, as plain data: which modules, grouped by shape, from which adapters, under which rule, to what rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ..adapter import Adapter
from ..bank import Bank
from ..errors import LoralloyError
from ..factors import LoraFactors
from ..weights import Weights
from .measure import MEASURES, Measure
from .rule import Plugin, Rule, Space

Rank: TypeAlias = "int | Literal['max', 'full']"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Group:
    """Modules of one shape, in the same adapters with the same ranks: what is merged in one batch.

    Attributes:
        modules: L names.
        who: T positions of the adapters that take part.
        outlines: T factors of the first module; only shapes and kinds are read.
        scaling, weights: [T][L].
        rank: of the result before padding; the rule's own where nothing is cut.
        cut: whether the rule's own result is cut down to `rank`.
    """

    modules: list[str]
    who: tuple[int, ...]
    outlines: list[LoraFactors]
    scaling: list[list[float]]
    weights: list[list[float]]
    rank: int
    cut: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.outlines[0].shape

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(f.rank for f in self.outlines)


@dataclass(frozen=True)
class Plan:
    """A merge before it runs. `parents` are the adapters that take part; positions in groups refer to them."""

    name: str
    parents: list[Adapter]
    weights: Weights
    rule: Rule
    space: Space
    rank: Rank
    energy: float | None
    before: Plugin | None
    after: Plugin | None
    dtype: torch.dtype
    device: torch.device
    measure: Measure
    groups: list[Group]
    notes: tuple[str, ...]

    @property
    def top(self) -> int:
        """The one rank that every module of the result gets."""
        return max((g.rank for g in self.groups), default=1)

    @property
    def modules(self) -> list[str]:
        return [m for g in self.groups for m in g.modules]

    @property
    def bytes_out(self) -> int:
        """Size of the result's tensors (with `energy`, an upper bound)."""
        entries = sum(len(g.modules) * sum(g.shape) for g in self.groups) * self.top
        return entries * torch.empty(0, dtype=self.dtype).element_size()


def natural_rank(rule: Rule, space: Space, ranks: Sequence[int], shape: tuple[int, int]) -> int:
    """The rank of a rule's own result: r in factors space, min(out, in) for entries of dW, what a rule on stacks says, else
    the sum of ranks."""
    if rule.width is not None:
        return rule.width(ranks, shape, **rule.values)
    if rule.acts_on == "stack" or space in rule.sums:
        return sum(ranks)
    if space == "factors":
        return ranks[0]
    return min(shape) if space == "delta" else min(sum(ranks), *shape)


def make_groups(
    modules: Iterable[str],
    adapters: int,
    outline: Callable[[int, str], LoraFactors | None],
    weight: Callable[[int, str], float],
    rule: Rule,
    space: Space,
    rank: Rank,
) -> list[Group]:
    """Modules grouped by shape, kind, ranks and who has them. `outline` gives None for an adapter without the module.

    Outside factors space weight 0 is absence: of rank, of modules; where all weights are 0 the result is zero. In factors
    space an adapter of weight 0 takes part, as in PEFT.
    """
    found: dict[object, tuple[tuple[int, ...], list[LoraFactors], list[str]]] = {}
    names, everyone = list(modules), range(adapters)
    any_weight = any(weight(i, m) for m in names for i in everyone if outline(i, m) is not None)
    absent = any_weight and (space != "factors" or space in rule.sums)
    for module in names:
        having = [(i, f) for i in everyone if (f := outline(i, module)) is not None]
        if any_weight:
            weighing = [entry for entry in having if weight(entry[0], module)]
            if not weighing:
                continue
            having = weighing if absent else having
        key = tuple([(i, f.kind, f.A.shape, f.B.shape) for i, f in having])
        group = found.get(key)
        if group is None:
            outlines = [f for _, f in having]
            _check_alike(module, outlines)
            group = found[key] = (tuple(i for i, _ in having), outlines, [])
        group[2].append(module)
    result = []
    for who, outlines, members in found.values():
        scaling = [[outline(i, m).scaling for m in members] for i in who]  # type: ignore[union-attr]
        weights = [[weight(i, m) for m in members] for i in who]
        ranks = [f.rank for f in outlines]
        own = natural_rank(rule, space, ranks, outlines[0].shape)
        limit = max(ranks) if rank == "max" else own if rank == "full" else int(rank)
        cut = limit < own
        goal = min(limit, *outlines[0].shape) if cut else own
        result.append(Group(members, who, outlines, scaling, weights, goal, cut))
    return result


def _check_alike(module: str, outlines: Sequence[LoraFactors]) -> None:
    """A bank has seen to it already; bare factors come from anywhere."""
    first = outlines[0]
    for f in outlines[1:]:
        if (f.kind, f.B.shape[0], f.A.shape[1:]) != (first.kind, first.B.shape[0], first.A.shape[1:]):
            raise LoralloyError(
                f"module {module!r} is {first.kind} {list(first.shape)} in one adapter but {f.kind} {list(f.shape)} in another; "
                "they are not of one base model"
            )


def check_rule(rule: str | Rule, space: Space | None) -> tuple[Rule, Space]:
    """The rule, by name or as it is, and its space (the rule's first for None). Raises LoralloyError for what is neither."""
    from . import get_rule

    found = get_rule(rule) if isinstance(rule, str) else rule
    if not isinstance(found, Rule):
        raise LoralloyError(f"{found} is not a rule; give a rule's name or a rule such as Ties(density=0.2)")
    return found, found.check_space(found.spaces[0] if space is None else space)


def check_plugin(plugin: str | Plugin | None, when: Literal["before", "after"]) -> Plugin | None:
    """The plug-in, by name or as it is. Raises LoralloyError for what is none, or goes elsewhere."""
    from . import get_plugin

    found = get_plugin(plugin) if isinstance(plugin, str) else plugin
    if found is not None and not isinstance(found, Plugin):
        raise LoralloyError(f"{found} is not a plug-in; give a plug-in's name or one such as Pico(restore=False)")
    if found is not None and found.when != when:
        raise LoralloyError(f"plug-in {found.name!r} goes {found.when} the rule; pass it as --{found.when}")
    return found


def check_rank(rank: Rank) -> Rank:
    """`rank`. Raises LoralloyError for anything but a positive number, "max" and "full"."""
    if rank in ("max", "full") or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        return rank
    raise LoralloyError(f"rank {rank!r} is not valid; give a positive number, 'max' or 'full'")


def make_plan(
    bank: Bank,
    weights: Weights,
    rule: str | Rule = "linear",
    space: Space | None = None,
    rank: Rank | None = None,
    dtype: torch.dtype | None = None,
    name: str = "merged",
    *,
    energy: float | None = None,
    before: str | Plugin | None = None,
    after: str | Plugin | None = None,
    device: str | torch.device = "cpu",
    measure: Measure = "exact",
) -> Plan:
    """Check everything that can be checked before a tensor is read; arguments as :func:`loralloy.merging.merge`.

    Raises LoralloyError for weights of unknown adapters, a space in which the rule is not defined, ranks that cannot be
    combined, and values out of range.
    """
    chosen, space = check_rule(rule, space)
    first, last = check_plugin(before, "before"), check_plugin(after, "after")
    if energy is not None and not (isinstance(energy, int | float) and energy is not True and 0 < energy <= 1):
        raise LoralloyError(f"energy {energy!r} is not valid; give a fraction of ||dW||^2 above 0, at most 1")
    if energy is not None and rank is not None:
        raise LoralloyError(
            f"rank {rank} and energy {energy} are both given; one of them decides the rank, drop the other"
        )
    rank = check_rank(("full" if energy is not None else chosen.default_rank) if rank is None else rank)
    if measure not in MEASURES:
        raise LoralloyError(f"measure {measure!r} is not known; choose {', '.join(MEASURES)}")
    where = _device(device)
    weights = bank.fit_weights(weights)
    parents = [bank[n] for n in weights.names]
    if (
        space != "factors" or space in chosen.sums
    ):  # weight 0 is absence: of its dtype and saved modules too (all zero: a merge to zero)
        parents = [p for p in parents if takes_part(p, weights)] or parents

    stored = dtype or common_dtype(parents)
    if stored not in _DTYPES:
        raise LoralloyError(f"{stored} cannot be merged to; store the result as fp16, bf16 or fp32 (--dtype)")
    outlines = [{m: p.outline(m) for m in p} for p in parents]
    groups = make_groups(
        dict.fromkeys(m for p in parents for m in p),
        len(parents),
        lambda i, m: outlines[i].get(m),
        lambda i, m: weights.of(parents[i].name, m),
        chosen,
        space,
        rank,
    )
    if space == "factors" and space not in chosen.sums:
        for g in groups:
            if len(set(g.ranks)) > 1:
                who = ", ".join(f"{parents[i].name} {r}" for i, r in zip(g.who, g.ranks, strict=True))
                raise LoralloyError(
                    f"module {g.modules[0]!r} of {', '.join(parents[i].name for i in g.who)}: rule {chosen.name!r} in factors "
                    f"space adds A to A, so ranks must be equal; they are {sorted(set(g.ranks))} ({who}). Use --space delta, "
                    "which takes any ranks"
                )
    notes = []
    voting = [(i, g) for g in groups for i, row in zip(g.who, g.weights, strict=True) if not all(row)]
    if space == "factors" and voting and "majority" in chosen.parameters:
        who = ", ".join(parents[i].name for i in dict.fromkeys(i for i, _ in voting))
        some = sum(sum(not all(column) for column in zip(*g.weights, strict=True)) for g in groups)
        notes.append(
            f"{who}: weight 0 still votes in factors space, as in PEFT ({some} of {sum(len(g.modules) for g in groups)} "
            "modules); leave it out to silence it"
        )
    return Plan(
        name, parents, weights, chosen, space, rank, energy, first, last,
        stored, where, measure, groups, tuple(notes),
    )  # fmt: skip


def takes_part(adapter: Adapter, weights: Weights) -> bool:
    """Whether an adapter has a weight other than 0 at any of its modules; without modules (it only saves tensors), at all."""
    if len(adapter):
        return any(weights.of(adapter.name, m) for m in adapter)
    return weights.coefficients.get(adapter.name, 0) != 0


def common_dtype(parents: Sequence[Adapter]) -> torch.dtype:
    """The dtype of the parents' modules, or float32 where they differ."""
    dtypes = {p.outline(m).A.dtype for p in parents for m in p} or {p.dtype for p in parents}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise LoralloyError(
            f"device {str(device)!r} cannot be used ({reason}); give cpu, or cuda where there is one"
        ) from None
    return found
