"""Train, validation and test rows that depend on the texts and a seed alone.

Rows are deduplicated by their normalised text and put in the order of ``sha256(f"{seed}|{text}")``: the first rows are
the test split, the next ones validation, the rest train. The order of the rows in the file therefore changes nothing,
no text is in two splits, and two tasks that hold the same texts with the same seed order them alike.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LoralloyError

SPLITS = ("test", "validation", "train")


@dataclass(frozen=True)
class Row:
    """One checked row: the texts of the columns, the gold answer, and the row's own options (empty if it has none)."""

    texts: tuple[str, ...]
    answer: str
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return normalise(self.texts)


def normalise(texts: Sequence[str]) -> str:
    """What makes two rows the same text: Unicode NFKC, case and white space do not count.

    Columns are joined by the unit separator, which NFKC and ``split`` cannot leave inside a column.
    """
    return "\x1f".join(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)


def order(key: str, seed: int) -> tuple[str, str]:
    """The sort key of a normalised text: its seeded hash, then (for the collision that will not happen) itself."""
    return hashlib.sha256(f"{seed}|{key}".encode("utf-8", "surrogatepass")).hexdigest(), key


def deduplicate(rows: Iterable[Row]) -> list[Row]:
    """One row per normalised text. Of several spellings the smallest is kept, so that file order does not matter.

    Raises LoralloyError when a text comes with two different answers: nobody could learn or score it.
    """
    kept: dict[str, Row] = {}
    conflicts: dict[str, tuple[str, str]] = {}
    for row in rows:
        key = row.key
        old = kept.get(key)
        if old is not None and old.answer != row.answer:
            conflicts.setdefault(key, (old.answer, row.answer))
        if old is None or (row.texts, row.answer, row.options) < (old.texts, old.answer, old.options):
            kept[key] = row
    if conflicts:
        text = min(conflicts)
        one, two = sorted(conflicts[text])
        shown = text.replace("\x1f", " / ")
        raise LoralloyError(
            f"{len(conflicts)} text(s) appear with two different answers, "
            f"e.g. {shown[:80]!r} with {one!r} and {two!r}; "
            "remove those rows, keep one answer for each, or add the column that tells them apart to `columns`"
        )
    return list(kept.values())


def split(rows: Iterable[Row], test: int, validation: int, train: int | None, seed: int) -> dict[str, list[Row]]:
    """Deduplicate and divide `rows`; returns ``{"test": [...], "validation": [...], "train": [...]}`` in hash order.

    `train` cuts the train split to so many rows; None takes all that is left. Raises LoralloyError on conflicting
    duplicates, and when there are too few rows for the splits asked for (train gets at least one row unless it is 0).
    """
    unique = sorted(deduplicate(rows), key=lambda row: order(row.key, seed))
    needed = test + validation + (0 if train == 0 else 1)
    if len(unique) < needed:
        raise LoralloyError(
            f"{len(unique)} different texts are too few: splits.test {test} + splits.validation {validation}"
            f"{'' if train == 0 else ' + at least 1 for training'} need {needed}; lower the splits"
        )
    rest = unique[test + validation :]
    return {
        "test": unique[:test],
        "validation": unique[test : test + validation],
        "train": rest if train is None else rest[:train],
    }


def without_conflicts(rows: Iterable[dict[str, Any]], columns: Sequence[str], answer: str) -> list[dict[str, Any]]:
    """Raw rows less every text that comes with more than one answer, and less repeats (the first row stays)."""
    kept: dict[str, dict[str, Any]] = {}
    answers: dict[str, set[str]] = {}
    for row in rows:
        key = normalise([row[name] for name in columns])
        kept.setdefault(key, row)
        answers.setdefault(key, set()).add(row[answer])
    return [row for key, row in kept.items() if len(answers[key]) == 1 and key.strip("\x1f")]
