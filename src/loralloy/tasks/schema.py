"""The parts of a task file, and what is said about one that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Unknown fields and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Column(Strict):
    """A text column of the data file and what is printed before its text."""

    name: Annotated[str, Field(min_length=1)]
    prefix: str = ""


class Source(Strict):
    """Where the rows are: a .jsonl or .csv file, relative to the YAML file."""

    path: Annotated[str, Field(min_length=1)]


class Splits(Strict):
    """How many rows each split gets. `train` is a maximum; null takes all rows that are left."""

    test: Annotated[int, Field(ge=0)] = 300
    validation: Annotated[int, Field(ge=0)] = 150
    train: Annotated[int, Field(ge=0)] | None = 2000
    seed: int = 0


_FIELDS: dict[str, type[Strict]] = {"columns": Column, "source": Source, "splits": Splits}


def explain(task: type[Strict], item: Mapping[str, Any]) -> str:
    """One pydantic error as a sentence with the field's path and the way out."""
    loc = item["loc"]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if item["type"] == "extra_forbidden":
        model = _FIELDS[str(loc[0])] if len(loc) > 1 else task
        known = ", ".join(info.alias or name for name, info in model.model_fields.items())
        return f"unknown field `{field}`; known here: {known}"
    if item["type"] == "missing":
        return f"field `{field}` is missing"
    if item["type"] == "string_type":
        return (
            f"`{field}` must be text, not {item['input']!r}; quote it (YAML reads yes, no and numbers as other things)"
        )
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "string_pattern_mismatch" and field == "name":
        return f"`name` is {item['input']!r}; use lower-case letters, digits, '_', '-' and '.'"
    return f"`{field}`: {item['msg'][:1].lower()}{item['msg'][1:]}"
