"""How well each router finds a query's own task: ``python benchmarks/routing.py --write``.

Test rows are asked with their task's hint and raw, of an index of both vectors a row, for each seed of index sampling.
Nothing is chosen on test rows: the routers fit themselves to the index's training rows. --write makes
docs/results/routing.md and routing.png (which task raw queries of each task go to). Vectors are kept in .assets/vectors.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from loralloy.atomic import atomic_file
from loralloy.console import console, out, progress
from loralloy.retrieval import Embedder
from loralloy.tasks import load_tasks
from loralloy.weighting import open_weigher
from loralloy.weighting.linear_probe import calibration_error
from vectors import CachedEncoder, ask, build_index

ROUTERS = {
    "hinted-paper": "the paper's kernel, index of hinted rows",
    "paper": "the paper's kernel, index of both",
    "kernel": "tuned kernel",
    "probe": "linear probe",
}
QUERIES = ("hinted", "raw")


def figures(weights, owners, names) -> dict[str, np.ndarray | float]:
    """Per query: own task first, weight on it, adapters used; and the calibration error of the masses."""
    masses = np.array([[w.explain["mass"].get(name, 0.0) for name in names] for w in weights])
    own = np.array([names.index(owner) for owner in owners])
    return {
        "top": np.array([max(w.names, key=w.of) for w in weights]) == np.array(owners),
        "own": np.array([w.of(owner) for w, owner in zip(weights, owners, strict=True)]),
        "size": np.array([len(w.names) for w in weights]),
        "ece": calibration_error(masses, own),
        "route": np.array([names.index(max(w.names, key=w.of)) for w in weights]),
    }


def by_task(values: np.ndarray, owners: list[str], names: list[str]) -> np.ndarray:
    """The mean of each task's queries [tasks]; tables give the mean of these, so that tasks count the same."""
    held = np.array(owners)
    return np.array([values[held == name].mean() for name in names])


def area(inside: np.ndarray, outside: np.ndarray) -> float:
    """Area under the ROC curve: how often an outsider scores higher than an insider, ties half."""
    both = np.sort(inside)
    below, upto = np.searchsorted(both, outside, "left"), np.searchsorted(both, outside, "right")
    return float((below + upto).mean() / 2 / len(inside))


def withheld(index, asked, names, console_progress) -> dict[str, list[tuple[float, float, float]]]:
    """For each task, the index without it: area under the curve of its queries against the others', and the shares of
    either that exceed 0.99."""
    result: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with console_progress as bar:
        for name in bar.track(names, description="withholding"):
            weigher = open_weigher(index, "kernel", only=[n for n in names if n != name], show=0)
            for kind in QUERIES:
                vectors, owners = asked[kind]
                scores = np.array([w.explain["unlike"] for w in weigher.weigh_vectors(vectors)])
                out_of = np.array(owners) == name
                result[kind].append((area(scores[~out_of], scores[out_of]), (scores[~out_of] > 0.99).mean(),
                                     (scores[out_of] > 0.99).mean()))  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["examples/tasks", "examples/suite/tasks"])
    parser.add_argument("--rows", type=int, default=500, help="training rows a task, at most")
    parser.add_argument("--queries", type=int, default=100, help="test rows a task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--no-withheld", action="store_true", help="skip the withheld tasks (a leave-one-out pass a task)"
    )
    parser.add_argument("--write", action="store_true", help="make docs/results/routing.md and routing.png")
    options = parser.parse_args()

    tasks, encoder = load_tasks(options.tasks), CachedEncoder(Embedder())
    names = sorted(task.name for task in tasks)
    families = {task.name: task.family for task in tasks}
    asked = {kind: ask(tasks, encoder, "test", options.queries, kind) for kind in QUERIES}
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    settings, report, outside = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for template in ("hinted", "both"):
                place = Path(folder) / f"{template}-{seed}"
                index = build_index(place, tasks, encoder, "exact", options.rows, seed, template)
                for router in ROUTERS:
                    if (router == "hinted-paper") != (template == "hinted"):
                        continue
                    weigher = open_weigher(index, router.removeprefix("hinted-"), show=0)
                    weigher.prepare()
                    for kind in QUERIES:
                        vectors, owners = asked[kind]
                        found[router, kind].append(figures(weigher.weigh_vectors(vectors), owners, names))
                    console.print(f"seed {seed}: {router}", weigher.settings, markup=False)
                    if router in ("kernel", "probe"):
                        settings.append(f"seed {seed}, {router}: {weigher.settings}")
                if template == "both" and seed == options.seeds[0]:
                    report = {"rows": len(index), "vectors": sum(t.vectors for t in index.tasks.values())}
                    if not options.no_withheld:
                        outside = withheld(index, asked, names, progress())
                index.close()
    text = page(options, names, families, asked, found, settings, report, outside)
    out.print(text, markup=False, soft_wrap=True)
    if options.write:
        atomic_file("docs/results/routing.md", text)
        picture(names, families, asked["raw"][1], found["probe", "raw"], Path("docs/results/routing.png"))


