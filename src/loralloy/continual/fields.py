"""The fields of a stream file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import LoralloyError

VERSION = 1
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Selection = Literal["random", "herding", "reservoir"]
When = Literal["every", "last"]


class Strict(BaseModel):
    """Unknown fields, silent conversions and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ExperienceEntry(Strict):
    """One domain. Text: `task`, a task file. Images: `domain`, its name in the image data (default: `name`)."""

    name: Name | None = None
    task: Text | None = None
    domain: Text | None = None


class ImagesEntry(Strict):
    """Where a stream of images is read from.

    path: the emoji file (layout "emoji"), or a folder of domain/class/*.jpg (PACS, Office-Home, any). size: pixels a side.
    head: "random" (drawn from the seed and frozen: the authors'), "learned" (on the first domain, then frozen) or
    "prototypes" (class means of the buffer's features, made again after each merge).
    """

    path: Text
    layout: Literal["emoji", "pacs", "office_home", "folders"] = "emoji"
    size: Count = 112
    head: Literal["random", "learned", "prototypes"] = "random"


class BufferEntry(Strict):
    """per_class: rows a class and domain. total: of all rows, evicting evenly. selection: random, herding or reservoir."""

    per_class: Count = 1
    total: Count | None = None
    selection: Selection = "random"


class EvaluateEntry(Strict):
    """limit: the first so many rows of each domain's `split`. unseen: evaluate domains that are still to come too (for
    forward transfer). batch_size: rows at once."""

    split: Literal["test", "validation"] = "test"
    limit: Count | None = None
    unseen: bool = True
    batch_size: Count = 32


class Fields(Strict):
    """The fields of a stream file. Paths are relative to it.

    orders: lists of the experiences' names, or how many orders to draw (the file's own first, then by hash). train: the
    training options of the kind. rank: what merged adapters are cut to (None: the rule's default). uncut: evaluate the
    merge without that cut too. keep_merged: keep each merged adapter's folder. after: merge and evaluate after "every"
    experience, or after the "last" alone.
    """

    version: Literal[1]
    title: str = ""
    kind: Literal["text", "images"] = "text"
    model: Text
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Text = "auto"
    images: ImagesEntry | None = None
    experiences: Annotated[tuple[ExperienceEntry, ...], Field(min_length=1)]
    orders: Count | Annotated[tuple[Annotated[tuple[Name, ...], Field(min_length=1)], ...], Field(min_length=1)] = 1
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    train: dict[str, Any] = Field(default_factory=dict)
    buffer: BufferEntry = BufferEntry()
    evaluate: EvaluateEntry = EvaluateEntry()
    merges: Annotated[tuple[Any, ...], Field(min_length=1)] = ("linear",)
    strategies: Annotated[tuple[Any, ...], Field(min_length=1)] = ("learned",)
    rank: Count | Literal["max", "full"] | None = None
    uncut: bool = False
    keep_merged: bool = False
    after: When = "every"
    out: Text

    @property
    def unseen_too(self) -> bool:
        """Whether domains that are still to come are evaluated."""
        return self.evaluate.unseen

    @model_validator(mode="after")
    def _consistent(self) -> Fields:
        if (self.kind == "images") != (self.images is not None):
            raise ValueError("`images` (where they are read from) goes with `kind: images`, and with no other")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("`seeds` names a seed twice; its runs would be the same")
        for n, entry in enumerate(self.experiences):
            if self.kind == "text" and (entry.task is None or entry.domain is not None):
                raise ValueError(f"`experiences[{n}]` of a text stream needs `task: FILE`, and no `domain`")
            if self.kind == "images" and (entry.task is not None or not (entry.name or entry.domain)):
                raise ValueError(f"`experiences[{n}]` of a stream of images needs `name` or `domain`, and no `task`")
        return self


_WANTED: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"), "float": (int | float, "a number"), "bool": (bool, "true or false"), "str": (str, "text"),
}  # fmt: skip


def check_options(given: Mapping[str, Any], config: type) -> None:
    """See that each of a stream's `train` options is of its field's type in `config`, a dataclass; unknown ones are left to it.

    Raises LoralloyError naming the option.
    """
    types = {f.name: str(f.type) for f in dataclasses.fields(config)}
    for name, value in given.items():
        kind = types.get(name, "")
        words = kind.removesuffix(" | None")
        if words != kind and value is None:
            continue
        if words.startswith("tuple"):
            listed = [value] if isinstance(value, str) else value
            if not isinstance(listed, list) or not listed or not all(isinstance(x, str) and x for x in listed):
                raise LoralloyError(f"`train.{name}` is {value!r}; give a list of names")
        elif words in _WANTED:
            right, said = _WANTED[words]
            if not isinstance(value, right) or (isinstance(value, bool) and words != "bool"):
                said += ", without quotes" if isinstance(value, str) and words != "str" else ""
                raise LoralloyError(f"`train.{name}` is {value!r}; give {said}")
