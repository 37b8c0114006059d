"""The composition grammar: what a request's `model` may say besides an adapter's name.

    composition = choice [ "@" rule ]
    choice      = "auto" | "base" | [ sign ] term { sign term }
    term        = [ weight "*" ] name
    weight      = number | "[" item { "," item } "]" | "{" word ":" item { "," word ":" item } "}"
    item        = [ sign ] number | word | weight
    rule        = word [ "(" [ word "=" value { "," word "=" value } ] ")" ]
    word, name  = letters, digits, "_", and single ".", "-", "/" between them | '"' any text, \\" and \\\\ escaped '"'
    value       = [ sign ] number | word

A weight by module has the forms of a recipe (:mod:`loralloy.layerwise`): ``[0.2, 0.8]*piqa`` is a gradient from the first
layer to the last, ``[{filter: q_proj, value: 0.9}, {value: 0.2}]*piqa`` has filters, ``{"*": 0.3, lm_head: 0}*piqa`` modules.
``auto`` asks the router; ``base`` is the base model alone; a quoted name is always an adapter's. Besides the rule's own
parameters, `space` and `rank` may be given: ``0.6*piqa + 0.4*csqa @ ties(density=0.2, space=delta, rank=16)``. A minus
touches the name after it (``a -b``) or stands free (``a - b``): ``a-b`` is one name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..errors import LoralloyError
from ..layerwise import SpecError
from ..merging import Rule, get_rule
from .by_module import MAX_ENTRIES, MAX_WEIGHT, ByModule
from .composition import AUTO, BASE, MAX_TERMS, Composition, Weight, canonical, quoted, said_terms, with_terms

__all__ = [
    "AUTO", "BASE", "MAX_LENGTH", "MAX_TERMS", "MAX_WEIGHT", "Composition", "GrammarError", "Weight", "canonical", "parse",
    "quoted", "said_terms", "with_terms",
]  # fmt: skip

MAX_LENGTH = 1 << 18
_DEEPEST, _LONGEST = 4, 2000

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    | (?P<name>[^\W\d]\w*(?:[./-]\w+)*)
    | "(?P<quoted>(?:[^"\\]|\\["\\])*)"
    | (?P<sign>[*+@(),=:{}\[\]-])
    | (?P<end>\Z)
    | (?P<other>.)
    )""",
    re.VERBOSE | re.DOTALL,
)


class GrammarError(LoralloyError):
    """A composition that cannot be read; `position` counts its characters from 0."""

    def __init__(self, text: str, position: int, why: str) -> None:
        shown = text if len(text) <= 80 else text[:77] + "..."
        why = why if len(why) <= _LONGEST else why[: _LONGEST - 3] + "..."  # it may quote the text
        super().__init__(f"composition {shown!r}, character {position + 1}: {why}")
        self.position = position


def parse(text: str) -> Composition:
    """Read a composition. Raises GrammarError with the position of what is wrong and what was expected there."""
    if len(text) > MAX_LENGTH:
        raise GrammarError(text, MAX_LENGTH, f"a composition has at most {MAX_LENGTH} characters")
    made = _Parser(text).composition()
    # it is said back, and asked for again, as its canonical text: [1,1] is [1.0, 1.0] there, 1e6* is 1000000.0*
    if len(text) > MAX_LENGTH // 4 and len(str(made)) > MAX_LENGTH:
        raise GrammarError(
            text, 0, f"written out, with all digits and blanks, it has more than {MAX_LENGTH} characters"
        )
    return made


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.entries = text, 0, 0
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

    def terms(self) -> tuple[tuple[str, Weight], ...]:
        terms: dict[str, Weight] = {}
        sign = 1.0
        if self.sees("+") or self.sees("-"):
            sign = self.sign()
        while True:
            start, weight = self.start, self.weight(sign)
            if self.start > start:
                if not self.sees("*"):
                    raise self.expected("'*' and an adapter's name")
                self.next()
            if self.kind == "name" and self.value in (AUTO, BASE):
                raise self.error(f"{self.value} stands alone, without weights; quote it if it is an adapter's name")
            if self.kind not in ("name", "quoted"):
                raise self.expected(
                    "an adapter's name" if terms or self.start > start else "an adapter's name or a weight"
                )
            at, name = self.start, self.word("an adapter's name")
            if not name:
                raise self.error("the name is empty", at)
            if name in terms:
                raise self.error(f"adapter {name!r} is named twice; add its weights up", at)
            terms[name] = weight
            if len(terms) > MAX_TERMS:
                raise self.error(f"a composition has at most {MAX_TERMS} adapters", at)
            if not (self.sees("+") or self.sees("-")):
                return tuple(terms.items())
            sign = self.sign()

    def weight(self, sign: float) -> Weight:
        """What stands before a name, times `sign`; nothing is 1."""
        if self.kind == "number":
            return sign * self.number()
        if not (self.sees("[") or self.sees("{")):
            return sign
        places: dict[tuple[int | str, ...], int] = {}
        try:
            made = ByModule.of(self.item((), places), sign)
        except SpecError as error:
            at = error.at
            while at not in places:  # what is missing stands nowhere
                at = at[:-1]
            raise self.error(str(error), places[at]) from None
        assert isinstance(made, ByModule)
        self.entries += made.entries
        if self.entries > MAX_ENTRIES:
            raise self.error(f"a composition has at most {MAX_ENTRIES} entries with filters", places[()])
        return made

    def item(self, at: tuple[int | str, ...], places: dict[tuple[int | str, ...], int]) -> Any:
        """A part of a weight by module; `places` gets where each stands."""
        places[at] = self.start
        if len(at) > _DEEPEST:
            raise self.error("the weight is nested too deeply")
        if self.sees("["):
            items: list[Any] = []
            self.next()
            while not self.sees("]"):
                items.append(self.item((*at, len(items)), places))
                self.comma("]")
            self.next()
            return items
        if self.sees("{"):
            fields: dict[str, Any] = {}
            self.next()
            while not self.sees("}"):
                start, key = self.start, self.word("a field, or a module's name")
                if key in fields:
                    raise self.error(f"{key!r} is given twice", start)
                if not self.sees(":"):
                    raise self.expected("':'")
                self.next()
                fields[key] = self.item((*at, key), places)
                self.comma("}")
            self.next()
            return fields
        sign = self.sign() if self.sees("-") or self.sees("+") else None
        if self.kind == "number":
            layer = sign is None and self.value.isdigit()  # a whole number may be one
            value = self.number() * (sign or 1.0)
            return int(value) if layer else value
        if sign is not None:
            raise self.expected("a number")
        return self.word("a number, '[', '{' or a word")

    def comma(self, end: str) -> None:
        """After an item: a comma and another, or the end."""
        if self.sees(","):
            self.next()
            if self.sees(end):
                raise self.expected("another after the comma")
        elif not self.sees(end):
            raise self.expected(f"',' or {end!r}")

    def word(self, what: str) -> str:
        """A name, bare or in quotes."""
        if self.kind not in ("name", "quoted"):
            raise self.expected(what)
        value = re.sub(r'\\(["\\])', r"\1", self.value) if self.kind == "quoted" else self.value
        self.next()
        return str(value)

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
