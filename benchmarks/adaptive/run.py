"""Adaptive merging on real data: trains the adapters, then computes cells, several processes side by side on one GPU.

    python benchmarks/adaptive/run.py --bench emoji4 sentiment4 --jobs 12 --until 540
    python benchmarks/adaptive/run.py --bench emoji4 --list          # what there is to do, in order
    python benchmarks/adaptive/report.py --write                     # docs/results/adaptive-*

    python benchmarks/adaptive/run.py --bench emoji4 --beside docs/results --jobs 12   # what the page does not have yet, on the
    python benchmarks/adaptive/report.py emoji --write --add                           # same adapters, trained again

Work is taken in the order of `parts.PARTS`; a process that comes to a group that another has goes on to the next. Stopped or
killed anywhere, the same command goes on: an adapter or a cell that is there is not made again. After --until seconds
nothing new is begun. A cell that fails is told, kept under OUT/errors, and tried again by the next call; one that finds no
memory comes back at the end of this one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent), str(ROOT / "src")) if p not in sys.path]

from parts import PARTS  # noqa: E402
from plan import BENCHES  # noqa: E402
from worker import Worker  # noqa: E402

from queue_command import add_flags, command, list_groups  # noqa: E402

OUT = ROOT / ".assets/adaptive"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--bench", nargs="+", choices=list(BENCHES), default=["emoji4", "sentiment4"])
    found.add_argument(
        "--beside", type=Path, metavar="DOCS", help="leave out the cells that this folder's adaptive-*.json have"
    )
    add_flags(found, ".assets/adaptive", {name: part.what for name, part in PARTS.items()})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    return command(__file__, argv, parser(), OUT, Worker, listed)


def listed(options: argparse.Namespace) -> int:
    return list_groups(options, Worker, 5)


if __name__ == "__main__":
    sys.exit(main())
