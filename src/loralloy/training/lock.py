"""One training run an output: a second one is told so at once, rather than both writing the same checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import LoralloyError


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold ``.<output>.lock`` beside `output`; freed by the system at a kill, removed at the end.

    Raises LoralloyError naming `output` when another run holds it. Without ``fcntl`` (Windows) nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)
            raise LoralloyError(
                f"{output}: another run is training this output now; wait for it to end, or choose another output"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(held).st_ino:
                break
        os.close(held)  # its last holder removed the file between our open and our lock: that lock guards nothing
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held)