def page(options, names, families, asked, found, settings, report, outside) -> str:
    def over_seeds(router: str, kind: str, key: str) -> tuple[float, float]:
        owners = asked[kind][1]
        values = [f[key] if key == "ece" else by_task(f[key], owners, names).mean() for f in found[router, kind]]
        return float(np.mean(values)), float(max(values) - min(values))

    lines = [
        "# Which task a query is routed to",
        "",
        f"Written by `python benchmarks/routing.py --rows {options.rows} --queries {options.queries} --seeds "
        f"{' '.join(map(str, options.seeds))} --write`: {len(names)} tasks, {report['rows']:,} training rows "
        f"({report['vectors']:,} vectors, both kinds of each row), {len(asked['raw'][1]):,} test rows. Means over tasks, then "
        "over seeds of index sampling; ± is half the range over seeds. Weights are after the nucleus. Nothing was chosen on "
        "test rows.",
        "",
    ]
    for kind, heading in (("hinted", "Query with the task's hint"), ("raw", "Raw text")):
        lines += [
            f"## {heading}",
            "",
            "| router | own task first | weight on own task | adapters used | calibration error |",
            "|---|---|---|---|---|",
        ]
        for router, name in ROUTERS.items():
            top, own, size, ece = (over_seeds(router, kind, key) for key in ("top", "own", "size", "ece"))
            lines.append(
                f"| {name} | {100 * top[0]:.1f} ± {50 * top[1]:.1f} % | {100 * own[0]:.1f} ± {50 * own[1]:.1f} % | "
                f"{size[0]:.1f} | {ece[0]:.3f} |"
            )
        lines.append("")
    lines += [
        "## Raw text, by task",
        "",
        "| task | family | paper | tuned kernel | probe | mostly taken for |",
        "|---|---|---|---|---|---|",
    ]
    routes = confusion(names, asked["raw"][1], found["probe", "raw"])
    for n, name in enumerate(names):
        owners = asked["raw"][1]
        tops = [
            np.mean([by_task(run["top"], owners, names)[n] for run in found[router, "raw"]])
            for router in ("paper", "kernel", "probe")
        ]
        others = [(routes[n, m], names[m]) for m in np.argsort(-routes[n]) if m != n and routes[n, m] >= 0.03][:3]
        taken = ", ".join(f"{other} {share:.0%}" for share, other in others)
        lines.append(f"| {name} | {families[name]} | " + " | ".join(f"{100 * t:.0f}" for t in tops) + f" | {taken} |")
    inside = [
        sum(routes[n, m] for m in range(len(names)) if families[names[m]] == families[names[n]])
        for n in range(len(names))
    ]
    lines += [
        "",
        f"The probe's top task is of the query's family for {100 * np.mean(inside):.1f} % of raw queries. ![routes](routing.png)",
        "",
    ]
    if outside:
        lines += [
            "## Queries of a task that the index does not hold",
            "",
            "Each task is withheld in turn (first seed); the score `unlike` of its queries is compared with that of the others'.",
            "",
            "| query | area under the curve, mean (least) | own-task queries above 0.99 | withheld queries above 0.99 |",
            "|---|---|---|---|",
        ]
        for kind in QUERIES:
            a = np.array(outside[kind])
            least, (mean, alarms, hits) = a[:, 0].min(), a.mean(axis=0)
            lines.append(f"| {kind} | {mean:.3f} ({least:.3f}) | {100 * alarms:.1f} % | {100 * hits:.1f} % |")
        lines.append("")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("scikit-learn", "numpy", "sentence-transformers", "torch")
    )
    lines += [
        "Chosen: " + "; ".join(settings) + ".",
        "",
        f"{packages}; OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}.",
        "",
    ]
    return "\n".join(lines)


def confusion(names, owners, runs) -> np.ndarray:
    """Share of each task's queries (rows) by the task that they are routed to (columns), mean over seeds."""
    table = np.zeros((len(names), len(names)))
    for run in runs:
        np.add.at(table, ([names.index(owner) for owner in owners], run["route"]), 1)
    return table / table.sum(axis=1, keepdims=True)


def picture(names, families, owners, runs, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = sorted(range(len(names)), key=lambda n: (families[names[n]], names[n]))
    table = confusion(names, owners, runs)[np.ix_(order, order)]
    labels = [names[n] for n in order]
    figure, axes = plt.subplots(figsize=(11, 10))
    image = axes.imshow(np.sqrt(table), cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlabel("top task of the probe")
    axes.set_ylabel("task of the raw query, by family")
    bar = figure.colorbar(image, ticks=np.sqrt([0, 0.02, 0.1, 0.25, 0.5, 1]), shrink=0.8)
    bar.ax.set_yticklabels(["0", "2 %", "10 %", "25 %", "50 %", "100 %"])
    bar.set_label("share of the task's queries (colour by square root)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
