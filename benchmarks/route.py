"""What routing one query costs on a warm index, beyond embedding it: ``python benchmarks/route.py --write``.

Puts the tasks' rows into both stores (both vectors of a row, so 22,000 rows make 44,000 vectors), fits the
routers, and times ``weigh_vectors`` for one query at a time: search, weights, the five nearest examples with their texts.
With --write it makes docs/results/route.md. Vectors are kept in .assets/vectors between runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from loralloy.atomic import atomic_file
from loralloy.console import console, out
from loralloy.retrieval import Embedder
from loralloy.tasks import load_tasks
from loralloy.weighting import open_weigher
from vectors import CachedEncoder, ask, build_index

ROUTERS = {"paper": "the paper's kernel, k = 100", "kernel": "tuned kernel", "probe": "probe"}
ROUNDS = 5


def milliseconds(weigher, queries: np.ndarray) -> np.ndarray:
    """Of each query [m], asked alone, after five to warm up."""
    for query in queries[:5]:
        weigher.weigh_vectors(query[None])
    took = []
    for query in queries:
        start = time.perf_counter()
        weigher.weigh_vectors(query[None])
        took.append(time.perf_counter() - start)
    return np.array(took) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["examples/tasks"], help="task files, or folders of them")
    parser.add_argument("--rows", type=int, default=1796, help="training rows a task, at most (1,796: 44,078 vectors)")
    parser.add_argument("--queries", type=int, default=15, help="validation rows a task and kind of query")
    parser.add_argument("--write", action="store_true", help="make docs/results/route.md")
    options = parser.parse_args()

    tasks, encoder = load_tasks(options.tasks), CachedEncoder(Embedder())
    asked = {kind: ask(tasks, encoder, "validation", options.queries, kind)[0] for kind in ("hinted", "raw")}
    queries = np.concatenate(list(asked.values()))
    texts = [e.raw for task in tasks for e in task.examples("validation")[:5]]
    encoder.inner.encode(texts[:2])
    spent = []
    for text in texts:
        start = time.perf_counter()
        encoder.inner.encode([text])
        spent.append(time.perf_counter() - start)
    alone = float(np.median(spent)) * 1e3

    lines, vectors = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for store in ("exact", "chroma"):
            console.print(f"building the {store} store")
            index = build_index(Path(folder) / store, tasks, encoder, store, options.rows, 0, "both")
            vectors = sum(entry.vectors for entry in index.tasks.values())
            weighers = {kind: open_weigher(index, kind, unlike=True) for kind in ROUTERS}
            rounds: dict[str, list[np.ndarray]] = {kind: [] for kind in ROUTERS}
            for weigher in weighers.values():
                weigher.prepare()
            for _ in range(ROUNDS):
                for kind, weigher in weighers.items():
                    rounds[kind].append(milliseconds(weigher, queries))
            for kind, heading in ROUTERS.items():
                low, high = np.percentile(min(rounds[kind], key=np.median), [50, 95])
                lines.append(f"| {store} | {heading} | {low:.2f} | {high:.2f} |")
                console.print(lines[-1], markup=False)
            index.close()

    names = ("numpy", "chromadb", "scikit-learn", "sentence-transformers", "torch")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    threads, load = os.environ.get("OMP_NUM_THREADS", "not set"), os.getloadavg()[0]
    text = "\n".join(
        [
            "# Routing one query on a warm index",
            "",
            f"Written by `python benchmarks/route.py --write`: {vectors:,} vectors of {len(tasks)} tasks (both vectors of a "
            f"row), {len(queries)} validation queries, one at a time. A query's cost beyond its embedding: search, weights, "
            f"the five nearest examples with their texts, and the score of being unlike the index. Of {ROUNDS} rounds "
            "the one with the least median, since other work disturbs a round.",
            "",
            "| store | router | median, ms | 95th percentile, ms |",
            "|---|---|---|---|",
            *lines,
            "",
            f"Embedding one query takes {alone:.1f} ms here (median). The asked figure is at most 5 ms at 44,000 vectors.",
            "",
            f"{packages}; Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} "
            f"cores, OMP_NUM_THREADS {threads}, load average {load:.1f} (other work ran on the machine when it is above 1).",
            "",
        ]
    )
    out.print(text, markup=False, soft_wrap=True)
    if options.write:
        atomic_file("docs/results/route.md", text)


if __name__ == "__main__":
    main()
