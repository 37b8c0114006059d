"""Basis: one module's merged dW as a function of the coefficients, with gradients: what learning them stands on.

Equal to :func:`loralloy.merging.merge` at rank "full" for every entrywise rule and space; nothing here needs a model.

| kind | dW(w) | for |
|---|---|---|
| low_rank_delta | sum_i w_i s_i B_i A_i, never formed | the weighted sum (linear in delta, cat, svd before its cut) |
| low_rank_factors | B(w) A(w), each a rule's result | rules in factors space |
| low_rank_shared | U M(w) V, M a rule's result | rules in knots and core space |
| dense | a rule's result [out, in] | rules in delta space |

The terms are made by the code that merges (spaces, limits, masks), with the same keys. A dense basis holds n x out x in numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..adapter import Adapter
from ..bank import Bank
from ..errors import LoralloyError
from . import spaces
from .plan import Group, check_rule, make_groups
from .rule import Rule, Space
from .select import GlobalLimits, Limits
from .stack import LowRank, Stack
from .stacking import keys_of
from .terms import Roots, Terms, make_terms, wide_of

Kind: TypeAlias = Literal["low_rank_delta", "low_rank_factors", "low_rank_shared", "dense"]
State: TypeAlias = Tensor | tuple[Tensor, Tensor]
FUSED = ("cuda",)  # where one call for a product and a sum pays: on a CPU its copy of the sum costs more than the call
ENTRYWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass(frozen=True)
class Basis:
    """One module's dW as a function of the coefficients w [n] of all n adapters.

    Attributes:
        kind: see the table of this file.
        shape: (out, in) of dW.
        who: [t] int64, the positions of the adapters that have the module; the others' coefficients do nothing here.
        terms: of "dense" dW itself, of "low_rank_shared" the core M, of "low_rank_factors" A and B.
        A, B: of "low_rank_delta", all factors side by side with their scaling, [R, in] and [out, R].
        owner: [R] int64, whose row of `A` each is.
        rebuild: of "low_rank_shared", what makes (A, B) of [M[None]] (see `spaces.View`).
    """

    kind: Kind
    shape: tuple[int, int]
    who: Tensor
    terms: tuple[Terms, ...] = ()
    A: Tensor | None = None
    B: Tensor | None = None
    owner: Tensor | None = None
    rebuild: Callable[[list[Tensor]], LowRank | Tensor] | None = None

    @property
    def low_rank(self) -> bool:
        """Whether `apply` costs a few thin products."""
        return self.kind != "dense"

    @property
    def nbytes(self) -> int:
        """Memory of the terms."""
        tensors = [t.values for t in self.terms] + [t for t in (self.A, self.B) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def picks(self) -> Tensor:
        """[k] int64, the adapter of each coefficient that `sum` and `beside` take: `owner`, or `who` where there is none."""
        return self.who if self.owner is None else self.owner

    def combine(self, w: Tensor, onto: Tensor | None = None) -> Tensor:
        """dW(w) [out, in], differentiable in w; added to `onto` [out, in] where given, in its dtype (no gradient goes there)."""
        return self.sum(w[self.picks], onto)

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        """dW(w) x for x [..., in], [..., out] in the terms' dtype; differentiable in w and in x."""
        return self.beside(x, w[self.picks])

    def sum(self, state: State, onto: Tensor | None = None) -> Tensor:
        """`combine`, of c = w[picks] or of the factors (A, B) of dW."""
        if self.kind == "dense":
            assert isinstance(state, Tensor)
            return self.terms[0].at(state, onto)
        with torch.autocast(self.who.device.type, enabled=False):
            if self.kind == "low_rank_delta":
                assert self.A is not None and self.B is not None and isinstance(state, Tensor)
                wide = wide_of(self.A)
                a, b = self.A.to(wide), self.B.to(wide) * state.to(wide)
            else:
                a, b = self._sides(state)
            if onto is None:
                return b @ a
            if onto.dtype == a.dtype == b.dtype:
                return torch.addmm(onto.detach(), b, a)
            return (onto.detach() + b @ a).to(onto.dtype)

    def beside(self, x: Tensor, state: State, onto: Tensor | None = None) -> Tensor:
        """dW x [..., out] for x [..., in], added to `onto` [..., out] where given, in its dtype; differentiable in all three.

        `state` is as for `sum`.
        """
        if self.kind == "dense":
            assert isinstance(state, Tensor)
            dtype = self.terms[0].values.dtype
            out = linear(x.to(dtype), self.sum(state).to(dtype))
            return out if onto is None else onto + out.to(onto.dtype)
        if self.kind == "low_rank_delta":
            assert self.A is not None and self.B is not None and isinstance(state, Tensor)
            a, b = self.A, self.B
            inner = linear(x.to(a.dtype), a)
            inner = (inner * state.to(wide_of(a))).to(inner.dtype)
        else:
            dtype = self.terms[0].values.dtype
            a, b = (t.to(dtype) for t in self._sides(state))
            inner = linear(x.to(dtype), a)
        if onto is None:
            return linear(inner, b)
        if onto.dtype != inner.dtype or onto.device.type not in FUSED:
            return onto + linear(inner, b).to(onto.dtype)
        return torch.addmm(onto.reshape(-1, b.shape[0]), inner.reshape(-1, b.shape[1]), b.T).view(onto.shape)

    def _sides(self, state: State) -> tuple[Tensor, Tensor]:
        """A [k, in] and B [out, k] of dW = B A."""
        if not isinstance(state, Tensor):
            return state
        if self.kind == "low_rank_factors":
            signed, root = Roots.apply(state)
            return self.terms[0].at(signed), self.terms[1].at(root)
        assert self.rebuild is not None
        core = self.terms[0].at(state)
        result = self.rebuild([core[None]])
        assert isinstance(result, LowRank)
        return result.A[0], result.B[0]


