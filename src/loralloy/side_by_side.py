"""Many small pieces of work on a CPU, side by side in threads."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def one_thread_each(most: int = 8) -> Iterator[int]:
    """How many threads to start inside the block: one a piece of work instead of several an operation.

    The operations are many and small, and several threads of one operation wait for each other: that costs more than they
    do, and ten times as much where another process wants the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of threads that begin from now on, too
    try:
        yield min(threads, most)
    finally:
        torch.set_num_threads(threads)


def in_order(work: Callable[[T], R], items: Iterable[T], ahead: int = 1) -> Iterator[R]:
    """`work` of every item, in order; at most one a thread and `ahead` more are being done or wait to be taken.

    Gradients are on or off as they are where this is called: PyTorch keeps that by thread.
    """
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alike(item: T) -> R:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(item)

    with one_thread_each() as workers:
        pool = ThreadPoolExecutor(workers)
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(alike, item))
                if len(waiting) >= workers + ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
