"""Several commands side by side, each a process with a log file: started, watched, and stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
_GRACE = 3.0  # seconds that a command has to end by itself after Ctrl-C, which a terminal sends to all of them
_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass
class Job:
    """One command. `look` tells how far it is: (steps done, loss), read from what it writes."""

    name: str
    command: Sequence[str]
    log: Path
    look: Callable[[], tuple[int, float | None]] = lambda: (0, None)
    total: int = 0
    result: Path | None = None
    """metrics.json, once it is done."""
    state: str = WAITING
    step: int = 0
    loss: float | None = None
    seconds: float = 0.0
    """Wall time of its runs."""
    error: str = ""
    """The last lines of its log, where it failed."""
    tries: int = field(default=0, repr=False)
    together: int = field(default=1, repr=False)  # the most that ran at once during its last try
    process: Any = field(default=None, repr=False)
    began: float = field(default=0.0, repr=False)


def run_jobs(
    jobs: Sequence[Job],
    slots: int,
    *,
    environment: dict[str, str] | None = None,
    show: Callable[[], None] = lambda: None,
    poll: float = 0.25,
) -> None:
    """Run every waiting job, at most `slots` at a time, in the order given; a failed one does not stop the others.

    A job that ran out of device memory beside others waits until fewer run (it goes on from its checkpoint). `show` is
    called after every look at the jobs. On Ctrl-C or SIGTERM all are stopped and KeyboardInterrupt is raised.
    """
    waiting = deque(job for job in jobs if job.state == WAITING)
    running: list[Job] = []
    with _term_is_interrupt():
        try:
            while waiting or running:
                while waiting and len(running) < slots:
                    running.append(_start(waiting.popleft(), environment))
                for job in running:
                    job.together = max(job.together, len(running))
                time.sleep(poll)
                for job in list(running):
                    job.step, job.loss = job.look()
                    job.seconds += time.monotonic() - job.began
                    job.began = time.monotonic()
                    code = job.process.poll()
                    if code is None:
                        continue
                    running.remove(job)
                    if code == 0:
                        job.state = DONE
                    elif job.together > 1 and _no_memory(job.log):
                        slots = min(slots, job.together - 1)
                        job.state = WAITING
                        waiting.append(job)
                    else:
                        job.state, job.error = FAILED, last_lines(job.log)
                        if code < 0:
                            job.error += f"\nkilled by signal {-code} ({signal.Signals(-code).name})"
                show()
        finally:
            _stop(running)


def _start(job: Job, environment: dict[str, str] | None) -> Job:
    job.tries, job.together = job.tries + 1, 1
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb" if job.tries == 1 else "ab") as log:
        job.process = subprocess.Popen(
            list(job.command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    job.state, job.began = RUNNING, time.monotonic()
    return job


def _stop(running: Sequence[Job]) -> None:
    """Wait a little for what is running to end by itself, then end it: outputs and checkpoints are written atomically."""
    deadline = time.monotonic() + _GRACE
    try:
        while time.monotonic() < deadline and any(job.process.poll() is None for job in running):
            time.sleep(0.05)
    finally:  # a second Ctrl-C spares the wait
        for job in running:
            if job.process.poll() is None:
                job.process.kill()
        for job in running:
            job.process.wait()
            job.state = WAITING


@contextmanager
def _term_is_interrupt() -> Iterator[None]:
    """SIGTERM as Ctrl-C: a scheduler that ends this process ends the jobs with it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_lines(log: Path, count: int = 8) -> str:
    """The last lines of a log that say something; of a bar redrawn in place, its last state."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16384))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-count:])


def _no_memory(log: Path) -> bool:
    said = last_lines(log, 20)
    return any(words in said for words in _NO_MEMORY)
