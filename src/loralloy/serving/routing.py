"""Routing for many clients: texts that arrive while others are embedded are embedded together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..errors import LoralloyError
from ..weighting import Weigher, fall_back
from ..weights import Weights
from .engine import Busy


class Routing:
    """Weighs texts in a thread, one batch after the other; a batch is whatever has arrived during the one before.

    A lone text does not wait for company, and under load an embedder runs on many texts at once.

    Args:
        weigher: over the tasks that have an adapter (see :func:`loralloy.weighting.open_weigher`), prepared.
        threshold: a text more unlike the index than this gets the base model alone; 1: never.
        max_batch, max_waiting: texts of one batch, and texts that may wait for the next.
        on_batch: called with a batch's texts and seconds.
    """

    def __init__(
        self,
        weigher: Weigher,
        threshold: float = 1.0,
        max_batch: int = 64,
        max_waiting: int = 512,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        self.weigher, self.threshold = weigher, threshold
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._on_batch = on_batch or (lambda *_: None)
        self._pool = ThreadPoolExecutor(1, "router")
        self._waiting: list[tuple[str, asyncio.Future[Weights]]] = []
        self._task: asyncio.Task[None] | None = None

    async def weigh(self, texts: Sequence[str]) -> list[Weights]:
        """One Weights a text, in order. Raises LoralloyError for an empty text, Busy when too many wait."""
        if any(not text.strip() for text in texts):
            raise LoralloyError("the text to route is empty")
        if len(self._waiting) + len(texts) > self.max_waiting:
            raise Busy(f"{len(self._waiting)} texts wait for the router", 1)
        loop = asyncio.get_running_loop()
        asked = [(text, loop.create_future()) for text in texts]
        self._waiting += asked
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        return list(await asyncio.gather(*(future for _, future in asked)))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [(t, f) for t, f in self._waiting[: self.max_batch] if not f.cancelled()]
            del self._waiting[: self.max_batch]
            if not batch:
                continue
            start = time.perf_counter()
            try:
                made = await loop.run_in_executor(self._pool, self.weigher.weigh_batch, [t for t, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            self._on_batch(len(batch), time.perf_counter() - start)
            for (_, future), weights in zip(batch, made, strict=True):
                if not future.done():
                    future.set_result(fall_back(weights, self.threshold))
