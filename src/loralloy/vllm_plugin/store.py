"""Merged adapters on disk, one folder a key, limited in bytes, shared by processes, none deleted that one of them holds.

    CACHE/<key>/           an adapter in PEFT's format, and loralloy.json, which says what it is
    CACHE/.merging/<xx>    locked by who merges a key that begins with xx, so that two processes do not merge one thing twice
    CACHE/.held/<process>/ locked by a living process; holds an empty file for each key that must stay
    CACHE/.lock            locked for as long as it takes to look, hold, or delete

Locks are flock's: the system frees them when a process is killed. A file system shared by hosts has to support them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ..atomic import atomic_folder
from ..errors import LoralloyError

REPORT = "loralloy.json"
_KEY = re.compile(r"[0-9a-f]{32}")


class Full(LoralloyError):
    """There is no room, and all that is there is held."""


class Store:
    """Args: `folder`, made if it is not there; `max_bytes` of merged adapters. Raises LoralloyError if it cannot be written."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.evicted = 0
        try:
            for name in (".merging", ".held"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._mine = folder / ".held" / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
            with self._locked():  # nobody sweeps it before it is locked
                self._mine.mkdir()
                self._alive = os.open(self._mine / ".alive", os.O_RDWR | os.O_CREAT, 0o644)
                _flock(self._alive)
        except OSError as error:
            raise LoralloyError(
                f"LORALLOY_CACHE {folder}: {error.strerror or error}; give a folder that can be written"
            ) from None

    def path(self, key: str) -> Path:
        return self.folder / key

    def has(self, key: str) -> bool:
        return (self.folder / key / REPORT).is_file()

    def hold(self, key: str) -> bool:
        """Keep `key` from being deleted, and call it used now; False if it is not there."""
        with self._locked():
            if not self.has(key):
                return False
            (self._mine / key).touch()
            with contextlib.suppress(OSError):  # a read-only copy of another host's cache
                os.utime(self.path(key))
            return True

    def take(self, key: str, size: int, make: Callable[[Path], None]) -> bool:
        """Hold `key`, and `make` it into an empty folder first if it is not there; True if it was made now.

        One maker a key at a time, over all processes; the folder appears whole or not at all. Raises Full, and what `make`
        raises.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(key)
        if self.hold(key):
            return False
        with _lock(self.folder / ".merging" / key[:2]):
            if self.hold(key):  # while this one waited
                return False
            if size > self.max_bytes:
                raise Full(
                    f"it takes {size >> 20} MiB, and the cache has room for {self.max_bytes >> 20}; raise LORALLOY_CACHE_GIB"
                )
            with self._locked():
                if self.path(key).exists():  # without its report: somebody has been at it
                    self._delete(key)
                self._make_room(size)
                (self._mine / key).touch()
            try:
                with atomic_folder(self.path(key)) as folder:
                    make(folder)
            except BaseException:
                self.release(key)
                raise
        return True

    def release(self, key: str) -> None:
        """This process no longer needs `key`: it may be deleted when room is needed."""
        (self._mine / key).unlink(missing_ok=True)

    @property
    def held(self) -> set[str]:
        """The keys that this process holds."""
        return {p.name for p in self._mine.iterdir() if p.name != ".alive"}

    def entries(self) -> dict[str, int]:
        """Bytes by key, the one used longest ago first."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # deleted meanwhile by another
                if _KEY.fullmatch(path.name):
                    found.append((path.stat().st_mtime_ns, path.name, sum(f.stat().st_size for f in path.iterdir())))
        return {name: size for _, name, size in sorted(found)}

    @property
    def size(self) -> int:
        return sum(self.entries().values())

    def close(self) -> None:
        """Let go of all keys."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
            shutil.rmtree(self._mine, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        """Delete what nobody holds, the one used longest ago first. Raises Full, having deleted nothing in vain."""
        entries, held = self.entries(), self._held_by_any()
        free = self.max_bytes - sum(entries.values())
        going = []
        for key, bytes_ in entries.items():
            if free >= size:
                break
            if key not in held:
                going.append(key)
                free += bytes_
        if free < size:
            raise Full(
                f"the cache is full: {len(held & set(entries))} merged adapters are held by running servers, and together they "
                f"leave no {max(1, size >> 20)} MiB of LORALLOY_CACHE_GIB={self.max_bytes / (1 << 30):g}; raise it"
            )
        for key in going:
            with contextlib.suppress(FileNotFoundError):
                self._delete(key)
                self.evicted += 1

    def _delete(self, key: str) -> None:
        gone = self.folder / f".gone-{key}-{secrets.token_hex(4)}"
        os.rename(self.path(key), gone)  # a folder vanishes at once, never by parts
        shutil.rmtree(gone, ignore_errors=True)

    def _held_by_any(self) -> set[str]:
        """The keys that living processes hold; what dead ones left is swept."""
        held: set[str] = set()
        for process in (self.folder / ".held").iterdir():
            if process != self._mine and _dead(process / ".alive"):
                shutil.rmtree(process, ignore_errors=True)
                continue
            with contextlib.suppress(OSError):
                held |= {p.name for p in process.iterdir()}
        return held

    def sweep(self) -> None:
        """Remove what killed processes left half-made or half-deleted."""
        with self._locked():
            for left in self.folder.glob(".gone-*"):
                shutil.rmtree(left, ignore_errors=True)
        for left in self.folder.glob(".*.new-*"):
            key = left.name[1:].split(".", 1)[0]
            if not _KEY.fullmatch(key):
                continue
            # who makes it holds this lock; its process's number, in the name, may be another's by now: in a container it is
            # the same after every start
            with contextlib.suppress(OSError), _lock(self.folder / ".merging" / key[:2], wait=False):
                shutil.rmtree(left, ignore_errors=True)

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return _lock(self.folder / ".lock")


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[None]:
    """An exclusive lock on `path`, which is made and stays. Raises OSError where it is taken and `wait` is False."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _flock(fd, wait)
        yield
    finally:
        os.close(fd)


def _flock(fd: int, wait: bool = True) -> None:
    import fcntl  # vLLM runs on Linux and macOS

    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _dead(alive: Path) -> bool:
    """Whether nobody locks this file."""
    try:
        fd = os.open(alive, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        _flock(fd, wait=False)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
