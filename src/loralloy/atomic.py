"""Nothing half-written: output goes to a temporary neighbour of its target and is renamed onto it.

A plain rename cannot replace a full folder, so an existing folder is exchanged in one system call (Linux
``renameat2(RENAME_EXCHANGE)``, macOS ``renamex_np(RENAME_SWAP)``). Where neither works, the old folder is first renamed to
``.NAME.old-*``; should the process die between the two renames, the next run puts it back (:func:`recover`).
Killed at any moment, the target is therefore either the old or the new, never a mixture.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from .errors import LoralloyError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h (macOS)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one atomic step; False where the system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(a), os.fsencode(b), _RENAME_SWAP) == 0
        return libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
    except (OSError, AttributeError, TypeError):
        return False


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk (a folder cannot be opened on Windows: nothing to do there)."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _leftovers(target: Path, kind: str) -> list[Path]:
    if not target.parent.is_dir():
        return []
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"))  # a name may hold [ or *


def _alive(leftover: Path) -> bool:
    """Whether the process that made a leftover (its id is in the name) still runs."""
    try:
        pid = int(leftover.name.rsplit("-", 2)[1])
    except (ValueError, IndexError):
        return False
    if pid == os.getpid():
        return True
    if os.name == "nt":  # os.kill(pid, 0) would end the process there
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def recover(target: Path) -> None:
    """Finish or undo what a killed run left beside `target`; a no-op when nothing is left."""
    for old in _leftovers(target, "old"):
        if _alive(old):
            continue
        if target.exists():
            _remove(old)
        else:
            os.replace(old, target)
    for new in _leftovers(target, "new"):
        if not _alive(new):
            _remove(new)


def check_free(target: Path, overwrite: bool) -> None:
    """Raise if `target` exists and may not be replaced. Called before any work, so that nobody waits for a refusal."""
    recover(target)
    if target.exists() and not overwrite:
        raise LoralloyError(f"{target} exists already; choose another output or pass --overwrite")


def check_replaceable(target: Path, overwrite: bool, ours: Collection[str], marks: Collection[str]) -> None:
    """:func:`check_free`, and with `overwrite` raise for a file in the place of the folder `target`, and for a folder whose
    replacement would lose something: one that is not empty and has none of `marks` (then it is no earlier output), or
    holds files other than `ours` (names relative to it)."""
    check_free(target, overwrite)
    if not target.exists():
        return
    if not target.is_dir():
        raise LoralloyError(
            f"{target} is a file, so --overwrite does not replace it by a folder; give another -o, or remove the file yourself"
        )
    if not any(target.iterdir()):
        return
    if not any((target / mark).is_file() for mark in marks):
        raise LoralloyError(
            f"{target} is not empty and no earlier output (it has no {' or '.join(marks)}), so --overwrite does not replace it; "
            "give another -o, or remove the folder yourself"
        )
    inside = sorted(path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    others = [name for path in inside if (name := path.relative_to(target).as_posix()) not in ours]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise LoralloyError(
            f"{target} also holds {', '.join(others[:3])}{more}, which --overwrite would lose; move that elsewhere, give another "
            "-o, or remove the folder yourself"
        )


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `target`; on success it becomes `target`, on any error it is removed.

    Raises LoralloyError when `target` exists and `overwrite` is False.
    """
    target = Path(target).absolute()
    check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    tag = f"{os.getpid()}-{secrets.token_hex(4)}"
    new = target.with_name(f".{target.name}.new-{tag}")
    new.mkdir()
    try:
        yield new
        for path in new.rglob("*"):
            _sync(path)
        _sync(new)
        if not target.exists():
            os.rename(new, target)
        elif not overwrite:
            raise LoralloyError(f"{target} appeared while writing; choose another output or pass --overwrite")
        elif not _exchange(new, target):
            old = target.with_name(f".{target.name}.old-{tag}")
            os.rename(target, old)
            try:
                os.rename(new, target)
            except BaseException:
                os.rename(old, target)
                raise
            _remove(old)
        _sync(target.parent)
    finally:
        _remove(new)


def atomic_file(target: str | os.PathLike[str], content: str | bytes, overwrite: bool = True) -> None:
    """Write one file so that a reader sees the old content or the new, never a part."""
    target = Path(target).absolute()
    if target.exists() and not overwrite:
        raise LoralloyError(f"{target} exists already; choose another output or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(new, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
        _sync(target.parent)
    finally:
        new.unlink(missing_ok=True)
