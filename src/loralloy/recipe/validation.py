"""A YAML file against its version and a pydantic model: what is wrong is told in one line, with the field's place in the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import LoralloyError
from .document import At, Document, Problem
from .schema import named, or_list, suggest


def versioned(path: Path, what: str, example: str, version: int) -> Document:
    """Read a YAML file that is a mapping with the field `version`, which has to be this one. example: a field of such a file.

    Raises LoralloyError with file, line and column.
    """
    document = Document.read(path, what)
    if not isinstance(document.data, dict):
        raise LoralloyError(f"{path}: a {what} file is a mapping (`{example}: ...`), not {named(document.data)}")
    found = document.data.get("version")
    if found is None:
        raise document.wrong((), f"no `version`; add `version: {version}` as its first line")
    if type(found) is not int or found != version:
        raise document.wrong(
            ("version",), f"{found!r} is not known to this loralloy (it reads {version}); upgrade loralloy"
        )
    return document


def validated(
    model: type[BaseModel],
    data: Any,
    document: Document,
    at: At = (),
    *,
    inner: Mapping[str, type[BaseModel]] | None = None,
    branches: tuple[str, ...] = (),
    what: str = "",
) -> Any:
    """The model of what stands at `at` in a document.

    inner: field -> the model of what stands in it, whose fields are named where one there is unknown. branches: how
    pydantic's names for the branches of the model's unions begin, which are in no file. what: said after "unknown field".

    Raises LoralloyError with file, line, column and field of all that is wrong.
    """
    try:
        # through JSON, where a list may be a tuple and 1 is still no text
        return model.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        # a list whose entries are wrong is also told as too short
        items = [e for e in error.errors() if not (e["type"] == "too_short" and e["input"])]
        raise document.error([_problem(model, e, at, inner or {}, branches, what) for e in items]) from None


def _problem(
    model: type[BaseModel],
    item: Mapping[str, Any],
    at: At,
    inner: Mapping[str, type[BaseModel]],
    branches: tuple[str, ...],
    what: str,
) -> Problem:
    where: At = (*at, *(part for part in item["loc"] if not (branches and str(part).startswith(branches))))
    if item["type"] == "extra_forbidden":
        owner = inner.get(str(item["loc"][0]), model) if len(item["loc"]) > 1 else model
        known, name = [field.alias or n for n, field in owner.model_fields.items()], str(item["loc"][-1])
        return Problem(where, f"unknown field{what}{suggest(name, known)}; known here: {', '.join(known)}", key=True)
    if item["type"] == "missing":
        return Problem(where[:-1], f"the field `{where[-1]}` is missing")
    if item["type"] == "value_error":
        return Problem(where, str(item["ctx"]["error"]))
    if item["type"] == "literal_error":
        allowed = [word.strip(" '") for word in item["ctx"]["expected"].replace(" or ", ",").split(",")]
        return Problem(where, f"{named(item['input'])} is not known; give {or_list(allowed)}")
    if item["type"] == "string_type":
        return Problem(where, f"{named(item['input'])} cannot stand here; give text (quote it)")
    return Problem(where, f"{item['msg'][:1].lower()}{item['msg'][1:]}, not {named(item['input'])}")
