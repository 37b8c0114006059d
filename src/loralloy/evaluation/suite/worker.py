"""One of several processes that run a suite's cells; the first process starts them and reads how far they are."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...atomic import atomic_file
from ...console import console
from ...errors import LoralloyError
from .cells import Cell, cells_of
from .schema import Suite


def run_workers(
    suite: Suite,
    cells: Sequence[Cell],
    marks: dict[str, str],
    jobs: int,
    advance: Callable[[Cell, int], None] | None,
    finished: Callable[[Cell, float], None],
) -> None:
    """Start `jobs` processes over these cells and wait for them. Raises LoralloyError for the first that failed."""
    plan = suite.out / "cache" / f"plan-{os.getpid()}.json"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    changes = suite.fields.model_dump(mode="json", include={"out", "rows", "batch_size", "device"})
    names = [cell.name for cell in cells]
    order = {
        "suite": str(suite.path), "only": [m.name for m in suite.methods], "changes": changes, "cells": names,
        "marks": {name: marks[name] for name in names}, "threads": max(1, cpus // jobs),
    }  # fmt: skip
    atomic_file(plan, json.dumps(order))
    by_name = {cell.name: cell for cell in cells}
    events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    environment = os.environ | {"OMP_NUM_THREADS": str(order["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(plan), str(n)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
            text=True, encoding="utf-8", env=environment,
        )
        for n in range(jobs)
    ]  # fmt: skip
    problems: list[str] = []
    try:
        for n, worker in enumerate(workers):
            threading.Thread(target=_listen, args=(n, worker, events), daemon=True).start()
        left = len(workers)
        while left:
            n, event = events.get()
            if event is None:
                left -= 1
                if workers[n].wait() and not problems:
                    problems.append(
                        f"a process of the suite ended with code {workers[n].returncode}; run again to go on"
                    )
            elif "error" in event:
                problems.append(str(event["error"]))
                console.print(f"error: {problems[-1]}", style="red", markup=False)
            elif "seconds" in event:
                finished(by_name[event["cell"]], event["seconds"])
            elif advance:
                advance(by_name[event["cell"]], event["rows"])
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(10)
            if worker.stdout:
                worker.stdout.close()
        plan.unlink(missing_ok=True)
        for name in names:
            _spoilt(plan, name).unlink(missing_ok=True)
    if problems:
        more = f" (and {len(problems) - 1} more, above; all other cells are done)" if len(problems) > 1 else ""
        raise LoralloyError(problems[0] + more)


def _listen(n: int, worker: subprocess.Popen[str], events: queue.Queue[tuple[int, dict[str, Any] | None]]) -> None:
    assert worker.stdout is not None
    with contextlib.suppress(ValueError):  # closed under it when the suite ends early
        for line in worker.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # a library's own words
                event = json.loads(line)
                if isinstance(event, dict):
                    events.put((n, event))
    events.put((n, None))


def in_turn(cells: Sequence[Cell], number: int) -> list[Cell]:
    """The order in which process `number` looks for cells.

    A hinted query finds its own task under nearly any router, so these cells give the same compositions again and again,
    which one process answers once: the first process begins with them, the others end with them.
    """

    def alike(cell: Cell) -> bool:
        return cell.scope == "in_domain" and cell.query == "hinted" and cell.method.rank == "live"

    return sorted(cells, key=lambda cell: alike(cell) != (number == 0))


def _spoilt(plan: Path, cell: str) -> Path:
    """The mark that a cell failed in one process, so that the others do not run into it too."""
    return plan.with_name(f"{plan.stem}-{cell}.failed")


def work(plan: Path, number: int = 0) -> int:
    """Run the cells of a plan that nobody else runs, saying on stdout, line by line in JSON, how far it is."""
    import torch

    from .runner import overridden, run_cells
    from .workbench import Workbench

    order = json.loads(plan.read_text(encoding="utf-8"))
    torch.set_num_threads(order["threads"])

    def say(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)

    bench, failed = None, False
    try:
        suite = overridden(Suite.load(order["suite"]).only(order["only"]), **order["changes"])
        known = {cell.name: cell for cell in cells_of(suite)}
        bench = Workbench(suite)
        for cell in in_turn([known[name] for name in order["cells"]], number):
            spoilt = _spoilt(plan, cell.name)
            if spoilt.exists():
                continue
            try:
                run_cells(
                    [cell], order["marks"], bench,
                    lambda cell, n: say({"cell": cell.name, "rows": n}),
                    lambda cell, seconds: say({"cell": cell.name, "seconds": seconds}),
                )  # fmt: skip
            except BrokenPipeError:
                raise
            except Exception as error:  # one cell's trouble: the others go on, and it is told at the end
                failed = True
                spoilt.touch()
                if not isinstance(error, LoralloyError):
                    traceback.print_exc()
                    error = LoralloyError(f"cell {cell.name} failed: {type(error).__name__}: {error}")
                say({"error": str(error)})
        return int(failed)
    except BrokenPipeError:  # whoever started this is gone; cells that are done stay
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except LoralloyError as error:
        say({"error": str(error)})
        return 1
    except Exception as error:
        traceback.print_exc()
        say({"error": f"a process of the suite failed: {type(error).__name__}: {error}"})
        return 1
    finally:
        if bench is not None:
            bench.close()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(work(Path(sys.argv[1]), int(sys.argv[2])))
