"""The decoder in a thread of its own: requests come in from an event loop, and their events go back to it."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from ..errors import LoralloyError
from ..memory import give_back, keep_steady
from ..weights import Weights
from .rows import Event, Row
from .sampling import Sampling
from .scheduler import Scheduler

GIVE_BACK = 5.0  # seconds between two looks for memory to give back


class Busy(LoralloyError):
    """The server has all that it can hold; `retry_after`: whole seconds after which it is worth asking again."""

    def __init__(self, why: str, retry_after: int) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class Stopping(LoralloyError):
    """The server is shutting down, or its decoder has died."""


class Stream:
    """The events of some rows, in the order they come; leaving the block cancels the rows that are not done.

    >>> with engine.stream(prompts, weights, sampling) as stream:       # doctest: +SKIP
    ...     async for row, event in stream: ...
    """

    def __init__(self, engine: Engine, rows: list[Row], queue: asyncio.Queue[tuple[int, Event]]) -> None:
        self._engine, self.rows, self._queue = engine, rows, queue

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.cancel(self.rows)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        left = len(self.rows)
        while left:
            number, event = await self._queue.get()
            left -= event.last
            yield number, event


class Engine:
    """Runs a scheduler in a thread.

    Args:
        scheduler: what it runs; from now on its alone.
        max_waiting: rows that may wait for a place in the batch; beyond that :class:`Busy` is raised.
        seconds: a row's time from its arrival to its last token.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int = 256, seconds: float = 300.0) -> None:
        self.scheduler, self.max_waiting, self.seconds = scheduler, max_waiting, seconds
        self._wake = threading.Condition()
        self._arrived: deque[Row] = deque()
        self._taken: deque[float] = deque(maxlen=64)  # when rows were done lately
        self._closing, self._dead, self._deadline = False, "", 0.0
        self._given, self._stepped = 0.0, False  # when memory was last given back; whether there may be more
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self.cancelled = 0

    def start(self) -> None:
        keep_steady()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        return len(self._arrived) + len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of the rows that run."""
        return self.scheduler.cache_bytes

    def check(self, rows: int) -> None:
        """Raise Busy when so many more rows cannot wait, Stopping when none can."""
        if self._closing or self._dead or not self._thread.is_alive():
            raise Stopping(self._dead or "the server is shutting down")
        if self.waiting + rows > self.max_waiting:
            raise Busy(f"{self.waiting} rows are waiting and the queue holds {self.max_waiting}", self.retry_after)

    @property
    def retry_after(self) -> int:
        """Seconds until the rows that wait now have a place, at the rate of the last rows; 1 to 60."""
        if len(self._taken) < 2:
            return 1
        rate = len(self._taken) / max(time.monotonic() - self._taken[0], 1e-3)
        return int(min(60, max(1, math.ceil(self.waiting / rate))))

    def stream(self, prompts: Sequence[list[int]], weights: Sequence[Weights], samplings: Sequence[Sampling]) -> Stream:
        """Queue rows, all or none; called in an event loop, which gets the events.

        Raises Busy, Stopping, and LoralloyError for a row that could never run.
        """
        self.check(len(prompts))
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        deadline = time.monotonic() + self.seconds

        def teller(number: int) -> Callable[[Event], None]:
            def tell(event: Event) -> None:
                if event.last:
                    self._taken.append(time.monotonic())
                try:
                    loop.call_soon_threadsafe(queue.put_nowait, (number, event))
                except RuntimeError:  # the loop is closed: nobody listens
                    rows[number].cancelled = True

            return tell

        rows: list[Row] = []
        for i, (prompt, weight, sampling) in enumerate(zip(prompts, weights, samplings, strict=True)):
            rows.append(Row(prompt, weight, sampling, teller(i), deadline))
            self.scheduler.check(rows[-1])
        with self._wake:
            self.check(len(rows))
            self._arrived.extend(rows)
            self._wake.notify()
        return Stream(self, rows, queue)

    def cancel(self, rows: Sequence[Row]) -> None:
        """Free the places of rows that are not done."""
        for row in rows:
            if not row.done and not row.cancelled:
                row.cancelled = True
                self.cancelled += 1
        with self._wake:
            self._wake.notify()

    def later(self, job: Callable[[], None]) -> None:
        """Have something done in the decoder's thread once the rows cancelled so far have left."""
        with self._wake:
            self.scheduler.jobs.append(job)
            self._wake.notify()

    def stop(self, seconds: float = 10.0) -> None:
        """Take no more rows, give those there are this long to end, then end them."""
        deadline = time.monotonic() + seconds
        with self._wake:
            self._closing, self._deadline = True, deadline
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(seconds + 60)

    def _give_back(self) -> None:
        give_back()
        self._given, self._stepped = time.monotonic(), False

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    woken = True
                    while woken and not self._arrived and self.scheduler.idle and not self._closing:
                        woken = self._wake.wait(GIVE_BACK if self._stepped else None)
                    arrived = list(self._arrived)
                    self._arrived.clear()
                if not woken:  # without the lock, for which the event loop would wait
                    self._give_back()
                    if not arrived:
                        continue
                for row in arrived:
                    self.scheduler.submit(row)
                if self._closing and (self.scheduler.idle or time.monotonic() > self._deadline):
                    break
                self.scheduler.step()
                self._stepped = True
                if time.monotonic() > self._given + GIVE_BACK:
                    self._give_back()
        except BaseException as error:  # a fault of ours: say so to all, instead of letting them wait
            self._dead = f"the decoder has died: {type(error).__name__}: {error}"
            raise
        finally:
            why = self._dead or "the server is shutting down"
            with self._wake:
                self._closing = True
                for row in self._arrived:
                    row.tell(Event(error=why))
                self._arrived.clear()
            self.scheduler.fail(why)
