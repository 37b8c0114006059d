"""The fields of a recipe, and what is said about one that is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..layerwise import shown
from .document import Problem

# What people who come from mergekit or PEFT write first.
_MEANT = {
    "merge_method": "rule", "method": "rule", "combination_type": "rule", "models": "adapters", "loras": "adapters",
    "base_model": "base", "filter": "modules", "filters": "modules", "output": "out", "normalize": "normalise",
    "parameters": "rule", "weight": "adapters[...].weight", "model": "path", "folder": "path", "svd_rank": "rank",
    "plugins": "before or after",
}  # fmt: skip


class Strict(BaseModel):
    """Unknown fields and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _as(field: str) -> BeforeValidator:
    """A plain text stands for a mapping with this one field."""
    return BeforeValidator(lambda value: {field: value} if isinstance(value, str) else value)


def _rank(value: Any) -> Any:
    if value in ("max", "full") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{shown(value)} is not a rank; give a positive whole number, max or full")


def _energy(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ValueError(f"{shown(value)} is not a fraction of energy; give a number above 0 to 1, such as 0.99")


def _device(value: str) -> str:
    if re.fullmatch(r"cpu|(cuda|mps)(:\d+)?", value):
        return value
    raise ValueError(f"{value!r} is not a device; give cpu, cuda, cuda:0 (or another number) or mps")


def _hash(value: str) -> str:
    if re.fullmatch(r"sha256:[0-9a-f]{64}", value):
        return value
    raise ValueError(
        f"{shown(value)} is not a content hash; it is sha256: and 64 hex digits, as `loralloy inspect` shows"
    )


Text = Annotated[str, Field(min_length=1)]


class FreedEntry(Strict):
    """A safetensors file (relative to the recipe) of input directions by module that an adapter is freed of first."""

    path: Text
    hash: Annotated[str, AfterValidator(_hash)] | None = None


class AdapterEntry(Strict):
    """One adapter: a folder (relative to the recipe) or org/name@revision."""

    path: Text
    name: Text | None = None
    weight: Any = None
    freed: Annotated[FreedEntry, _as("path")] | None = None
    hash: Annotated[str, AfterValidator(_hash)] | None = None


class PartEntry(BaseModel):
    """A rule or a plug-in by name; what else stands there are its parameters, checked by its own schema."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: Text

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class Modules(Strict):
    """Which modules take part, by pattern."""

    include: list[Text] = []
    exclude: list[Text] = []


def _modules(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    return {"include": value} if isinstance(value, list) else value


class Fields(Strict):
    """The fields of a recipe, ``version: 1``."""

    version: Literal[1]
    base: Text | None = None
    assume_same_base: bool = False
    adapters: Annotated[list[Annotated[AdapterEntry, _as("path")]], Field(min_length=1)]
    weights: Text | None = None
    normalise: bool = False
    modules: Annotated[Modules, BeforeValidator(_modules)] | None = None
    rule: Annotated[PartEntry, _as("name")] = PartEntry(name="linear")
    before: Annotated[PartEntry, _as("name")] | None = None
    after: Annotated[PartEntry, _as("name")] | None = None
    space: str | None = None
    rank: Annotated[Any, BeforeValidator(_rank)] | None = None
    energy: Annotated[Any, BeforeValidator(_energy)] | None = None
    dtype: Literal["fp16", "bf16", "fp32"] | None = None
    device: Annotated[str, AfterValidator(_device)] = "cpu"
    measure: Literal["exact", "estimate", "none"] = "exact"
    out: Text | None = None


_MODELS: dict[str, type[BaseModel]] = {"adapters": AdapterEntry, "modules": Modules}


def problem(item: Mapping[str, Any]) -> Problem:
    """One pydantic error in our words: the field, what stands there, what is allowed."""
    at = tuple(item["loc"])
    kind, value = item["type"], item.get("input")
    if kind == "extra_forbidden":
        inner = FreedEntry if "freed" in at[:-1] else _MODELS[str(at[0])] if len(at) > 1 else Fields
        known = list(inner.model_fields)
        return Problem(at, f"unknown field{suggest(str(at[-1]), known)}; known here: {', '.join(known)}", key=True)
    if kind == "missing":
        example = {"adapters": "a list of folders or org/name@revision", "path": "a folder or org/name@revision"}
        said = f"; give {example[str(at[-1])]}" if at[-1] in example else ""
        return Problem(at[:-1], f"the field `{at[-1]}` is missing{said}")
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return Problem(at, f"{shown(value)} is not known{suggest(str(value), allowed)}; give {or_list(allowed)}")
    if kind == "value_error":
        return Problem(at, str(item["ctx"]["error"]))
    wanted = {
        "string_type": "text" + (" (quote it)" if isinstance(value, int | float | bool) else ""),
        "bool_type": "true or false",
        "list_type": "a list",
        "too_short": "at least one",
        "string_too_short": "text that is not empty",
        "model_type": "a name or a mapping" if at and at[0] in ("rule", "before", "after") else "a mapping",
    }.get(kind)
    if kind == "model_type" and at and at[0] == "adapters":
        wanted = "a folder, org/name@revision, or a mapping with `path`"
    if wanted is None:
        return Problem(at, f"{item['msg'][:1].lower()}{item['msg'][1:]}")
    return Problem(at, f"{named(value)} cannot stand here; give {wanted}")


def suggest(name: str, known: list[str]) -> str:
    """`` (did you mean `density`?)``, or nothing."""
    near = get_close_matches(name, known, 1, 0.6)
    meant = near[0] if near else _MEANT.get(name.lower(), "")
    first = meant.split("[")[0].split(" ")[0]
    return f" (did you mean `{meant}`?)" if first in known else ""


def or_list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def named(value: Any) -> str:
    """A value and what it is, in YAML's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping"
    return shown(value)
