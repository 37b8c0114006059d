"""Weights by module, written short: a number, a gradient over the layers, or filters on module names.

The conventions are those of mergekit's YAML, so that people who know it need not learn another: the first entry whose
filter matches wins, and a list of numbers is spread evenly over the layers and interpolated between.
"""

from __future__ import annotations

import contextlib
import math
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from functools import lru_cache
from typing import Any, TypeAlias

from .errors import LoralloyError

Gradient: TypeAlias = tuple[float, ...]
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_FORMS = "a number, a list of numbers (a gradient), a list of {filter: ..., value: ...}, or {module: number}"
_FIELDS = ("filter", "layers", "value")
GRANULARITIES = ("adapter", "layer", "module")


class SpecError(LoralloyError):
    """What is wrong with a specification; `at` is the way to it: list indices and field names."""

    def __init__(self, at: tuple[int | str, ...], message: str) -> None:
        super().__init__(message)
        self.at = at


@dataclass(frozen=True)
class Entry:
    """One line of a filtered specification. Without `filter` and `layers` it is the default."""

    value: float | Gradient
    filter: str | None = None
    layers: tuple[int, int] | None = None

    def takes(self, module: str) -> bool:
        layer = layer_of(module)
        within = self.layers is None or (layer is not None and self.layers[0] <= layer <= self.layers[1])
        return within and (self.filter is None or matches(self.filter, module))

    def __str__(self) -> str:
        parts = [f"filter {self.filter!r}"] if self.filter is not None else []
        if self.layers:
            low, high = self.layers
            parts.append(f"layers {low}" + (f"-{high}" if high > low else ""))
        return " in ".join(parts) or "the default"


Parsed: TypeAlias = "float | Gradient | list[Entry] | dict[str, float]"


def layer_of(module: str) -> int | None:
    """The layer that a module belongs to: the first number between dots in its name; None if there is none.

    ``model.layers.3.mlp.experts.7.w1`` is of layer 3, ``lm_head`` of none.
    """
    match = _LAYER.search(module)
    return int(match[1]) if match else None


