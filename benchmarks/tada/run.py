"""TaDA on real data: trains task and domain adapters, then computes cells, several processes side by side on one GPU or more.

    python benchmarks/tada/run.py --parts task domain own screen develop tried --jobs 12 --until 540   # then pairs.yaml: designs
    python benchmarks/tada/run.py --jobs 12 --until 540                                                # the rest
    python benchmarks/tada/run.py --list                                                               # what there is to do
    python benchmarks/tada/report.py --write                                                           # docs/results/tada-*

Work is taken in the order of `plan.PARTS`; a process that comes to a group that another has goes on to the next. Stopped or
killed anywhere, the same command goes on. After --until seconds nothing new is begun. A cell that fails is told, kept under
OUT/errors, and tried again by the next call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent), str(ROOT / "src")) if p not in sys.path]

from plan import HALVES, PARTS  # noqa: E402
from worker import Worker, cell_path, wanted  # noqa: E402

from queue_cells import add_flags, launch, settle  # noqa: E402

OUT = ROOT / ".assets/tada"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--half", nargs="+", choices=HALVES, default=list(HALVES))
    found.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        help="only these: " + "; ".join(f"{k}: {v[1]}" for k, v in PARTS.items()),
    )
    found.add_argument("--carry", action="store_true", help="pack the adapters too, to go on on another machine")
    add_flags(found, ".assets/tada")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = settle(parser().parse_args(words), OUT)
    if options.list:
        return listed(options)
    if options.worker:
        return Worker(options).run()
    folders = ("adapters",) if options.carry else ()
    return launch(
        __file__, words, options, lambda: sum(1 for group in wanted(options) if not done(group, options.out)), folders
    )


def done(group, out: Path) -> bool:  # type: ignore[no-untyped-def]
    return all((out / "adapters" / job.name).is_dir() for job in group.jobs) and all(
        cell_path(out, group, cell.name).is_file() for cell in group.cells
    )


def listed(options: argparse.Namespace) -> int:
    total, by = [0, 0], {}
    for group in wanted(options):
        names = [job.name for job in group.jobs] + [cell.name for cell in group.cells]
        count = by.setdefault((group.half, group.part), [0, 0])
        for n, some in enumerate((group.jobs, group.cells)):
            total[n] += len(some)
            count[n] += len(some)
        said = "done" if done(group, options.out) else "    "
        print(
            f"{said} {group.half} {group.part:8} s{group.seed} {len(names):3}: {names[0]}{' ...' if names[1:] else ''}"
        )
    for (half, part), (jobs, cells) in by.items():
        print(f"{half} {part}: {jobs} trainings, {cells} cells")
    print(f"{total[0]} trainings, {total[1]} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
