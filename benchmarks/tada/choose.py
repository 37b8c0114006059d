"""Choose the designs that the final test compares, by the development pairs alone.

    python benchmarks/tada/choose.py            # print how all stand
    python benchmarks/tada/choose.py --write    # and write the first into pairs.yaml

The rule was fixed before any cell of its round was there: of `designs.BALANCED`, at weights of 1 with the answers balanced
without labels, those with the highest accuracy on the development pairs' test rows, the mean of both halves' means over pairs;
the defaults of that time always among them, since they were what a user got. The library's defaults have followed the
choice since, but for the removal of conflicts, which adds nothing.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent), str(ROOT / "src")) if p not in sys.path]

from designs import BALANCED, METHODS  # noqa: E402
from plan import HALVES, Half, load  # noqa: E402
from results import Cells  # noqa: E402

from loralloy.atomic import atomic_file  # noqa: E402
from loralloy.errors import LoralloyError  # noqa: E402
from pages import table  # noqa: E402

COUNT, ALWAYS = 4, "default"


def accuracy(half: Half, cells: Cells, name: str) -> float:
    """The mean over development pairs; nan where a pair or a seed is missing."""
    found = cells.of(name, "balanced", half.rank)
    wanted = {(pair, seed) for pair in half.pairs("development") for seed in half.development_seeds}
    return cells.average(name, "balanced", half.rank) if wanted <= found.keys() else math.nan


def ranked(halves: Sequence[Half], folder: Path) -> list[tuple[float, str, list[float]]]:
    """(mean, design, by half), the best first; equals in the order of `BALANCED`; those that lack cells last, as nan."""
    cells = [Cells.load(folder / f"{half.name}-develop") for half in halves]
    found = []
    for name in BALANCED:
        by = [accuracy(half, some, name) for half, some in zip(halves, cells, strict=True)]
        found.append((sum(by) / len(by), name, by))
    return sorted(found, key=lambda one: (math.isnan(one[0]), -one[0]))


def chosen(order: Sequence[tuple[float, str, list[float]]]) -> list[str]:
    """The first of them, the defaults of that time among them."""
    names = [name for mean, name, _ in order if not math.isnan(mean)]
    first = names[:COUNT]
    return first if ALWAYS in first else [*first[: COUNT - 1], ALWAYS]


def written(text: str, names: Sequence[str]) -> str:
    """pairs.yaml with these designs. Raises LoralloyError unless it has one line of them."""
    text, count = re.subn(r"(?m)^designs: \[.*\]$", f"designs: [{', '.join(names)}]", text)
    if count != 1:
        raise LoralloyError(f"pairs.yaml: {count} lines `designs: [...]`, not one")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=ROOT / ".assets/tada/cells")
    parser.add_argument("--write", action="store_true", help="write them into pairs.yaml")
    options = parser.parse_args(argv)
    halves = [load(name) for name in HALVES]
    order = ranked(halves, options.cells)
    rows = [[METHODS[name].title, f"{100 * mean:.2f}", *(f"{100 * v:.2f}" for v in by)] for mean, name, by in order]
    print("\n".join(table(["design, balanced", "both", *HALVES], rows)))
    names = chosen(order)
    print(f"designs: {', '.join(names)}")  # of those that are whole
    if options.write:
        if lacking := [name for mean, name, _ in order if math.isnan(mean)]:
            raise LoralloyError(
                f"{options.cells}: the development cells of {', '.join(lacking)} are not all there; "
                "run.py --parts task domain develop"
            )
        file = HERE / "pairs.yaml"
        atomic_file(file, written(file.read_text(encoding="utf-8"), names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
