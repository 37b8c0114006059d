"""How often Chroma finds what exact search finds, and what each costs: ``python benchmarks/recall.py``.

Embeds up to --rows training rows a task once, puts them into both stores, and asks with held-out rows, with the task's
hint and without. Recall@100 is by id: the share of the exact 100 nearest rows that Chroma returned. Latency is a search
alone, one query at a time; embedding it is timed apart. Writes docs/results/recall.md.
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
from loralloy.retrieval.chroma import HNSW, ChromaStore
from loralloy.retrieval.rows import task_rows
from loralloy.retrieval.store import ExactStore, Store
from loralloy.tasks import load_tasks
from loralloy.weighting import Router


def timed(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def latencies(store: Store, queries: np.ndarray, k: int, **options) -> np.ndarray:
    """Milliseconds of each query [m], asked alone, after one to warm up."""
    store.query(queries[:1], k, **options)
    return np.array([timed(lambda q=q: store.query(q[None], k, **options))[1] for q in queries]) * 1e3


class Asked:
    """What a Router needs of an index, over one store and queries that are vectors already."""

    def __init__(self, store: Store) -> None:
        self.store, self.texts = store, store.texts

    def search(self, vectors, k, exclude=(), only=None):
        return self.store.query(vectors, k)


def compare(exact: Store, chroma: Store, queries: np.ndarray, owners: list[str], k: int) -> dict[str, float]:
    true, _, true_tasks = exact.query(queries, k)
    found, _, _ = chroma.query(queries, k)
    recalls = np.array([len(set(a) & set(b)) / len(a) for a, b in zip(true, found, strict=True)])
    routes = [Router(Asked(store), k=k, show=0).weigh_vectors(queries) for store in (exact, chroma)]
    names = sorted(set(owners))
    moved = [sum(abs(a.of(n) - b.of(n)) for n in names) / 2 for a, b in zip(*routes, strict=True)]
    return {
        "recall": recalls.mean(),
        "worst": recalls.min(),
        "below": (recalls < 0.99).mean(),
        "moved": max(moved),
        "nearest": np.mean([tasks[0] == owner for tasks, owner in zip(true_tasks, owners, strict=True)]),
        "top": np.mean([w.names[0] == owner for w, owner in zip(routes[0], owners, strict=True)]),
        "own": np.mean([w.of(owner) for w, owner in zip(routes[0], owners, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index-tasks", default="examples/tasks", help="task files: a folder or one file")
    parser.add_argument("--rows", type=int, default=2000, help="training rows a task, at most")
    parser.add_argument("--queries", type=int, default=50, help="held-out rows a task, at most")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--embedder", default=None, help="folder or org/name@revision")
    parser.add_argument("--output", default="docs/results/recall.md")
    options = parser.parse_args()

    tasks, embedder = load_tasks(options.index_tasks), Embedder(options.embedder)
    tables, adding = {}, {}
    for template in ("hinted", "raw"):
        rows = {task.name: task_rows(task, options.rows, 0, template) for task in tasks}
        console.print(f"{template}: {sum(len(ids) for ids, _ in rows.values())} rows of {len(tasks)} tasks")
        flat = [text for _, texts in rows.values() for text in texts]
        vectors, embedding = timed(lambda flat=flat: embedder.encode(flat, progress=True))
        held = [e for task in tasks for e in task.examples("test", options.queries)]
        asked = [e.query if template == "hinted" else e.raw for e in held]
        queries = embedder.encode(asked, progress=True)
        _, alone = timed(lambda asked=asked: [embedder.encode([text]) for text in asked[:50]])
        with tempfile.TemporaryDirectory() as folder:
            stores = {"exact": ExactStore(Path(folder) / "exact"), "chroma": ChromaStore(Path(folder) / "chroma")}
            for kind, store in stores.items():
                start, spent = 0, 0.0
                for name, (ids, texts) in rows.items():
                    part = vectors[start : start + len(ids)]
                    spent += timed(lambda s=store, n=name, i=ids, v=part, t=texts: s.add(n, i, v, t))[1]
                    start += len(ids)
                adding[template, kind] = spent
            result = compare(stores["exact"], stores["chroma"], queries, [e.task for e in held], options.k)
            result |= {
                "rows": len(flat),
                "queries": len(queries),
                "embedding": embedding,
                "alone": alone / len(asked[:50]),
            }
            for kind, store in stores.items():
                result[kind] = latencies(store, queries, options.k)
            own = tasks[0].name
            without = {task.name for task in tasks} - {own}
            mine = queries[[e.task == own for e in held]]
            for kind, store in stores.items():
                result[f"{kind}-without"] = latencies(store, mine, options.k, tasks=without)
            for store in stores.values():
                store.close()
        tables[template] = result

    text = report(tables, adding, tasks, embedder.identity, options.k)
    atomic_file(options.output, text)
    out.print(text, markup=False, soft_wrap=True)


def report(tables: dict, adding: dict, tasks: list, identity: str, k: int) -> str:
    kinds = list(tables)
    rows = [
        ("rows in the index", lambda t: f"{t['rows']:,}"),
        ("held-out queries", lambda t: f"{t['queries']:,}"),
        (f"**Chroma recall@{k}, mean**", lambda t: f"**{t['recall']:.4f}**"),
        (f"Chroma recall@{k}, worst query", lambda t: f"{t['worst']:.2f}"),
        ("queries with recall below 0.99", lambda t: f"{100 * t['below']:.1f}%"),
        ("largest change of the routed weights (total variation)", lambda t: f"{t['moved']:.4f}"),
        (
            "exact search, ms a query (median, 95th percentile)",
            lambda t: "{:.1f}, {:.1f}".format(*np.percentile(t["exact"], [50, 95])),
        ),
        (
            "Chroma search, ms a query (median, 95th percentile)",
            lambda t: "{:.1f}, {:.1f}".format(*np.percentile(t["chroma"], [50, 95])),
        ),
        ("exact, leaving the query's task out, ms (median)", lambda t: f"{np.median(t['exact-without']):.1f}"),
        ("Chroma, leaving the query's task out, ms (median)", lambda t: f"{np.median(t['chroma-without']):.1f}"),
        ("embedding one query, ms", lambda t: f"{1e3 * t['alone']:.1f}"),
        ("embedding all rows, s", lambda t: f"{t['embedding']:.0f}"),
    ]
    lines = [
        "# Chroma against exact search",
        "",
        "Written by `python benchmarks/recall.py`; recall is by id against the NumPy store, which is exact.",
        "",
        "| | " + " | ".join("with hints" if kind == "hinted" else "raw text" for kind in kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    lines += [f"| {name} | " + " | ".join(show(tables[kind]) for kind in kinds) + " |" for name, show in rows]
    lines += [
        f"| adding all rows to {store}, s | " + " | ".join(f"{adding[kind, store]:.1f}" for kind in kinds) + " |"
        for store in ("exact", "chroma")
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{tables[kind][key]:.3f}" for kind in kinds) + " |"
        for name, key in (
            ("nearest row is of the query's task", "nearest"),
            (f"routing as in the paper (k = {k}, p = 0.9): own task is first", "top"),
            ("routing as in the paper: mean weight of the own task", "own"),
        )
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("chromadb", "numpy", "sentence-transformers", "torch"))
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    lines += [
        "",
        f"Tasks: {', '.join(task.name for task in tasks)}.",
        "",
        f"HNSW: {', '.join(f'{key} {value}' for key, value in HNSW.items())}. Embedder: {identity}. "
        "These settings were chosen among six on the same hinted queries, so the hinted column is no independent check of "
        "the choice; the raw column played no part in it. Chroma's graph differs a little from build to build.",
        "",
        f"{packages}; {machine}, OMP_NUM_THREADS {threads}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
