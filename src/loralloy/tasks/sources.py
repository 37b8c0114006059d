"""Rows of a data file or a Hugging Face data set, each row a dict from column name to value."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..errors import LoralloyError
from .schema import Source

_QUOTE = "put cells that hold commas or line breaks in double quotes"
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file.

    Text is UTF-8 (a byte order mark is skipped). In a .tsv file cells are taken as they are, with no quoting. Parquet needs
    pyarrow, and its rows are counted from 1.

    Raises LoralloyError, naming file and line, for another suffix, a file that is missing or not UTF-8,
    a line that is not a JSON object, and a CSV row whose number of cells differs from the header's.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LoralloyError(
            f"{path}: source files end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, not {suffix or 'nothing'!r}; convert it"
        )
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _jsonl(path, file) if suffix == ".jsonl" else _csv(path, file, tabs=suffix == ".tsv")
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


def _csv(path: Path, file: Any, tabs: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file)
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
                    + ("no cell of a .tsv file can hold a tab or a line break" if tabs else _QUOTE)
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise LoralloyError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise LoralloyError(
            f"{path}: Parquet files need pyarrow; install it with `pip install 'loralloy[data]'`"
        ) from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (OSError, pyarrow.ArrowException) as error:
        raise LoralloyError(f"{path}: cannot be read as Parquet ({error})") from error


def read_dataset(
    source: Source, folder: Path, split: str, answer: str, known: Collection[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 0, row) of one split of a Hugging Face data set, through ``datasets.load_dataset``.

    An id that starts with "." or "/" is a folder, relative to `folder`. Where the column `answer` holds class labels, an
    integer that is not among the `known` values becomes its class's name. Raises LoralloyError when the package is
    missing, and with the library's own words when the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise LoralloyError(
            f"data set {source.dataset}: Hugging Face data sets need the package; `pip install 'loralloy[data]'`"
        ) from error
    name = str(source.dataset)
    if name.startswith((".", "/")):
        name = os.path.normpath(folder / name)
    try:
        data = datasets.load_dataset(name, source.config, split=split, revision=source.revision)
    except Exception as error:  # the library raises what its many parts raise; the cause is kept
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoralloyError(
            f"data set {source.dataset}, split {split!r}: {type(error).__name__}: {said}; check its id, config, revision and "
            "split, and the network (a set that is in the cache loads with HF_HUB_OFFLINE=1)"
        ) from error
    feature = data.features.get(answer)
    classes = feature.names if isinstance(feature, datasets.ClassLabel) else []
    number = 0
    for batch in data.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            value = row.get(answer)
            if classes and isinstance(value, int) and str(value) not in known and 0 <= value < len(classes):
                row[answer] = classes[value]
            yield number, row
            number += 1
