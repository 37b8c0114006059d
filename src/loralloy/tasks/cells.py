"""Values of a row: texts, options, answers, and what is said about one that is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import LoralloyError


def kind(value: Any) -> str:
    """A value's type, for an error message."""
    return "empty" if value is None else f"a {type(value).__name__}"


def value(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A row's value. A name that is no column may be a path: ``choices.text``, ``endings.0`` (parts and list places).

    Raises LoralloyError, with the columns that there are, when it leads nowhere.
    """
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, (list, tuple)) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            has = ", ".join(map(repr, row)) or "none"
            raise LoralloyError(f"{where}: no column {name!r}; its columns are {has}")
    return found


def cell(row: Mapping[str, Any], name: str, where: str) -> str:
    """A row's text (numbers are written out, null is empty). Raises LoralloyError when it is missing or not text."""
    found = value(row, name, where)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return str(found)
    if found is not None and not isinstance(found, str):
        raise LoralloyError(f"{where}: column {name!r} holds {kind(found)}, not text; write it as a string")
    return found or ""


def row_options(row: Mapping[str, Any], name: str | tuple[str, ...], where: str) -> tuple[str, ...]:
    """A row's own option texts: a list (in CSV a JSON list) in one column, or one text in each of several columns.

    Raises LoralloyError unless they are distinct texts.
    """
    shown = f"column {name!r}" if isinstance(name, str) else f"columns {', '.join(map(repr, name))}"
    found: Any
    if isinstance(name, str):
        found = value(row, name, where)
        if isinstance(found, str):  # a CSV cell
            try:
                found = json.loads(found)
            except json.JSONDecodeError:
                found = None
        if not isinstance(found, (list, tuple)) or not all(isinstance(text, str) for text in found):
            raise LoralloyError(f"{where}: column {name!r} must hold a list of texts (in CSV: a JSON list)")
    else:
        found = [cell(row, one, where) for one in name]
    options = tuple(text.strip() for text in found)
    try:
        check_options(options, shown)
    except ValueError as error:
        raise LoralloyError(f"{where}: {error}") from None
    return options


def choice(raw: str, form: str, options: tuple[str, ...], column: str, where: str) -> str:
    """The option that an index (from 0), a number (from 1) or a letter (from A) means. Raises LoralloyError if none."""
    if form == "letter":
        place = ord(raw.upper()) - ord("A") if len(raw) == 1 else -1
    else:
        place = int(raw) - (form == "number") if raw.isdecimal() else -1
    if not 0 <= place < len(options):
        raise LoralloyError(
            f"{where}: {column} is {raw!r}, no {form} of its {len(options)} options; correct it or `answer_as`"
        )
    return options[place]


def check_options(options: tuple[str, ...], what: str) -> None:
    """Raise ValueError (pydantic wants that) unless there are two or more distinct, trimmed texts."""
    if len(options) < 2:
        raise ValueError(f"{what} needs at least two entries")
    if any(not option.strip() or option != option.strip() for option in options):
        raise ValueError(f"{what} has an entry that is empty or has white space around it")
    if len(set(options)) < len(options):
        raise ValueError(f"{what} names an entry twice")
