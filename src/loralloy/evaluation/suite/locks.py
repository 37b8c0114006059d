"""Processes side by side: what is made once, and who makes it. Locks are the system's, so a killed holder lets go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ...atomic import atomic_file


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the file `path` alone inside the block; yields False, at once, if another has it and `wait` is False.

    Where the system has no such locks (Windows) it yields True: two processes may then do one piece of work twice, and
    the files, which are replaced whole, are still right.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        held = True
        try:
            import fcntl
        except ImportError:
            pass
        else:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                held = False
        yield held
    finally:
        os.close(fd)


def once(path: Path, make: Callable[[], str]) -> str:
    """The text of `path`; whoever comes first makes it, the others wait."""
    if not path.is_file():
        with lock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                atomic_file(path, make())
    return path.read_text(encoding="utf-8")
