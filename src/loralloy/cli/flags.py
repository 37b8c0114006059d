"""From the flags of `loralloy merge`, or a recipe and flags that override it, to the recipe that is meant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError
from . import parameters

if TYPE_CHECKING:
    from ..recipe import Recipe

_ENDINGS = (".yaml", ".yml")


def from_flags(
    adapters: Sequence[str], weights: Sequence[str] | None, flags: Mapping[str, Any], texts: Mapping[str, str]
) -> tuple[Recipe, list[str]]:
    """The recipe that the command line means, and one line for each thing that the flags change in a recipe file.

    Args:
        adapters: references, or one recipe file.
        weights: what follows --weights.
        flags: field of a recipe -> value; only those that were given.
        texts: parameters of rules and plug-ins, as text.

    Raises LoralloyError naming the flag and what is allowed, and for everything that is wrong in the recipe file.
    """
    from ..recipe import Recipe

    files = [a for a in adapters if a.lower().endswith(_ENDINGS) and not Path(a).is_dir()]
    if files and len(adapters) > 1:
        raise LoralloyError(f"{files[0]} is a recipe, which names its own adapters; give it alone, or adapters alone")
    recipe = Recipe.load(files[0]) if files else None
    parts = _parts(recipe, flags, texts)
    fields = {**flags, **parts}
    if "energy" in fields:
        fields["energy"] = _float(fields["energy"])
    for name in ("space", "energy", "dtype", "device", "measure"):
        if name in fields:
            _check(name, fields[name], fields.get("rule") or (recipe.rule.model_dump() if recipe else "linear"))
    if "rank" in fields and "energy" in fields:
        raise LoralloyError("--rank and --energy are both given; keep one: a number fixes the rank, energy finds it")
    if recipe is None:
        found = _weights(weights, [_name(a) for a in adapters])
        entries: list[Any] = [{"path": a} for a in adapters]
        if isinstance(found, list):
            entries = [{"path": a, "weight": w} for a, w in zip(adapters, found, strict=True)]
        elif found:
            fields["weights"] = found
        return Recipe.from_dict({"version": 1, "adapters": entries, **fields}), []
    said = [_said(recipe, field, value) for field, value in fields.items()]
    if weights:
        found = _weights(weights, [e.name or _name(e.path) for e in recipe.adapters])
        entries = [e.model_dump(exclude_none=True, exclude={"weight"}) for e in recipe.adapters]
        if isinstance(found, list):
            entries = [entry | {"weight": w} for entry, w in zip(entries, found, strict=True)]
        fields |= {"adapters": entries, "weights": str(Path(found).absolute()) if isinstance(found, str) else None}
        said.append(f"{recipe.path}: weights are those of --weights")
    other = {"rank": "energy", "energy": "rank"}
    return recipe.replace(**{other[name]: None for name in fields if name in other}, **fields), said


def _parts(recipe: Recipe | None, flags: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The rule and the plug-ins that flags name or whose parameters they give; else the recipe's stay as they are."""
    from ..merging import get_rule
    from ..merging.plan import check_plugin

    entries: dict[str, dict[str, Any]] = {}
    for field in ("rule", "before", "after"):
        old = getattr(recipe, field) if recipe else None
        name = flags.get(field)
        if old is not None and name in (None, old.name):
            entries[field] = old.model_dump()
        elif name is not None or field == "rule":
            entries[field] = {"name": name or "linear"}
    chosen: dict[str, Any] = {}
    for field, entry in entries.items():
        name = entry["name"]
        part = get_rule(name) if field == "rule" else check_plugin(name, "before" if field == "before" else "after")
        assert part is not None
        chosen[field] = part(**{k: v for k, v in entry.items() if k != "name"})
    given = parameters.assign(texts, chosen)
    return {field: entry | given[field] for field, entry in entries.items() if field in flags or given[field]}


def _check(field: str, value: Any, rule: Any) -> None:
    """A flag's value by the recipe's own schema, the error said of the flag."""
    from ..recipe import Recipe

    try:
        Recipe.from_dict({"version": 1, "adapters": ["-"], "rule": rule, field: value})
    except LoralloyError as error:
        said = str(error).removeprefix(f"recipe: `{field}`: ")
        raise LoralloyError(f"--{field}{' ' if said.startswith(repr(value)) else ': '}{said}") from None


def _said(recipe: Recipe, field: str, value: Any) -> str:
    old = recipe.to_dict().get(field)
    was = f", not {_text(old)}" if old is not None else ""
    return f"{recipe.path}: {field} is {_text(value)} by flag{was}"


def _text(entry: Any) -> str:
    """ties(density=0.3)"""
    if not isinstance(entry, Mapping):
        return parameters.said(entry)
    more = ", ".join(f"{k}={parameters.said(v)}" for k, v in entry.items() if k != "name")
    return f"{entry['name']}({more})" if more else str(entry["name"])


def _float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _name(ref: str) -> str:
    """What an adapter will be called."""
    from ..hub import parse_ref

    return Path(parse_ref(ref)[0]).absolute().name


def numbers(text: str) -> list[float] | None:
    """The numbers of `0.6`, `0.6,0.4` or `0.6 0.4`; None if it is anything else."""
    try:
        return [float(part) for part in text.replace(",", " ").split()] or None
    except ValueError:
        return None


def _weights(texts: Sequence[str] | None, names: Sequence[str]) -> list[float] | str | None:
    """One number an adapter, or the path of a weights file, or None where --weights is not given."""
    if not texts:
        return None
    if len(texts) == 1 and Path(texts[0]).is_file():
        return texts[0]
    values: list[float] = []
    for text in texts:
        found = numbers(text)
        if found is None:
            raise LoralloyError(
                f"--weights {text!r} is neither a number nor a weights file that exists; give one of them"
            )
        values += found
    if len(values) != len(names):
        raise LoralloyError(
            f"--weights gives {len(values)} numbers for {len(names)} adapters ({', '.join(names)}); give one each"
        )
    for name, value in zip(names, values, strict=True):
        if not math.isfinite(value):
            raise LoralloyError(f"--weights: the weight of adapter {name!r} is {value}; it must be a finite number")
    return values
