"""A weight that differs from module to module, as a request writes it: in the forms of a recipe (:mod:`loralloy.layerwise`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import layerwise
from ..errors import LoralloyError
from ..layerwise import Entry, SpecError
from ..weights import Weights

if TYPE_CHECKING:
    from ..bank import Bank

MAX_WEIGHT = 1e6
MAX_ENTRIES = 256  # with filters, in a composition
MAX_ITEMS, MAX_WORD = 4096, 400  # anchors or modules of a weight; characters of a filter or a module's name

BARE = re.compile(r"[^\W\d]\w*(?:[./-]\w+)*")


class WeightError(LoralloyError):
    """A weight by module that cannot be read, or that does not fit its adapter; `place` as ``weights.piqa[0].filter``."""

    def __init__(self, adapter: str, at: Iterable[int | str], why: str) -> None:
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{_said(step)}" for step in at)
        shown = _said(adapter if len(adapter) <= 200 else adapter[:197] + "...")
        super().__init__(f"weight of adapter {shown!r}{', ' + path.lstrip('.')[:200] if path else ''}: {why}")
        self.place = f"weights.{shown}{path}"[:400]


@dataclass(frozen=True)
class ByModule:
    """A checked specification; two that say the same are equal.

    Attributes:
        text: in the grammar, as ``[0.2, 0.8]``.
        spec: as :func:`loralloy.layerwise.coefficients` takes it: every number a float, modules in order.
        entries: those with filters.
    """

    text: str
    spec: Any = field(compare=False, repr=False)
    entries: int = field(default=0, compare=False, repr=False)

    @staticmethod
    def of(spec: Any, sign: float = 1.0) -> float | ByModule:
        """`spec`, its numbers times `sign`; a plain number stays one. Raises SpecError for a form that is none, a number beyond
        MAX_WEIGHT, too many items, a filter or a name that is too long."""
        _check_size(spec)
        parsed = layerwise.parse(spec)
        entries = 0
        if isinstance(parsed, float):
            return sign * _bounded(parsed, ())
        if isinstance(parsed, tuple):
            made: Any = [sign * _bounded(v, (n,)) for n, v in enumerate(parsed)]
        elif isinstance(parsed, dict):
            made = {m: sign * _bounded(v, (m,)) for m, v in sorted(parsed.items())}
        else:
            entries = len(parsed)
            if entries > MAX_ENTRIES:
                raise SpecError((MAX_ENTRIES,), f"a composition has at most {MAX_ENTRIES} entries with filters")
            made = [_entry(entry, n, sign) for n, entry in enumerate(parsed)]
        return ByModule(written(made), made, entries)

    def __str__(self) -> str:
        return self.text

    @property
    def constant(self) -> float | None:
        """The number that it is for all modules, if the form says so whatever the modules are: a gradient of equal anchors."""
        first = self.spec[0] if isinstance(self.spec, list) and isinstance(self.spec[0], float) else None
        return first if first is not None and all(v == first for v in self.spec) else None


def _check_size(spec: Any) -> None:
    if isinstance(spec, list | dict) and len(spec) > MAX_ITEMS:
        raise SpecError((), f"a weight by module has at most {MAX_ITEMS} items")
    for item in spec if isinstance(spec, list) else ():
        if isinstance(item, dict) and isinstance(item.get("value"), list) and len(item["value"]) > MAX_ITEMS:
            raise SpecError((), f"a gradient has at most {MAX_ITEMS} anchors")
    for name in spec if isinstance(spec, dict) else ():
        if len(name) > MAX_WORD:
            raise SpecError((), f"a module's name has at most {MAX_WORD} characters")
        _check_text(name, ())


def _entry(entry: Entry, n: int, sign: float) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if entry.filter is not None:
        if len(entry.filter) > MAX_WORD:
            raise SpecError((n, "filter"), f"a filter has at most {MAX_WORD} characters")
        _check_text(entry.filter, (n, "filter"))
        made["filter"] = entry.filter
    if entry.layers is not None:
        low, high = entry.layers
        made["layers"] = f"{low}-{high}" if high > low else str(low)
    if isinstance(entry.value, float):
        made["value"] = sign * _bounded(entry.value, (n, "value"))
    else:
        made["value"] = [sign * _bounded(v, (n, "value", k)) for k, v in enumerate(entry.value)]
    return made


def _check_text(text: str, at: tuple[int | str, ...]) -> None:
    """JSON can write halves of surrogate pairs, of which no text is made, so no answer could say them back."""
    if _said(text) != text:
        raise SpecError(at, f"{text!r} has half a character (a lone surrogate)")


def _said(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _bounded(value: float, at: tuple[int | str, ...]) -> float:
    if abs(value) > MAX_WEIGHT:
        raise SpecError(at, f"{value:g} is too large; weights go up to {MAX_WEIGHT:g}")
    return value


def written(spec: Any) -> str:
    """A specification as the grammar reads it."""
    if isinstance(spec, Mapping):
        return "{" + ", ".join(f"{word(k)}: {written(v)}" for k, v in spec.items()) + "}"
    if isinstance(spec, list):
        return "[" + ", ".join(map(written, spec)) + "]"
    return word(spec) if isinstance(spec, str) else repr(spec)


def word(text: str) -> str:
    """A word as the grammar reads it: in quotes where it would not be read back."""
    return text if BARE.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def weights_of(bank: Bank, terms: Iterable[tuple[str, float | ByModule]]) -> Weights:
    """The weights that terms mean for adapters of a bank; a gradient's first and last layer are those of all of them, as in
    a recipe. Raises WeightError for filters and modules that an adapter has not, LoralloyError for no terms."""
    terms = list(terms)
    among: dict[str, None] = {}
    if any(isinstance(value, ByModule) for _, value in terms):
        among = dict.fromkeys(module for name, _ in terms for module in bank[name])
    found: dict[str, Any] = {}
    for name, value in terms:
        if not isinstance(value, ByModule):
            found[name] = value
            continue
        try:
            each = layerwise.coefficients(value.spec, bank[name], among)
        except SpecError as error:
            raise WeightError(name, error.at, str(error)) from None
        assert isinstance(each, dict)
        # what is one number everywhere is the plain weight, and has its key
        found[name] = next(iter(each.values())) if len(set(each.values())) == 1 else each
    return Weights(found)
