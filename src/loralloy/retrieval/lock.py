"""One writer, or any number of readers, for an index folder; across processes, and freed by the system at a kill."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import LoralloyError

NAME = ".lock"


class FolderLock:
    """An advisory lock on ``FOLDER/.lock``: shared while an index is open, exclusive while it is written.

    A Chroma folder that two processes write can be damaged for good, and a reader may write too (it replays the log).
    Without ``fcntl`` (Windows), only writers lock. Raises LoralloyError at once when it is taken, rather than wait.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fd: int | None = None
        self._held = False
        try:
            self._fd = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:  # a read-only medium: nobody writes there
            self._fd = None

    def shared(self) -> None:
        self._take(exclusive=False)

    def exclusive(self) -> None:
        if self._fd is None:
            raise LoralloyError(f"{self.folder}: not writable, so the index cannot be changed there")
        self._take(exclusive=True)

    def _take(self, exclusive: bool) -> None:
        if self._fd is None:
            return
        try:
            try:
                import fcntl
            except ImportError:
                import msvcrt

                locking, lock, unlock = msvcrt.locking, msvcrt.LK_NBLCK, msvcrt.LK_UNLCK  # type: ignore[attr-defined]
                locking(self._fd, lock if exclusive else unlock, 1)
                return
            fcntl.flock(self._fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            self._held = True
        except OSError:
            if not exclusive and os.name == "nt":  # nothing was locked
                return
            if exclusive and self._held:  # a failed change of mode drops the old lock: take it back
                with contextlib.suppress(LoralloyError):
                    self._take(exclusive=False)
            doing = "changed" if exclusive else "opened"
            use = "open" if exclusive else "being written"
            raise LoralloyError(
                f"{self.folder}: this index is {use} elsewhere (another process, or another Index in this one), so it "
                f"cannot be {doing} now; wait for it to end, or close() it"
            ) from None

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
