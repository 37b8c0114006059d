"""Work in groups of pieces, taken by several processes side by side, on one GPU or several; stopped anywhere, it goes on.

A piece is done when its path is there (an adapter's folder, a cell's JSON file), and paths appear whole. A group is taken
under a lock of the system, so that a killed process lets go of it. What fails is told, kept under OUT/errors, and tried again
by the next call. What fails for lack of memory is put off: it comes back when other work is done, a few times in a call, at
first beside what else was put off, then alone. `queue_command` starts the processes; `sites` says what those of
benchmarks/adaptive and benchmarks/tada work on.

Processes of one GPU take turns on it unless NVIDIA's MPS serves them (`nvidia-cuda-mps-control -d` before the first,
`echo quit | nvidia-cuda-mps-control` at the end). What that gains here has not been measured by itself.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralloy.atomic import atomic_file
from loralloy.evaluation.suite.locks import lock

STOP = "stop"  # a file in OUT: what has begun ends, and nothing new is begun; the next call removes it
_NO_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Piece:
    """name: what is said of it. path: what is there when it is done. error: the stem of its file of errors, unique."""

    name: str
    path: Path
    error: str


class Queue:
    """One process: it goes through the groups, in order, until nothing is left that it could take.

    Subclasses say what the groups are. number, deadline, call: which process, until when something new may be begun (as
    time.time() has it), and the name of the call that all its processes share.
    """

    comebacks = 4  # of what was put off
    pause = 10.0  # seconds that it stays away; longer each time

    def __init__(self, out: Path, number: int, deadline: float, call: str) -> None:
        self.out, self.number, self.deadline, self.call = out, number, deadline, call
        self.makes: set[Path] = set()  # what this call makes

    # -- what the work is ----------------------------------------------------------------------------------------------

    def queue(self) -> Sequence[Any]:
        """The groups, in order."""
        raise NotImplementedError

    def pieces(self, group: Any) -> Sequence[Piece]:
        raise NotImplementedError

    def needs(self, group: Any) -> Sequence[Piece]:
        """Pieces of other groups that must be there before."""
        return ()

    def in_turn(self, group: Any) -> bool:
        """Whether each piece of the group needs the one before it."""
        return False

    def lock_name(self, group: Any) -> str:
        return str(group.name)

    def label(self, group: Any) -> str:
        """What lines of output begin with."""
        return self.lock_name(group)

    def opened(self, group: Any) -> bool:
        """Whether this process can work on it: False is told by the subclass."""
        return True

    def work(self, group: Any, piece: Piece) -> str:
        """Make the piece; what is to be said of it, or nothing."""
        raise NotImplementedError

    def failed(self, group: Any) -> None:
        """After any error, before all else: let go of memory."""

    def smaller(self, group: Any) -> bool:
        """After running out of memory: ask for less of it the next time. False where that is not possible."""
        return False

    def idle(self) -> None:
        """There is nothing to do at the moment: let go of memory that others may need."""

    def over(self) -> bool:
        """Whether nothing new may be begun: time is up, or somebody has made the file OUT/stop."""
        return time.time() >= self.deadline or (self.out / STOP).exists()

    # -- how it is done ------------------------------------------------------------------------------------------------

    def run(self) -> int:
        queue = list(self.queue())
        self.makes = {piece.path for group in queue for piece in self.pieces(group)}
        idle = False
        while not self.over():
            queue = [group for group in queue if not self.finished(group)]
            found = self.through(queue)  # from the start each time: what was not ready may be now
            if "later" in found and not found & {"worked", "busy"}:
                found = (found - {"later"}) | self.come_back(queue, 1 if "again" in found else self.comebacks)
            if not found & {"worked", "busy", "again", "later"}:
                break
            if "worked" not in found:
                if not idle:
                    self.idle()
                time.sleep(0.5)
            idle = "worked" not in found
        return 0

    def through(self, queue: Sequence[Any], most: int = 0) -> set[str]:
        """What `take` says of the groups, up to the first that it worked on."""
        found: set[str] = set()
        for group in queue:
            found.add(self.take(group, most))
            if "worked" in found:
                break
        return found

    def come_back(self, queue: Sequence[Any], most: int) -> set[str]:
        """Try what was put off, the least often first."""
        found: set[str] = set()
        for count in range(1, most + 1):
            found = self.through(queue, count)
            if "worked" in found:
                break
        return found

    def error(self, piece: Piece) -> Path:
        return self.out / "errors" / f"{self.call}-{piece.error.replace('/', '-')}.txt"

    def put_off(self, piece: Piece) -> tuple[int, float]:
        """How often it has run out of memory in this call, and the seconds since the last time."""
        try:
            path = self._later(piece)
            return int(path.read_text(encoding="utf-8").split(maxsplit=1)[0]), time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return 0, 0.0

    def _later(self, piece: Piece) -> Path:
        return self.error(piece).with_suffix(".later")

    def finished(self, group: Any) -> bool:
        """Whether all of it is there, or has failed in this call."""
        return not self.left(group)

    def left(self, group: Any) -> list[Piece]:
        """The pieces that are still to be made: neither there nor failed in this call, nor behind one that has failed."""
        found = []
        for piece in self.pieces(group):
            if not piece.path.exists():
                if not self.error(piece).exists():
                    found.append(piece)
                elif self.in_turn(group):
                    break
        return found

    def take(self, group: Any, most: int = 0) -> str:
        """What became of a group, of whose pieces those that were put off at most so many times are tried: "worked";
        "busy" (another process has it) or "again" (has it, and some of it was put off); "later" (all that is left was put
        off); "waits" (what it needs is being made or was put off); "stuck" (what it needs is not made by this call, or has
        failed, or the group cannot be opened)."""
        missing = [piece for piece in self.needs(group) if not piece.path.exists()]
        if missing:
            comes = all(piece.path in self.makes and not self.error(piece).exists() for piece in missing)
            return "waits" if comes else "stuck"
        with lock(self.out / "locks" / self.lock_name(group), wait=False) as held:
            left = self.left(group)
            times = {p.path: self.put_off(p) for p in left}
            if not held:
                return "again" if any(count for count, _ in times.values()) else "busy"
            due = [_due(*times[p.path], most, self.pause) for p in left]
            if self.in_turn(group) and False in due:
                left = left[: due.index(False) + 1]
            now = [p for p, good in zip(left, due, strict=False) if good]
            if left and not now:
                return "later"
            if left and not self.opened(group):
                return "stuck"
            for piece in now:
                self.attempt(group, piece)
                if self.in_turn(group) and not piece.path.exists():
                    break  # the next needs it
            return "worked"

    def attempt(self, group: Any, piece: Piece) -> None:
        """Do it; out of memory is tried once more, in a while, with less, and then put off. What fails is told and kept."""
        if self.over():
            return
        later = self._later(piece)
        for retry in (False, True):
            try:
                said = self.work(group, piece)
                later.unlink(missing_ok=True)
                if said:
                    self.say(f"{self.label(group)} {piece.name}: {said}")
                return
            except KeyboardInterrupt:
                raise
            except Exception as error:
                self.failed(group)
                said = str(error)
                full = type(error).__name__ == "OutOfMemoryError" or any(words in said for words in _NO_MEMORY)
                if full and not retry and self.smaller(group):
                    time.sleep(min(5.0, self.pause))
                    continue
                first = said.splitlines()[0] if said else type(error).__name__
                count = self.put_off(piece)[0] + 1
                path = self.error(piece)
                path.parent.mkdir(parents=True, exist_ok=True)
                if full and count <= self.comebacks:
                    self.say(f"{self.label(group)} {piece.name}: put off: {first}")
                    atomic_file(later, f"{count} {traceback.format_exc()}")
                    return
                self.say(f"{self.label(group)} {piece.name}: FAILED: {first}")
                path.write_text(traceback.format_exc(), encoding="utf-8")
                later.unlink(missing_ok=True)
                if "CUDA error" in said and not full:  # this process can do nothing on the device any more
                    raise SystemExit(1) from None
                return

    def say(self, text: str) -> None:
        left = self.deadline - time.time()
        clock = f"{left:6.0f} s left " if left < 1e8 else ""
        print(f"{clock}[{self.number}] {text}", flush=True)


def _due(count: int, since: float, most: int, pause: float) -> bool:
    """Whether a piece may be tried: never put off, or at most so often, and long enough ago."""
    return count == 0 or (count <= most and since >= count * pause)


@contextlib.contextmanager
def slot(out: Path, name: str, count: int) -> Iterator[None]:
    """One of `count` places, which processes share; waits for one."""
    while True:
        for n in range(count):
            with lock(out / "locks" / f"{name}{n}", wait=False) as held:
                if held:
                    yield
                    return
        time.sleep(0.2)
