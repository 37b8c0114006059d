"""The composition grammar: what a request's `model` may say besides an adapter's name.

    composition = choice [ "@" rule ]
    choice      = "auto" | "base" | [ sign ] term { sign term }
    term        = [ number "*" ] name
    rule        = word [ "(" [ word "=" value { "," word "=" value } ] ")" ]
    name        = letters, digits, "_", and single ".", "-", "/" between them | '"' any text, \\" and \\\\ escaped '"'
    value       = [ sign ] number | word

``auto`` asks the router; ``base`` is the base model alone; a quoted name is always an adapter's. Besides the rule's own
parameters, `space` and `rank` may be given: ``0.6*piqa + 0.4*csqa @ ties(density=0.2, space=delta, rank=16)``. A minus
touches the name after it (``a -b``) or stands free (``a - b``): ``a-b`` is one name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import LoralloyError
from ..merging import Rule, get_rule
from ..merging.engine import Rank

AUTO, BASE = "auto", "base"
MAX_LENGTH, MAX_TERMS, MAX_WEIGHT = 32768, 1024, 1e6

_AROUND = len(" + ") + len("1.17549435e-38*")  # characters of a term, at most, besides its name

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    | (?P<name>[^\W\d]\w*(?:[./-]\w+)*)
    | "(?P<quoted>(?:[^"\\]|\\["\\])*)"
    | (?P<sign>[*+@(),=-])
    | (?P<end>\Z)
    | (?P<other>.)
    )""",
    re.VERBOSE | re.DOTALL,
)
_BARE = re.compile(r"[^\W\d]\w*(?:[./-]\w+)*")


class GrammarError(LoralloyError):
    """A composition that cannot be read; `position` counts its characters from 0."""

    def __init__(self, text: str, position: int, why: str) -> None:
        shown = text if len(text) <= 80 else text[:77] + "..."
        super().__init__(f"composition {shown!r}, character {position + 1}: {why}")
        self.position = position


@dataclass(frozen=True)
class Composition:
    """A composition as it was asked for, before any bank has been seen. ``str()`` gives its one canonical text.

    Attributes:
        terms: (adapter, weight), in the order given; empty for the base model alone, and under `auto`.
        auto: the router chooses the terms.
        rule, arguments: the rule's name and the parameters given, by name, checked against the rule.
        space, rank: None for the rule's default.
    """

    terms: tuple[tuple[str, float], ...] = ()
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
    def live(self) -> bool:
        """Whether it is a weighted sum of dW, which needs no merge: `linear` and `cat` in delta space, not cut."""
        return self.rule in ("linear", "cat") and self.space in (None, "delta") and self.rank in (None, "full")

    def __str__(self) -> str:
        given = [*self.arguments, *((k, v) for k, v in (("space", self.space), ("rank", self.rank)) if v is not None)]
        inner = ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in given)
        rule = f" @ {self.rule}({inner})" if inner else f" @ {self.rule}" if self.rule != "linear" else ""
        return (AUTO if self.auto else said_terms(self.terms)) + rule


def said_terms(terms: Iterable[tuple[str, float]]) -> str:
    """``0.6*piqa - csqa``; names are quoted where they would not be read back."""
    text = ""
    for name, weight in terms:
        negative = math.copysign(1, weight) < 0
        sign = ("-" if negative else "") if not text else " - " if negative else " + "
        text += sign + ("" if abs(weight) == 1 else f"{abs(weight)!r}*") + quoted(name)
    return text or BASE


def quoted(name: str) -> str:
    """An adapter's name as the grammar reads it."""
    if _BARE.fullmatch(name) and name not in (AUTO, BASE):
        return name
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def with_terms(asked: Composition, weights: Iterable[tuple[str, float]]) -> Composition:
    """`asked`, an ``auto``, with routed weights in their order; the base model alone where none is left.

    Its text is one that :func:`parse` takes: where the terms would be more than MAX_TERMS, or the text longer than
    MAX_LENGTH, the smallest go, and the others are scaled to the sum that all had, as the router's nucleus does. Each weight
    is the number of fewest digits with its float32: the text stays short, and reads back as the same composition.
    """
    terms = tuple((name, w) for name, w in weights if w)
    if len(terms) > MAX_TERMS or len(str(_shortened(asked, terms))) > MAX_LENGTH:
        terms = _fitting(asked, terms)
    return _shortened(asked, terms)


def _shortened(asked: Composition, terms: Iterable[tuple[str, float]]) -> Composition:
    short = tuple((name, w) for name, value in terms if (w := float(str(np.float32(value)))))
    return replace(asked, auto=False, terms=short) if short else Composition()


