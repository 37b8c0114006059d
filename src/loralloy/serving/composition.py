"""Compositions as plain data, and the one text that each of them has in the grammar (see :mod:`.grammar`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from ..errors import LoralloyError
from ..layerwise import SpecError
from ..merging import Rule, get_rule
from ..merging.engine import Rank
from ..merging.plan import check_rank
from .by_module import MAX_ENTRIES, ByModule, WeightError, word

Weight: TypeAlias = "float | ByModule"
AUTO, BASE = "auto", "base"
MAX_TERMS = 1024
MAX_ROUTED = 32768  # characters of a routed composition

_AROUND = len(" + ") + len("1.17549435e-38*")  # characters of a term, at most, besides its name


@dataclass(frozen=True)
class Composition:
    """A composition as it was asked for, before any bank has been seen. ``str()`` gives its one canonical text.

    Attributes:
        terms: (adapter, weight), in the order given; empty for the base model alone, and under `auto`. A weight is a number,
            or what it is by module.
        auto: the router chooses the terms.
        rule, arguments: the rule's name and the parameters given, by name, checked against the rule.
        space, rank: None for the rule's default.
    """

    terms: tuple[tuple[str, Weight], ...] = ()
    auto: bool = False
    rule: str = "linear"
    arguments: tuple[tuple[str, Any], ...] = ()
    space: str | None = None
    rank: Rank | None = None

    @property
    def bound(self) -> Rule:
        """The rule with its parameters."""
        return get_rule(self.rule)(**dict(self.arguments))

    @property
    def by_module(self) -> dict[str, ByModule]:
        """The weights that differ from module to module."""
        return {name: value for name, value in self.terms if isinstance(value, ByModule)}

    @property
    def size(self) -> int:
        """Characters, about: what reading it takes grows with them."""
        return sum(len(name) + (len(w.text) if isinstance(w, ByModule) else 8) for name, w in self.terms)

    @property
    def live(self) -> bool:
        """Whether it is a weighted sum of dW, which needs no merge: `linear` and `cat` in delta space, not cut."""
        return self.rule in ("linear", "cat") and self.space in (None, "delta") and self.rank in (None, "full")

    def __str__(self) -> str:
        given = [*self.arguments, *((k, v) for k, v in (("space", self.space), ("rank", self.rank)) if v is not None)]
        inner = ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in given)
        rule = f" @ {self.rule}({inner})" if inner else f" @ {self.rule}" if self.rule != "linear" else ""
        return (AUTO if self.auto else said_terms(self.terms)) + rule


def said_terms(terms: Iterable[tuple[str, Weight]]) -> str:
    """``0.6*piqa - csqa``; names are quoted where they would not be read back."""
    text = ""
    for name, weight in terms:
        if isinstance(weight, ByModule):
            text += f"{' + ' if text else ''}{weight}*{quoted(name)}"
            continue
        negative = math.copysign(1, weight) < 0
        sign = ("-" if negative else "") if not text else " - " if negative else " + "
        text += sign + ("" if abs(weight) == 1 else f"{abs(weight)!r}*") + quoted(name)
    return text or BASE


def quoted(name: str) -> str:
    """An adapter's name as the grammar reads it."""
    return f'"{name}"' if name in (AUTO, BASE) else word(name)


def with_terms(asked: Composition, weights: Iterable[tuple[str, float]]) -> Composition:
    """`asked`, an ``auto``, with routed weights in their order; the base model alone where none is left.

    Its text is one that :func:`parse` takes: where the terms would be more than MAX_TERMS, or the text longer than
    MAX_ROUTED, the smallest go, and the others are scaled to the sum that all had, as the router's nucleus does. Each weight
    is the number of fewest digits with its float32: the text stays short, and reads back as the same composition.
    """
    terms = tuple((name, w) for name, w in weights if w)
    if len(terms) > MAX_TERMS or len(str(_shortened(asked, terms))) > MAX_ROUTED:
        terms = _fitting(asked, terms)
    return _shortened(asked, terms)


def _shortened(asked: Composition, terms: Iterable[tuple[str, float]]) -> Composition:
    short = tuple((name, w) for name, value in terms if (w := float(str(np.float32(value)))))
    return replace(asked, auto=False, terms=short) if short else Composition()


def _fitting(asked: Composition, terms: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    """The largest terms that the grammar takes together, in the order given, with the sum that all had (weights below 0
    have no mass to share out: with them the others stay as they are)."""
    room = MAX_ROUTED - len(str(replace(asked, auto=False, terms=())))
    kept: set[str] = set()
    for name, _ in sorted(terms, key=lambda term: -abs(term[1]))[:MAX_TERMS]:
        room -= len(quoted(name)) + _AROUND
        if room < 0:
            break
        kept.add(name)
    most = [(name, w) for name, w in terms if name in kept]
    share = 1.0
    if most and all(w > 0 for _, w in terms):
        share = math.fsum(w for _, w in terms) / math.fsum(w for _, w in most)
    return tuple((name, w * share) for name, w in most)


def from_fields(
    weights: Mapping[str, Any], rule: str | Mapping[str, Any] = "linear", space: str | None = None, rank: Any = None
) -> Composition:
    """A composition from fields as a recipe has them: each adapter's weight in any form of :mod:`loralloy.layerwise`, `rule` a
    name or ``{"name": "ties", "density": 0.2}``.

    Raises WeightError for a weight, LoralloyError for a rule, parameter, space or rank that is not valid.
    """
    terms = []
    for name, value in weights.items():
        try:
            terms.append((name, ByModule.of(value)))
        except SpecError as error:
            raise WeightError(name, error.at, str(error)) from None
    if sum(w.entries for _, w in terms if isinstance(w, ByModule)) > MAX_ENTRIES:
        raise LoralloyError(f"weights: a composition has at most {MAX_ENTRIES} entries with filters")
    if not terms or not all(weights):
        raise LoralloyError("weights: the name is empty" if terms else "weights are empty; name at least one adapter")
    given: dict[str, Any] = {"name": rule} if isinstance(rule, str) else dict(rule)
    if not isinstance(name := given.pop("name", None), str):
        raise LoralloyError('rule: give a name, or its parameters too, as {"name": "ties", "density": 0.2}')
    bound = get_rule(name)(**given)
    space = None if space is None else bound.check_space(space)  # type: ignore[arg-type]
    return Composition(
        tuple(terms),
        False,
        bound.name,
        tuple(sorted(bound.given.items())),
        space,
        None if rank is None else check_rank(rank),
    )


def canonical(asked: Composition) -> Composition:
    """One composition for all that ask for one merge: terms by name, and nothing said that holds anyway."""
    rule = get_rule(asked.rule)
    given = tuple((k, v) for k, v in asked.arguments if v != rule.values[k])
    space = None if asked.space == rule.spaces[0] else asked.space
    terms = [(name, v if not isinstance(v, ByModule) or v.constant is None else v.constant) for name, v in asked.terms]
    return replace(asked, terms=tuple(sorted(terms, key=lambda term: term[0])), arguments=given, space=space)