def learnable(rule: Rule | str, space: str | None = None) -> tuple[Rule, Space]:
    """The rule and its space if coefficients can be learned through it by gradients.

    Raises LoralloyError for a rule that is not entrywise, naming those that are, and for `prune=merged` where what is pruned
    would move with the coefficients in more than its mask.
    """
    found, where = check_rule(rule, space)  # type: ignore[arg-type]
    if where in found.sums:
        return found, where
    if found.acts_on != "entries" or found.name not in ENTRYWISE:
        raise LoralloyError(
            f"rule {found.name!r} cannot be learned through by gradients; {', '.join(ENTRYWISE)}, cat and svd can. The search "
            "strategy (--strategy search) takes any rule"
        )
    if found.values.get("prune") == "merged" and (where in ("knots", "core") or found.values["trim"] == "all"):
        raise LoralloyError(
            f"{found} in {where} space cannot be learned through by gradients: its bases or its limit over all modules change "
            "with the coefficients. Take prune=each, or trim=tensor in delta or factors space; the search strategy "
            "(--strategy search) takes any rule"
        )
    return found, where


def make_basis(
    bank: Bank | Sequence[Adapter],
    modules: Sequence[str] | None,
    rule: Rule | str,
    space: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | Callable[[str], torch.device] = "cpu",
    names: Sequence[str] | None = None,
    on_module: Callable[[str], None] | None = None,
) -> dict[str, Basis]:
    """The basis of each module, by name.

    Args:
        bank: the adapters.
        modules: which to make; None for all that any adapter has. (Limits over all modules, `trim=all`, count all anyway.)
        rule, space: as for `merge`.
        dtype: of the terms; None for what a merge computes in (float32, float64 for float64 adapters).
        device: where terms are made and kept, for all or by module.
        names: the order of the coefficients; None for the bank's.
        on_module: called with each module's name when it is done.

    Raises LoralloyError for a rule that cannot be learned through, unequal ranks in factors space, and what merging raises.
    """
    rule, space = learnable(rule, space)
    by_name = dict(bank.items()) if isinstance(bank, Bank) else {a.name: a for a in bank}
    parents = [by_name[n] for n in (by_name if names is None else names)]
    every = dict.fromkeys(m for p in parents for m in p)
    place = device if callable(device) else lambda _, fixed=torch.device(device): fixed
    keys = keys_of(rule, parents)
    groups = make_groups(
        every,
        len(parents),
        lambda i, m: parents[i].outline(m) if m in parents[i] else None,
        lambda i, m: 1.0,
        rule,
        space,
        "full",
    )

    def stacks(wanted: set[str] | None) -> Iterator[tuple[str, Group, Stack]]:
        for group in groups:
            for at, module in enumerate(group.modules):
                if wanted is None or module in wanted:
                    yield module, group, _stack(parents, group, at, keys, place(module))

    trims = None
    if rule.values.get("trim") == "all" and space not in rule.sums:
        trims = GlobalLimits(len(parents), rule.values["density"], place(next(iter(every))))
        for take in trims.passes():
            for module, group, stack in stacks(None):
                trims.begin([module])
                for piece in spaces.view(stack, space).pieces:
                    for t, i in enumerate(group.who):
                        for x in piece.blocks(t)():
                            take(i, x)
    result = {}
    for module, group, stack in stacks(None if modules is None else set(modules)):
        limits: list[Limits] | None = None if trims is None else [trims.keeper(i, [module]) for i in group.who]
        try:
            result[module] = _basis(stack, rule, space, limits, dtype or stack.dtype, group.who)
        except LoralloyError as error:
            raise error.within(f"module {module!r} of {', '.join(parents[i].name for i in group.who)}") from None
        if on_module:
            on_module(module)
    if modules is not None and (missing := [m for m in modules if m not in result]):
        raise LoralloyError(f"no adapter has module {missing[0]!r}")
    return {m: result[m] for m in (every if modules is None else modules)}


def _stack(
    parents: Sequence[Adapter], group: Group, at: int, keys: Callable[[int, str], int], device: torch.device
) -> Stack:
    """One module of the adapters that have it, with coefficients 1."""
    module = group.modules[at]
    found = [parents[i][module] for i in group.who]
    sixty_four = any(t.dtype == torch.float64 for f in found for t in (f.A, f.B))
    wide = torch.float64 if sixty_four else torch.float32
    scaling = torch.tensor([[row[at]] for row in group.scaling], dtype=torch.float64, device=device)
    return Stack(
        tuple(f.a.to(device, wide)[None] for f in found),
        tuple(f.b.to(device, wide)[None] for f in found),
        scaling,
        torch.ones_like(scaling),
        torch.tensor([[keys(i, module)] for i in group.who], dtype=torch.int64, device=device),
    )


def _basis(
    stack: Stack, rule: Rule, space: Space, limits: list[Limits] | None, dtype: torch.dtype, who: tuple[int, ...]
) -> Basis:
    positions = torch.tensor(who, device=stack.device)
    if space in rule.sums:
        total = stack.weighted_sum(dtype)
        owner = torch.tensor([i for i, r in zip(who, stack.ranks, strict=True) for _ in range(r)], device=stack.device)
        return Basis("low_rank_delta", stack.shape, positions, (), total.A[0], total.B[0], owner)
    seen = spaces.view(stack, space)
    terms = tuple(make_terms(piece, rule, limits, dtype) for piece in seen.pieces)
    if space == "factors":
        return Basis("low_rank_factors", stack.shape, positions, terms)
    if space == "delta":
        return Basis("dense", stack.shape, positions, terms)
    return Basis("low_rank_shared", stack.shape, positions, terms, rebuild=seen.rebuild)
