"""Runs a suite's cells: those that are not done, the longest first, in this process or in several side by side."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LoralloyError
from .cells import Cell, cells_of, done, fingerprint, write_cell
from .locks import lock
from .run import Run
from .schema import Suite
from .workbench import Workbench

if TYPE_CHECKING:
    from ...retrieval.embed import TextEncoder

Progress = Callable[[Cell, int], None]


@dataclass(frozen=True)
class Ran:
    """What a run of a suite did: cells made now, cells that were there, seconds, and where they lie."""

    made: int
    kept: int
    seconds: float
    out: Path


def parse_shard(text: str) -> tuple[int, int]:
    """``"2/4"`` -> (2, 4): the second of four parts. Raises LoralloyError for anything else."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise LoralloyError(f"--shard {text!r} is not valid; give i/n with i from 1 to n, such as 2/4")
    return int(i), int(n)


def run_suite(
    suite: Suite,
    *,
    shard: tuple[int, int] | None = None,
    jobs: int = 1,
    embedder: TextEncoder | None = None,
    show: bool = True,
) -> Ran:
    """Run every cell of `suite` that is not done yet; a run that was killed goes on where it was.

    Args:
        suite: what to run, and where its cells go.
        shard: (i, n): only the i-th of n parts of the cells, for machines that share the output folder.
        jobs: processes side by side on this machine; they take cells as they become free.
        embedder: in place of the suite's; for one process only.
        show: a progress bar (plain lines where there is no terminal).

    Raises LoralloyError, before any work where it can, for what is missing or does not fit; with `jobs`, for the first
    process that failed, once the others have finished their cell.
    """
    start = time.perf_counter()
    if jobs < 1:
        raise LoralloyError(f"--jobs {jobs}: give the number of processes, at least 1")
    if jobs > 1 and embedder is not None:
        raise LoralloyError("an embedder that is passed in stays in this process; name it in the suite, or use one job")
    cells = cells_of(suite)
    if shard is not None:
        cells = by_length(cells, suite)[shard[0] - 1 :: shard[1]]
    suite.out.mkdir(parents=True, exist_ok=True)
    bench = Workbench(suite, embedder)
    try:
        for cell in cells:
            cell.method.check(Run(bench, cell.query, cell.scope, cell.seed))
        with _status("embedding texts and building the indices" if show else ""):
            bench.prepare(suite.methods)
        marks = {cell.name: fingerprint(cell, bench) for cell in cells}
        todo = by_length([cell for cell in cells if not done(cell, suite.out, marks[cell.name])], suite)
        sizes = {rows: len(bench.examples(rows)) for rows in {suite.rows_of(cell.method) for cell in todo}}
        total = sum(sizes[suite.rows_of(cell.method)] for cell in todo)
        with _bar(total, len(todo), show) as (advance, finished):
            if jobs == 1 or len(todo) < 2:
                run_cells(todo, marks, bench, advance, finished)
            else:
                from .worker import run_workers

                bench.close()
                bench = Workbench(suite)  # lets the model go: the workers load their own
                _free()
                run_workers(suite, todo, marks, min(jobs, len(todo)), advance, finished)
    finally:
        bench.close()
    return Ran(len(todo), len(cells) - len(todo), time.perf_counter() - start, suite.out)


def by_length(cells: Sequence[Cell], suite: Suite) -> list[Cell]:
    """The longest first, so that processes end together."""
    return sorted(cells, key=lambda cell: (-cell.method.cost * suite.rows_of(cell.method), cell.name))


def run_cells(
    cells: Sequence[Cell],
    marks: dict[str, str],
    bench: Workbench,
    advance: Progress | None = None,
    finished: Callable[[Cell, float], None] | None = None,
) -> int:
    """Run these cells here, but for those that another process runs or has run meanwhile; returns how many were run."""
    count = 0
    for cell in cells:
        with lock(bench.suite.out / "locks" / cell.name, wait=False) as mine:
            if not mine or done(cell, bench.suite.out, marks[cell.name]):
                continue
            start = time.perf_counter()
            _run_in_memory(cell, marks[cell.name], bench, advance)
            count += 1
            if finished:
                finished(cell, time.perf_counter() - start)
    return count


def _run_in_memory(cell: Cell, mark: str, bench: Workbench, advance: Progress | None) -> None:
    """Run a cell; where the GPU's memory is short (others use it too), again with what is kept let go and half the batch."""
    import torch

    while True:
        try:
            run_cell(cell, mark, bench, advance)
            return
        except torch.cuda.OutOfMemoryError as error:
            if bench.batch_size == 1:
                raise LoralloyError(
                    f"cell {cell.name}: the GPU's memory is too short even for one row at a time; use fewer --jobs"
                ) from error
            bench.batch_size = max(1, bench.batch_size // 2)
        bench.forget()  # outside `except`, whose error holds the tensors
        _free()


def run_cell(cell: Cell, mark: str, bench: Workbench, advance: Progress | None = None) -> Path:
    """Answer one cell's examples and write its file. Raises LoralloyError naming the cell."""
    examples = bench.examples(bench.suite.rows_of(cell.method))
    report = (lambda n: advance(cell, n)) if advance else None
    run = Run(bench, cell.query, cell.scope, cell.seed, report)
    cuda = "model" in cell.method.uses and bench.device.type == "cuda"
    if cuda:
        import torch

        bench.live  # noqa: B018 - loaded before the count begins
        torch.cuda.reset_peak_memory_stats(bench.device)
    held = int(torch.cuda.memory_allocated(bench.device)) if cuda else None
    start = time.perf_counter()
    try:
        rows = cell.method.answer(run, examples)
    except LoralloyError as error:
        raise error.within(f"cell {cell.name}") from error
    wall = time.perf_counter() - start
    if len(rows) != len(examples):
        raise LoralloyError(f"cell {cell.name}: {len(rows)} answers for {len(examples)} examples; the method is wrong")
    peak = int(torch.cuda.max_memory_allocated(bench.device)) if cuda else None
    return write_cell(cell, run, examples, rows, mark, wall, peak, held)


@contextlib.contextmanager
def _status(words: str) -> Iterator[None]:
    from ...console import console

    if words and console.is_terminal:
        with console.status(words):
            yield
    else:
        yield


@contextlib.contextmanager
def _bar(total: int, cells: int, show: bool) -> Iterator[tuple[Progress | None, Callable[[Cell, float], None]]]:
    """One bar over all rows; a line a cell where there is no terminal."""
    from ...console import console, progress

    count = 0

    def line(cell: Cell, seconds: float) -> None:
        nonlocal count
        count += 1
        if show and not console.is_terminal:
            console.print(f"{count}/{cells} {cell.name.replace('__', ' ')}: {seconds:.1f} s", markup=False)

    if not show or not cells:
        yield None, line
        return
    with progress() as bar:
        job = bar.add_task("", total=total)

        def advance(cell: Cell, n: int) -> None:
            bar.update(job, advance=n, description=cell.method.title())

        yield advance, line


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def overridden(suite: Suite, **changes: Any) -> Suite:
    """The suite with other top-level fields (None leaves one as it is)."""
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(suite, fields=suite.fields.model_copy(update=given)) if given else suite
