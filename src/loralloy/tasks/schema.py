"""The parts of a task file, and what is said about one that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Unknown fields and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Column(Strict):
    """A text column of the data file and what is printed before its text."""

    name: Annotated[str, Field(min_length=1)]
    prefix: str = ""


SplitName = Literal["train", "validation", "test"]


class Source(Strict):
    """Where the rows are: one file, a file for each split, or a Hugging Face data set. Paths are relative to the YAML file.

    One file, or one `split` of a data set, is divided by hash. With `files` or `splits` the source's own splits hold;
    validation, where they have none, is cut from train by hash. `repeats` says what becomes of a text that comes with two
    answers or in two splits: an error, or it is dropped (in two splits: it stays in test, else in validation).
    """

    path: Annotated[str, Field(min_length=1)] | None = None
    files: dict[SplitName, str] | None = None
    dataset: Annotated[str, Field(min_length=1)] | None = None
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    splits: dict[SplitName, str] | None = None
    repeats: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _one(self) -> Source:
        given = [name for name in ("path", "files", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"`source` has {' and '.join(given) or 'none of them'}; give one of path, files, dataset")
        extra = [name for name in ("config", "revision", "split", "splits") if getattr(self, name) is not None]
        if self.dataset is None and extra:
            raise ValueError(f"`source.{extra[0]}` goes with `source.dataset`; remove it")
        if self.dataset is not None and (self.split is None) == (self.splits is None):
            raise ValueError(
                "`source.dataset` needs either `splits: {train: ..., test: ...}` (its own), or `split: NAME` (one, "
                "divided by hash)"
            )
        for name in ("files", "splits"):
            parts = getattr(self, name)
            if parts is not None and not {"train", "test"} <= parts.keys():
                raise ValueError(
                    f"`source.{name}` needs train and test (validation is cut from train if it is missing)"
                )
        return self

    @property
    def own(self) -> dict[SplitName, str] | None:
        """The source's own splits, or None where all rows are divided by hash."""
        return self.files if self.files is not None else self.splits


class Splits(Strict):
    """How many rows each split gets. `train` is a maximum; null takes all rows that are left.

    With a source's own splits `test` and `validation` are maximums too, and may be null (all).
    `group` names a column whose equal values stay in one split (questions about one passage, say).
    """

    test: Annotated[int, Field(ge=0)] | None = 300
    validation: Annotated[int, Field(ge=0)] | None = 150
    train: Annotated[int, Field(ge=0)] | None = 2000
    seed: int = 0
    group: Annotated[str, Field(min_length=1)] | None = None


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