def _fitting(asked: Composition, terms: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    """The largest terms that the grammar takes together, in the order given, with the sum that all had (weights below 0
    have no mass to share out: with them the others stay as they are)."""
    room = MAX_LENGTH - len(str(replace(asked, auto=False, terms=())))
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


def canonical(asked: Composition) -> Composition:
    """One composition for all that ask for one merge: terms by name, and nothing said that holds anyway."""
    rule = get_rule(asked.rule)
    given = tuple((k, v) for k, v in asked.arguments if v != rule.values[k])
    space = None if asked.space == rule.spaces[0] else asked.space
    return replace(asked, terms=tuple(sorted(asked.terms)), arguments=given, space=space)


def parse(text: str) -> Composition:
    """Read a composition. Raises GrammarError with the position of what is wrong and what was expected there."""
    if len(text) > MAX_LENGTH:
        raise GrammarError(text, MAX_LENGTH, f"a composition has at most {MAX_LENGTH} characters")
    return _Parser(text).composition()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.next()

    def next(self) -> None:
        found = _TOKEN.match(self.text, self.at)
        assert found is not None and found.lastgroup is not None  # `other` takes what nothing else does
        self.kind, self.value = found.lastgroup, found[found.lastgroup]
        self.start = found.start(self.kind) - (self.kind == "quoted")
        self.at = found.end()
        if self.kind == "other":
            why = "the quoted name does not end" if self.value == '"' else f"{self.value!r} has no meaning here"
            raise self.error(why)

    def error(self, why: str, at: int | None = None) -> GrammarError:
        return GrammarError(self.text, self.start if at is None else at, why)

    def expected(self, what: str) -> GrammarError:
        found = "the end" if self.kind == "end" else repr(self.value)
        return self.error(f"expected {what}, found {found}")

    def sees(self, sign: str) -> bool:
        return self.kind == "sign" and self.value == sign

    def composition(self) -> Composition:
        if self.kind == "name" and self.value in (AUTO, BASE):
            made = Composition(auto=self.value == AUTO)
            self.next()
        else:
            made = Composition(self.terms())
        if self.sees("@"):
            if not (made.auto or made.terms):
                raise self.error("base is the model alone; a rule has nothing to combine there")
            self.next()
            made = self.rule(made)
        if self.kind != "end":
            raise self.expected("the end" if made.rule != "linear" else "'+', '-', '@' or the end")
        return made

    def terms(self) -> tuple[tuple[str, float], ...]:
        terms: dict[str, float] = {}
        sign = 1.0
        if self.sees("+") or self.sees("-"):
            sign = self.sign()
        while True:
            start, weight = self.start, sign
            if self.kind == "number":
                weight *= self.number()
                if not self.sees("*"):
                    raise self.expected("'*' and an adapter's name")
                self.next()
            if self.kind == "name" and self.value in (AUTO, BASE):
                raise self.error(f"{self.value} stands alone, without weights; quote it if it is an adapter's name")
            if self.kind not in ("name", "quoted"):
                raise self.expected(
                    "an adapter's name" if terms or self.start > start else "an adapter's name or a weight"
                )
            name = re.sub(r'\\(["\\])', r"\1", self.value) if self.kind == "quoted" else self.value
            if not name:
                raise self.error("the name is empty")
            if name in terms:
                raise self.error(f"adapter {name!r} is named twice; add its weights up")
            terms[name] = weight
            if len(terms) > MAX_TERMS:
                raise self.error(f"a composition has at most {MAX_TERMS} adapters")
            self.next()
            if not (self.sees("+") or self.sees("-")):
                return tuple(terms.items())
            sign = self.sign()

    def sign(self) -> float:
        value = -1.0 if self.value == "-" else 1.0
        self.next()
        return value

    def number(self) -> float:
        value = float(self.value)
        if value > MAX_WEIGHT:
            raise self.error(f"{self.value} is too large; weights go up to {MAX_WEIGHT:g}")
        self.next()
        return value

    def rule(self, made: Composition) -> Composition:
        start = self.start
        if self.kind != "name":
            raise self.expected("a rule's name")
        name = self.value
        try:
            rule = get_rule(name)
        except LoralloyError as error:
            raise self.error(str(error)) from None
        self.next()
        made = replace(made, rule=name)
        seen: set[str] = set()
        if self.sees("("):
            self.next()
            while not self.sees(")"):
                made = self.argument(made, rule, seen)
                if self.sees(","):
                    self.next()
                    if self.sees(")"):
                        raise self.expected("a parameter")
                elif not self.sees(")"):
                    raise self.expected("',' or ')'")
            self.next()
        if made.space is not None:
            try:
                rule.check_space(made.space)
            except LoralloyError as error:
                raise self.error(str(error).replace("--space ", "space="), start) from None
        return replace(made, arguments=tuple(sorted(made.arguments)))

    def argument(self, made: Composition, rule: Rule, seen: set[str]) -> Composition:
        start, key = self.start, self.value
        if self.kind != "name":
            raise self.expected("a parameter")
        if key in seen:
            raise self.error(f"{key} is given twice")
        seen.add(key)
        self.next()
        if not self.sees("="):
            raise self.expected("'='")
        self.next()
        at, value = self.start, self.literal()
        if key == "space":
            return replace(made, space=str(value))
        if key == "rank":
            if value not in ("max", "full") and not (type(value) is int and 1 <= value <= 65536):
                raise self.error(f"rank {value} is not valid; give a positive whole number, max or full", at)
            return replace(made, rank=value)  # type: ignore[arg-type]
        if key not in rule.parameters:
            has = ", ".join([*rule.parameters, "space", "rank"])
            raise self.error(f"{rule.name} has no parameter {key!r}; it has {has}", start)
        try:
            checked = rule.parameters[key].check(value, rule.name)
        except LoralloyError as error:
            raise self.error(str(error), at) from None
        return replace(made, arguments=(*made.arguments, (key, checked)))

    def literal(self) -> bool | int | float | str:
        """A parameter's value: true, false, a word, a number."""
        sign = self.sign() if self.sees("-") or self.sees("+") else None
        if self.kind == "number":
            text = self.value
            self.next()
            whole = text.isdigit() and len(text) <= 18
            value = int(text) if whole else float(text)
            return value if sign != -1.0 else -value
        if self.kind != "name" or sign is not None:
            raise self.expected("a number" if sign is not None else "a value")
        word = self.value
        self.next()
        return {"true": True, "false": False}.get(word, word)
