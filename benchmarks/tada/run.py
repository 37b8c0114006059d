"""TaDA on real data: trains task and domain adapters, then computes cells, several processes side by side on one GPU or more.

    python benchmarks/tada/run.py --parts task domain own screen develop --jobs 12 --until 540
    python benchmarks/tada/choose.py --write                                                           # pairs.yaml: designs
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
from worker import Worker  # noqa: E402

from queue_command import add_flags, command, list_groups  # noqa: E402

OUT = ROOT / ".assets/tada"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--half", nargs="+", choices=HALVES, default=list(HALVES))
    add_flags(found, ".assets/tada", {name: what for name, (_, what) in PARTS.items()})
    found.add_argument(
        "--carry",
        dest="packed",
        action="store_const",
        const=("adapters",),
        default=(),
        help="pack the adapters too, to go on on another machine",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    return command(__file__, argv, parser(), OUT, Worker, listed)


def listed(options: argparse.Namespace) -> int:
    return list_groups(options, Worker, 8, by_part=True)


if __name__ == "__main__":
    sys.exit(main())
