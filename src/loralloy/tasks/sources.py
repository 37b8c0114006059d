"""Rows of a data file: JSON Lines or CSV, each row a dict from column name to value."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoralloyError

SUFFIXES = (".jsonl", ".csv")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a ``.jsonl`` or ``.csv`` file (UTF-8, a byte order mark is skipped).

    Raises LoralloyError, naming file and line, for another suffix, a file that is missing or not UTF-8,
    a line that is not a JSON object, and a CSV row whose number of cells differs from the header's.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LoralloyError(
            f"{path}: source files end in {' or '.join(SUFFIXES)}, not {suffix or 'nothing'!r}; convert it"
        )
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _jsonl(path, file) if suffix == ".jsonl" else _csv(path, file)
    except UnicodeDecodeError as error:
        raise LoralloyError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise LoralloyError(f"{path}: cannot be read ({error.strerror or error})") from error


def _jsonl(path: Path, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LoralloyError(
                f"{path}, line {number}: not JSON ({error.msg}); each line is one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise LoralloyError(f"{path}, line {number}: a {type(row).__name__}; each line is one JSON object {{...}}")
        yield number, row


def _csv(path: Path, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file)
    try:
        header = next(reader, None)
        if not header:
            raise LoralloyError(f"{path}: no header line; the first line names the columns")
        if len(set(header)) < len(header):
            repeated = sorted({name for name in header if header.count(name) > 1})
            raise LoralloyError(
                f"{path}: the header names a column twice ({', '.join(map(repr, repeated))}); rename one"
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise LoralloyError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells but the header has {len(header)}; "
                    "put cells that hold commas or line breaks in double quotes"
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise LoralloyError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def kind(value: Any) -> str:
    """A value's type, for an error message."""
    return "empty" if value is None else f"a {type(value).__name__}"


def cell(row: Mapping[str, Any], name: str, where: str) -> str:
    """A row's text (numbers are written out, null is empty). Raises LoralloyError when it is missing or not text."""
    if name not in row:
        has = ", ".join(map(repr, row)) or "none"
        raise LoralloyError(f"{where}: no column {name!r}; its columns are {has}")
    value = row[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise LoralloyError(f"{where}: column {name!r} holds {kind(value)}, not text; write it as a string")
    return value or ""


def row_options(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A row's own option texts: a list, or in CSV a JSON list. Raises LoralloyError unless they are distinct texts."""
    if name not in row:
        cell(row, name, where)
    value = row[name]
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise LoralloyError(f"{where}: column {name!r} must hold a list of texts (in CSV: a JSON list)")
    options = tuple(text.strip() for text in value)
    try:
        check_options(options, f"column {name!r}")
    except ValueError as error:
        raise LoralloyError(f"{where}: {error}") from None
    return options


def check_options(options: tuple[str, ...], what: str) -> None:
    """Raise ValueError (pydantic wants that) unless there are two or more distinct, trimmed texts."""
    if len(options) < 2:
        raise ValueError(f"{what} needs at least two entries")
    if any(not option.strip() or option != option.strip() for option in options):
        raise ValueError(f"{what} has an entry that is empty or has white space around it")
    if len(set(options)) < len(options):
        raise ValueError(f"{what} names an entry twice")