def group_of(module: str, granularity: str) -> str:
    """What a module shares its weight with, by one of GRANULARITIES: "" for all modules, its layer, or itself.

    A layer is called by all up to and with the first number, so that an encoder's third is not the decoder's; a module
    without a number is a layer of its own.
    """
    if granularity == "adapter":
        return ""
    match = _LAYER.search(module) if granularity == "layer" else None
    return module[: match.end(1)] if match else module


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern means a module: a part of its name, or with ``*``, ``?`` or ``[`` a glob over the whole name."""
    return _glob(pattern).match(module) is not None if any(c in pattern for c in "*?[") else pattern in module


@lru_cache(maxsize=256)
def _glob(pattern: str) -> re.Pattern[str]:
    # fnmatch's own functions keep 32,768 patterns: a server would keep what its clients make up
    return re.compile(translate(pattern))


def parse(spec: Any) -> Parsed:
    """Check a specification's form. Raises SpecError with the place, what stands there, and what is allowed."""
    if isinstance(spec, Mapping):
        if set(spec) & {"filter", "value", "layers"}:
            raise SpecError((), "an entry with `filter`, `layers` or `value` stands in a list; put `- ` before it")
        if not spec:
            raise SpecError((), f"the weight is empty; give {_FORMS}")
        return {str(module): _number(value, (module,)) for module, value in spec.items()}
    if not _is_list(spec):
        return _number(spec, (), _FORMS)
    if not any(isinstance(item, Mapping) for item in spec):
        return _gradient(spec, ())
    entries = [_entry(item, (n,)) for n, item in enumerate(spec)]
    for n, entry in enumerate(entries[:-1]):
        if entry.filter is None and entry.layers is None:
            raise SpecError(
                (n,), "this entry has no filter, so it takes every module and those after it none; put it last"
            )
    return entries


def coefficients(spec: Any, modules: Iterable[str], among: Collection[str] | None = None) -> float | dict[str, float]:
    """The weight of every module under a specification: a number as it is, anything else as ``{module: weight}``.

    - a number: for every module;
    - a list of numbers: a gradient. Its anchors are spread evenly from the first layer to the last; between two of them a
      layer's weight is interpolated linearly. Each stack of layers (encoder and decoder, vision and language) has its own
      first and last. A module without a layer number takes the first anchor if it is an embedding, else the last, as
      what stands before and after the layers;
    - a list of ``{"filter": text, "layers": "0-11", "value": number or gradient}``: the first entry that takes a module
      decides. `filter` is a part of the module's name, or a glob over all of it (``*.mlp.*``); `layers` one layer or a range,
      both ends included; an entry with neither is the default and stands last;
    - ``{module: number}``: by full name; ``"*"`` is for the rest, which else takes 0 (as in a weights file).

    Args:
        spec: the specification.
        modules: the modules of the adapter.
        among: the modules that say which layers are the first and the last (those of every adapter in a merge); `modules` if
            not given.

    Raises SpecError (a LoralloyError) for a form that is not one of these, a filter or name that no module answers to, an entry
    that is never reached, and modules that no entry takes.
    """
    parsed = parse(spec)
    if isinstance(parsed, float):
        return parsed
    modules = list(modules)
    if isinstance(parsed, dict):
        there = set(modules)
        for name in parsed:
            if name != "*" and name not in there:
                raise SpecError((name,), f"there is no module {name!r} in the adapter{close(name, modules)}")
        return {m: parsed.get(m, parsed.get("*", 0.0)) for m in modules}
    spans = _spans(modules if among is None else among)
    if isinstance(parsed, tuple):
        return {m: _at(parsed, m, spans) for m in modules}
    result: dict[str, float] = {}
    for n, entry in enumerate(parsed):
        taken = [m for m in modules if entry.takes(m)]
        if not taken and (entry.filter is not None or entry.layers is not None):
            raise SpecError((n,), _nothing(entry, modules))
        fresh = [m for m in taken if m not in result]
        if taken and not fresh:
            raise SpecError(
                (n,), f"{entry} is never reached: entries before it take all its modules; put it before them"
            )
        result |= {m: entry.value if isinstance(entry.value, float) else _at(entry.value, m, spans) for m in fresh}
    left = [m for m in modules if m not in result]
    if left:
        raise SpecError(
            (),
            f"no entry takes module {left[0]!r}{_others(len(left) - 1)}; end the list with a default, `- value: 0`, say",
        )
    return {m: result[m] for m in modules}


def select(modules: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The modules that some pattern of `include` means (all, without one) and no pattern of `exclude` does.

    Patterns are those of :func:`matches`. Raises SpecError for one that no module answers to, or if none is left.
    """
    modules = list(modules)
    for field, patterns in (("include", include), ("exclude", exclude)):
        for n, pattern in enumerate(patterns):
            if not any(matches(pattern, m) for m in modules):
                raise SpecError((field, n), f"no module answers to {pattern!r}{close(pattern, modules)}")
    kept = [
        m
        for m in modules
        if (not include or any(matches(p, m) for p in include)) and not any(matches(p, m) for p in exclude)
    ]
    if not kept:
        raise SpecError((), "no module is left; exclude fewer")
    return kept


def close(name: str, modules: Collection[str]) -> str:
    """``; close names: ...``: the modules, or parts of module names, that resemble one that is not there."""
    parts = dict.fromkeys(part for m in modules for part in m.split(".") if not part.isdigit())
    bare = re.sub(r"[*?\[\]]+", "", name).strip(".")
    near = get_close_matches(bare.split(".")[-1], parts, 3, 0.6)
    whole = [m for m in modules if near and m.split(".")[-1] == near[0]] if "." in bare else []
    found = get_close_matches(bare, whole, 1, 0.5) or near
    if found:
        return "; close names: " + ", ".join(found)
    return "; module names look like " + ", ".join(list(modules)[:2]) if modules else ""


def _entry(item: Any, at: tuple[int | str, ...]) -> Entry:
    if not isinstance(item, Mapping):
        raise SpecError(
            at, f"{shown(item)} stands among entries; write `value: {shown(item)}`, or a list of numbers alone"
        )
    for name in item:
        if name not in _FIELDS:
            near = get_close_matches(str(name), _FIELDS, 1)
            hint = f" (did you mean `{near[0]}`?)" if near else ""
            raise SpecError((*at, name), f"unknown field{hint}; known here: {', '.join(_FIELDS)}")
    if "value" not in item:
        raise SpecError(at, "this entry has no `value`; give it a number or a list of numbers")
    pattern = item.get("filter")
    if "filter" in item and not (isinstance(pattern, str) and pattern):
        raise SpecError(
            (*at, "filter"), f"{shown(pattern)} is not a part of a module's name; give text such as self_attn"
        )
    value = item["value"]
    place = (*at, "value")
    return Entry(
        _gradient(value, place) if _is_list(value) else _number(value, place, "a number or a list of numbers"),
        pattern,
        _layers(item["layers"], (*at, "layers")) if "layers" in item else None,
    )


def _layers(value: Any, at: tuple[int | str, ...]) -> tuple[int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", value) if isinstance(value, str) else None
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise SpecError(at, f"{shown(value)} is not a range of layers; give one (7) or first-last (0-11)")
    return int(match[1]), int(match[2] or match[1])


def _gradient(value: Sequence[Any], at: tuple[int | str, ...]) -> Gradient:
    if not value:
        raise SpecError(at, "the gradient is empty; give at least one number")
    return tuple(_number(v, (*at, n)) for n, v in enumerate(value))


def _number(value: Any, at: tuple[int | str, ...], allowed: str = "a number") -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number that no float holds
            if math.isfinite(value):
                return float(value)
        allowed = allowed.replace("a number", "a finite number", 1)
    hint = ""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            hint = f" (it is text here, as YAML reads 1e-3 and 'quoted' numbers; write {float(value)!r})"
    raise SpecError(at, f"{shown(value)} is not a weight{hint}; give {allowed}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _spans(modules: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The first and the last layer of each stack; a stack is what stands before the layer's number."""
    spans: dict[str, tuple[int, int]] = {}
    for module in modules:
        if match := _LAYER.search(module):
            layer, stack = int(match[1]), module[: match.start(1)]
            low, high = spans.get(stack, (layer, layer))
            spans[stack] = (min(low, layer), max(high, layer))
    return spans


def _at(gradient: Gradient, module: str, spans: Mapping[str, tuple[int, int]]) -> float:
    match = _LAYER.search(module)
    if match is None:
        return gradient[0] if re.search(r"emb|(^|\.)wte($|\.)|(^|\.)wpe($|\.)", module.lower()) else gradient[-1]
    layer = int(match[1])
    low, high = spans.get(module[: match.start(1)], (layer, layer))
    place = (len(gradient) - 1) * (layer - low) / (high - low) if high > low else 0.0
    left = min(int(place), len(gradient) - 1)
    right = min(left + 1, len(gradient) - 1)
    return gradient[left] + (place - left) * (gradient[right] - gradient[left])


def _nothing(entry: Entry, modules: Sequence[str]) -> str:
    layers = sorted({layer for m in modules if (layer := layer_of(m)) is not None})
    if entry.filter is not None and not any(matches(entry.filter, m) for m in modules):
        return f"filter {entry.filter!r} takes no module of the adapter{close(entry.filter, modules)}"
    there = f"its layers are {layers[0]} to {layers[-1]}" if layers else "its modules have no layer numbers"
    return f"{entry} takes no module of the adapter; {there}"


def _others(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)
