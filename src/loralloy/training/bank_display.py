"""How a bank's training is watched: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from ..console import console
from .jobs import DONE, FAILED, RUNNING, WAITING, Job

_QUARTERS = 4  # a plain line for each quarter of a job's steps ...
_LONG = 120.0  # ... or seconds since its last one
_ORDER = (FAILED, RUNNING, DONE)  # a table longer than the screen loses its end


class Display:
    """``with Display(jobs) as d: ... d.show()`` as often as there may be something new."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.live: Any = None
        self._said: dict[str, tuple[str, int, float]] = {}  # job -> state, quarter and time of its last line
        self._began = time.monotonic()

    def __enter__(self) -> Display:
        if console.is_terminal:
            from rich.live import Live

            self.live = Live(get_renderable=self._table, console=console, refresh_per_second=2, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self) -> None:
        """Look at the jobs again."""
        if self.live is None:
            for job in self.jobs:
                self._say(job)

    def _say(self, job: Job) -> None:
        """A line when a job starts, ends, has done another quarter, or moved on after a long silence."""
        if job.state == WAITING and job.tries == 0:
            return
        quarter = _QUARTERS * job.step // max(1, job.total)
        state, before, when = self._said.get(job.name, ("", 0, 0.0))
        now = time.monotonic()
        if state == job.state and quarter == before and now - when < _LONG:
            return
        self._said[job.name] = (job.state, quarter, now)
        count = sum(j.state == DONE for j in self.jobs)
        text = f"{now - self._began:5.0f} s  {job.name} {said(job)}"
        if job.state in (DONE, FAILED):
            text += f"  [{count} of {len(self.jobs)} done]"
        console.print(text, soft_wrap=True, markup=False)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table("task", "steps", "loss", "accuracy", "time", "", box=None, pad_edge=False)
        shown = [job for state in _ORDER for job in self.jobs if job.state == state]
        for job in shown:
            loss = "-" if job.loss is None else f"{job.loss:.3f}"
            table.add_row(
                job.name, f"{job.step}/{job.total}", loss, accuracy_of(job) or "-", clock(job.seconds), state(job)
            )
        waiting = [job.name for job in self.jobs if job.state == WAITING]
        if waiting:
            table.caption, table.caption_justify = "waiting: " + ", ".join(waiting), "left"
        done, now = sum(job.state == DONE for job in self.jobs), time.monotonic() - self._began
        table.title, table.title_justify = f"{done} of {len(self.jobs)} adapters, {clock(now)}", "left"
        return table


def state(job: Job) -> str:
    """What it is doing: a run scores its test rows after the last step."""
    if job.state != RUNNING:
        return job.state
    return "loading" if job.loss is None else "training" if job.step < job.total else "evaluating"


def said(job: Job) -> str:
    """A job in a few words: `step 120/375 loss 0.1234`, `done, accuracy 0.932, 41 s`."""
    where = f"step {job.step}/{job.total}" + (f" loss {job.loss:.4f}" if job.loss is not None else "")
    if job.state == DONE:
        accuracy = accuracy_of(job)
        return f"done, {where}{f', accuracy {accuracy}' if accuracy else ''}, {clock(job.seconds)}"
    if job.state == FAILED:
        return f"failed at {where}: {job.error.splitlines()[-1] if job.error else 'no word of why'}"
    if job.state == WAITING:
        return f"waits for memory, {where}"
    return f"evaluating, {where}" if state(job) == "evaluating" else where


def accuracy_of(job: Job) -> str:
    """Test accuracy of a job that is done, or ""."""
    if job.state != DONE or job.result is None:
        return ""
    try:
        return f"{json.loads(job.result.read_text(encoding='utf-8'))['test']['adapter']['accuracy']:.3f}"
    except (OSError, ValueError, KeyError):
        return ""


def clock(seconds: float) -> str:
    """`41 s`, `3 min 05 s`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
