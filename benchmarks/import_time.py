"""What `import loralloy` costs on top of `import torch`: ``python benchmarks/import_time.py``.

Every figure is the median over fresh processes, taken in turns so that a slow moment of the machine meets all alike; the
first process of each, which fills the caches, is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from rich.progress import track
from rich.table import Table

from loralloy.console import console, out

STATEMENTS = ("import torch", "import torch, loralloy", "from loralloy import Adapter, Bank, merge")
HEAVY = ("transformers", "peft", "chromadb", "sentence_transformers", "matplotlib")
CODE = """
import sys, time
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
print(*[name for name in {heavy!r} if name in sys.modules])
"""


def measure(statement: str) -> tuple[float, str]:
    """Seconds that a statement takes in a fresh process, and the heavy packages that it brought along."""
    code = CODE.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, brought = done.stdout.split("\n")[:2]
    return float(seconds), brought


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9, help="processes a statement (default 9)")
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    brought: dict[str, str] = {}
    for n in track(range(runs + 1), "importing", console=console, transient=True):
        for statement in STATEMENTS:
            took, brought[statement] = measure(statement)
            if n:
                seconds[statement].append(took)
    median = {statement: statistics.median(values) for statement, values in seconds.items()}
    table = Table(title=f"median of {runs} fresh processes", title_justify="left")
    for heading in ("statement", "seconds", "fastest", "slowest", "more than torch", "heavy packages"):
        table.add_column(heading, justify="left" if heading in ("statement", "heavy packages") else "right")
    for statement, values in seconds.items():
        more = f"{median[statement] - median[STATEMENTS[0]]:+.3f}" if statement != STATEMENTS[0] else ""
        spread = (f"{median[statement]:.3f}", f"{min(values):.3f}", f"{max(values):.3f}")
        table.add_row(statement, *spread, more, brought[statement] or "none")
    out.print(table)


if __name__ == "__main__":
    main()
