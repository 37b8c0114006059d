"""Train, validation and test rows that depend on the texts and a seed alone.

Rows are deduplicated by their normalised text and put in the order of ``sha256(f"{seed}|{text}")``: the first rows are
the test split, the next ones validation, the rest train. The order of the rows in the file therefore changes nothing,
no text is in two splits, and two tasks that hold the same texts with the same seed order them alike.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LoralloyError

SPLITS = ("test", "validation", "train")


@dataclass(frozen=True)
class Row:
    """One checked row: the texts of the columns, the gold answer, and the row's own options (empty if it has none).

    `references` are all the right answers where a row has several, the gold one first.
    """

    texts: tuple[str, ...]
    answer: str
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    group: str = ""
    """What rows of one group share: they stay in one split. Empty for a row on its own."""

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


def deduplicate(rows: Iterable[Row], drop: bool = False) -> tuple[list[Row], int]:
    """One row per normalised text, and how many texts were dropped for having two different answers.

    Of several spellings the smallest is kept, so that file order does not matter. Raises LoralloyError when a text comes
    with two different answers (nobody could learn or score it), unless `drop` leaves those texts out.
    """
    kept: dict[str, Row] = {}
    conflicts: dict[str, tuple[str, str]] = {}
    for row in rows:
        key = row.key
        old = kept.get(key)
        if old is not None and old.answer != row.answer:
            conflicts.setdefault(key, (old.answer, row.answer))
        if old is None or _spelling(row) < _spelling(old):
            kept[key] = row
    if conflicts and not drop:
        text = min(conflicts)
        one, two = sorted(conflicts[text])
        raise LoralloyError(
            f"{len(conflicts)} text(s) appear with two different answers, "
            f"e.g. {_shown(text)} with {one!r} and {two!r}; remove those rows, keep one answer for each, add the column "
            "that tells them apart to `columns`, or say `repeats: drop` in `source`"
        )
    return [row for key, row in kept.items() if key not in conflicts], len(conflicts)


def _shown(key: str) -> str:
    return repr(key.replace("\x1f", " / ")[:80])


def _spelling(row: Row) -> tuple[tuple[str, ...], str, tuple[str, ...], str]:
    return row.texts, row.answer, row.options, row.group


def split(rows: Sequence[Row], test: int, validation: int, train: int | None, seed: int) -> dict[str, list[Row]]:
    """Divide deduplicated `rows`; returns ``{"test": [...], "validation": [...], "train": [...]}``, each in hash order.

    `train` cuts the train split to so many rows; None takes all that is left. Rows of one group stay in one split: groups
    are put in hash order as texts are, and where a split is full the rest of its last group is left out. Raises
    LoralloyError when there are too few rows for the splits asked for (train gets at least one row unless it is 0).
    """
    queue = sorted(rows, key=lambda row: (*order(_group(row), seed), *order(row.key, seed)))
    wanted = {"test": test, "validation": validation, "train": len(queue) if train is None else train}
    parts: dict[str, list[Row]] = {}
    start = 0
    for name in SPLITS:
        end = min(start + wanted[name], len(queue))
        parts[name] = queue[start:end]
        while start < end < len(queue) and _group(queue[end]) == _group(queue[end - 1]):
            end += 1
        start = end
    if any(len(parts[name]) < wanted[name] for name in ("test", "validation")) or (train != 0 and not parts["train"]):
        raise LoralloyError(
            f"{len(queue)} different texts are too few: splits.test {test} + splits.validation {validation}"
            f"{'' if train == 0 else ' + at least 1 for training'} need {test + validation + (train != 0)}; lower the splits"
        )
    return {name: in_order(part, seed) for name, part in parts.items()}


def in_order(rows: Iterable[Row], seed: int) -> list[Row]:
    """Rows in the order of their texts' seeded hashes."""
    return sorted(rows, key=lambda row: order(row.key, seed))


def apart(parts: dict[str, list[Row]], drop: bool = False) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """A source's own splits with no text in two of them, and how many texts were dropped ("train, also in test": n).

    A text in two splits is an error unless `drop`: then it stays in test, or else in validation. Each split must be
    deduplicated. Raises LoralloyError with the number and the way out.
    """
    kept: dict[str, list[Row]] = {}
    counts: dict[str, int] = {}
    seen: dict[str, str] = {}
    for name in (name for name in SPLITS if name in parts):
        kept[name] = []
        for row in parts[name]:
            if (other := seen.setdefault(row.key, name)) == name:
                kept[name].append(row)
                continue
            if not counts:
                example = _shown(row.key)
            counts[f"{name}, also in {other}"] = counts.get(f"{name}, also in {other}", 0) + 1
    if counts and not drop:
        said = "; ".join(f"{number} of {pair}" for pair, number in counts.items())
        raise LoralloyError(
            f"the source's own splits share texts ({said}), e.g. {example}: what is tested would be trained on; say "
            "`repeats: drop` in `source` (each stays in test, or else in validation), or give one file to divide by hash"
        )
    return kept, counts


def groups_apart(
    parts: dict[str, list[Row]], where: Mapping[Any, str], drop: bool = False
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """As :func:`apart`, for groups: no group in two of a source's own splits. Rows without a group are left alone.

    `where` names each split's file (or the data set's split). With `drop` a group's rows stay in test, or else in
    validation. Raises LoralloyError with the files, a group and the way out.
    """
    kept: dict[str, list[Row]] = {}
    counts: dict[str, int] = {}
    seen: dict[str, str] = {}
    said: dict[tuple[str, str], list[str]] = {}
    for name in (name for name in SPLITS if name in parts):
        kept[name] = []
        for row in parts[name]:
            other = seen.setdefault(_group(row), name) if row.group else name
            if other == name:
                kept[name].append(row)
                continue
            said.setdefault((name, other), []).append(row.group)
            counts[f"{name}, group also in {other}"] = counts.get(f"{name}, group also in {other}", 0) + 1
    if said and not drop:
        (name, other), groups = next(iter(said.items()))
        number = len({normalise([group]) for group in groups})
        raise LoralloyError(
            f"`splits.group`: {number} group(s) of {name} ({where[name]}) are also in {other} ({where[other]}), e.g. "
            f"{_shown(normalise(groups[:1]))}: what is tested would be trained on; say `repeats: drop` in `source` (their rows "
            "stay in test, or else in validation), correct the files, or leave `splits.group` out"
        )
    return kept, counts


def _group(row: Row) -> str:
    return normalise([row.group]) if row.group else row.key


def without_conflicts(rows: Iterable[dict[str, Any]], columns: Sequence[str], answer: str) -> list[dict[str, Any]]:
    """Raw rows less every text that comes with more than one answer, and less repeats (the first row stays)."""
    kept: dict[str, dict[str, Any]] = {}
    answers: dict[str, set[str]] = {}
    for row in rows:
        key = normalise([row[name] for name in columns])
        kept.setdefault(key, row)
        answers.setdefault(key, set()).add(row[answer])
    return [row for key, row in kept.items() if len(answers[key]) == 1 and key.strip("\x1f")]
