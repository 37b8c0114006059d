"""A task's rows: read from its source, checked one by one, and divided into splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import progress
from ..errors import LoralloyError
from .cells import cell, choice, row_options, value
from .sources import read_dataset, read_rows
from .splits import Row, apart, deduplicate, groups_apart, in_order, split

if TYPE_CHECKING:
    from .task import Task

_MANY = 20_000  # rows; reading more of them takes seconds, so a bar is shown


def load(task: Task) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of all splits, and what was left out (``source.repeats: drop``), a remark each.

    Raises LoralloyError for everything :meth:`Task.rows` names.
    """
    s, drop = task.splits, task.source.repeats == "drop"
    own = task.source.own
    if own is None:
        rows, conflicts = deduplicate(_checked(task, task.source.path or str(task.source.split)), drop)
        return split(rows, s.test or 0, s.validation or 0, s.train, s.seed), _remarks({"two answers": conflicts})
    counts: dict[str, int] = {}
    parts: dict[str, list[Row]] = {}
    for name, where in own.items():
        rows_of_split = list(_checked(task, where))  # its errors name the file or split themselves
        try:
            parts[name], counts[f"{name}, two answers"] = deduplicate(rows_of_split, drop)
        except LoralloyError as error:
            raise error.within(f"split {name!r}") from error
    parts, shared = apart(parts, drop)
    parts, grouped = groups_apart(parts, own, drop)
    if "validation" not in parts and s.validation is None:
        raise LoralloyError(
            "`splits.validation` is null (all), but the source has no validation split: give a number of rows"
        )
    if "validation" not in parts:
        parts |= split(parts["train"], 0, s.validation or 0, s.train, s.seed) | {"test": parts["test"]}
    wanted: dict[str, int | None] = {"test": s.test, "validation": s.validation, "train": s.train}
    cut = {name: in_order(part, s.seed)[: wanted[name]] for name, part in parts.items()}
    for empty in (name for name, part in cut.items() if not part and wanted[name] != 0):
        raise LoralloyError(f"no row is left in split {empty!r}; check `source`, or set `splits.{empty}` to 0")
    return cut, _remarks(counts | shared | grouped)


def _remarks(counts: Mapping[str, int]) -> list[str]:
    return [f"{number} text(s) left out ({why})" for why, number in counts.items() if number]


def _checked(task: Task, where: str) -> Iterator[Row]:
    """The checked rows of one file, or of one split of the data set."""
    if task.source.dataset is not None:
        folder = task.path.parent if task.path is not None else Path()
        rows = read_dataset(task.source, folder, where, task.answer if task.answer_as == "text" else "", task.values)
        named = ((f"data set {task.source.dataset}, split {where!r}, row {n}", row) for n, row in rows)
    else:
        path = task.file(where)
        if not path.is_file():
            raise LoralloyError(f"the data file {path} is missing; {_way_out(task, path)}")
        named = ((f"{path}, line {n}", row) for n, row in read_rows(path))
    yield from (check(task, row, place) for place, row in _shown(task.name, named))


def _shown(name: str, rows: Iterable[Any]) -> Iterator[Any]:
    """The rows as they are; a progress bar appears once there are many."""
    from rich.errors import LiveError

    bar = progress()
    step = None
    try:
        for n, row in enumerate(rows, 1):
            if n == _MANY:
                try:
                    bar.start()
                    step = bar.add_task(f"rows of {name}", total=None, completed=n)
                except LiveError:  # the caller shows a bar of its own
                    step = None
            elif step is not None and n % 1000 == 0:
                bar.update(step, completed=n)
            yield row
    finally:
        if step is not None:
            bar.stop()


def _way_out(task: Task, path: Path) -> str:
    from .packaged import ALL

    if path.stem in ALL and path.suffix == ".jsonl":
        return f"build it with `python -m loralloy.tasks.packaged --out {path.parent} --tasks {path.stem}`"
    field = "source.path" if task.source.path is not None else "source.files"
    return f"correct `{field}` in {task.path or 'the task'}"


def texts_of(task: Task, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The texts of a row's columns. Raises LoralloyError when one is missing, not text, or empty."""
    texts = tuple(cell(row, column.name, where).strip() for column in task.columns)
    for column, text in zip(task.columns, texts, strict=True):
        if not text:
            raise LoralloyError(f"{where}: column {column.name!r} is empty; fill it or remove the row")
    return texts


def check(task: Task, row: Mapping[str, Any], where: str) -> Row:
    """One row, checked. Raises LoralloyError, naming `where`, for what is wrong with it."""
    texts = texts_of(task, row, where)
    options: tuple[str, ...] = ()
    if task.options is not None:
        options = row_options(row, task.options, where)
        if not isinstance(task.options, str) and task.answer in task.options:
            options = tuple(sorted(options))  # else their order would tell the answer
    answer, references = _answer(task, row, task.labels or options, where)
    group = cell(row, task.splits.group, where).strip() if task.splits.group else ""
    return Row(texts, answer, options, references, group)


def _answer(task: Task, row: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> tuple[str, tuple[str, ...]]:
    """(gold answer, all right answers if the row has a list of them)."""
    found = value(row, task.answer, where)
    if isinstance(found, (list, tuple)) and not task.labels and all(isinstance(text, str) for text in found):
        references = tuple(dict.fromkeys(text.strip() for text in found if text.strip()))
        answer = references[0] if references else ""
    else:
        raw = str(found).lower() if isinstance(found, bool) and task.values else cell(row, task.answer, where)
        references, answer = (), raw.strip()
    if not answer:
        raise LoralloyError(f"{where}: the answer column {task.answer!r} is empty; fill it or remove the row")
    if task.answer_as != "text":
        answer = choice(answer, task.answer_as, allowed, task.answer, where)
    elif task.values:
        if answer not in task.values:
            raise LoralloyError(
                f"{where}: {task.answer} is {answer!r}, not among the values of `labels` ({', '.join(task.values)}); "
                "add or correct it"
            )
        answer = task.values[answer]
    if allowed and answer not in allowed:
        source = "`labels`" if task.labels else f"the row's {task.options!r}"
        raise LoralloyError(
            f"{where}: {task.answer} is {answer!r}, not among {source} ({', '.join(allowed)}); add or correct it"
        )
    return answer, references
