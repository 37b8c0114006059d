"""How well each router finds a query's own task: ``python benchmarks/routing.py --write``.

Test rows are asked with their task's hint and raw, of an index of both vectors a row, for each seed of index sampling.
Nothing is chosen on test rows: the routers fit themselves to the index's training rows. --write makes
docs/results/routing.md and routing.png (which task raw queries of each task go to). Vectors are kept in .assets/vectors.
With fewer rows (--fewer) the same is asked of smaller indexes, of the first seed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from loralloy.atomic import atomic_file
from loralloy.console import console, out, progress
from loralloy.retrieval import Embedder
from loralloy.retrieval.rows import RAW
from loralloy.tasks import load_tasks
from loralloy.weighting import ProbeRouter, open_weigher
from loralloy.weighting.calibration import calibration_error
from loralloy.weighting.linear_probe import choose_strength
from loralloy.weighting.probe_fit import Design, calibrate, fit_probe
from routing_errors import confusion, explained, picture
from vectors import CachedEncoder, ask, build_index

ROUTERS = {
    "hinted-paper": "the paper's kernel, index of hinted rows",
    "paper": "the paper's kernel, index of both",
    "kernel": "tuned kernel",
    "linear": "linear probe",
    "probe": "probe as it is fitted",
}
QUERIES = ("hinted", "raw")
CURVES = (
    ("hinted", "hinted-paper"),
    ("hinted", "probe"),
    ("raw", "paper"),
    ("raw", "kernel"),
    ("raw", "linear"),
    ("raw", "probe"),
)


class LinearRouter(ProbeRouter):
    """The probe without the choice of a hidden layer, as a small index gets it."""

    def _fit(self, names, read):
        rows = read()
        design = Design(0, choose_strength(rows))
        return fit_probe(rows, (design, calibrate(rows, design)[0]))


def open_router(index, router: str):
    return (
        LinearRouter(index, show=0)
        if router == "linear"
        else open_weigher(index, router.removeprefix("hinted-"), show=0)
    )


def figures(weights, owners, names) -> dict[str, np.ndarray | float]:
    """Per query: own task first, weight on it, adapters used; and the calibration error of the masses."""
    masses = masses_of(weights, names)
    own = np.array([names.index(owner) for owner in owners])
    return {
        "top": np.array([max(w.names, key=w.of) for w in weights]) == np.array(owners),
        "own": np.array([w.of(owner) for w, owner in zip(weights, owners, strict=True)]),
        "size": np.array([len(w.names) for w in weights]),
        "ece": calibration_error(masses, own),
        "route": np.array([names.index(max(w.names, key=w.of)) for w in weights]),
    }


def masses_of(weights, names) -> np.ndarray:
    """Each query's mass by task, before the nucleus, ``[m, tasks]``."""
    return np.array([[w.explain["mass"].get(name, 0.0) for name in names] for w in weights])


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
    parser.add_argument("--rows", type=int, default=2000, help="training rows a task, at most")
    parser.add_argument("--fewer", type=int, nargs="*", default=[], help="fewer rows a task, to compare with")
    parser.add_argument("--queries", type=int, default=100, help="test rows a task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--no-withheld", action="store_true", help="skip the withheld tasks (a leave-one-out pass a task)"
    )
    parser.add_argument("--write", action="store_true", help="make docs/results/routing.md and routing.png")
    options = parser.parse_args()

    tasks = sorted(load_tasks(options.tasks), key=lambda task: task.name)
    encoder, names = CachedEncoder(Embedder()), [task.name for task in tasks]
    families = {task.name: task.family for task in tasks}
    asked = {kind: ask(tasks, encoder, "test", options.queries, kind) for kind in QUERIES}
    found: dict[tuple[int, str, str], list[dict]] = defaultdict(list)
    settings, report, outside, why = [], {}, {}, []
    sizes = [(options.rows, seed) for seed in options.seeds] + [(rows, options.seeds[0]) for rows in options.fewer]
    least = min([options.rows, *options.fewer])
    with tempfile.TemporaryDirectory() as folder:
        for rows, seed in sizes:
            for template in ("hinted", "both"):
                place = Path(folder) / f"{template}-{rows}-{seed}"
                index = build_index(place, tasks, encoder, "exact", rows, seed, template)
                for router in ROUTERS:
                    if (router == "hinted-paper") != (template == "hinted"):
                        continue
                    weigher = open_router(index, router)
                    start = time.process_time()
                    weigher.prepare()
                    spent = time.process_time() - start
                    for kind in QUERIES:
                        vectors, owners = asked[kind]
                        weights = weigher.weigh_vectors(vectors)
                        found[rows, router, kind].append(figures(weights, owners, names))
                    said = ", ".join(
                        f"{kind} "
                        + " / ".join(
                            f"{by_task(found[rows, router, kind][-1][key], asked[kind][1], names).mean():.3f}"
                            for key in ("top", "own")
                        )
                        for kind in QUERIES
                    )
                    console.print(
                        f"{rows} rows, seed {seed}: {router}, {spent:.0f} s CPU, {said}", weigher.settings, markup=False
                    )
                    if router in ("kernel", "linear", "probe"):
                        settings.append(f"{rows} rows, seed {seed}, {router}: {weigher.settings}")
                    if router == "probe" and (rows, seed) == (options.rows, options.seeds[0]):
                        raw = [e.raw for task in tasks for e in task.examples("test")[: options.queries]]
                        ids, held, of = index.vectors(None)
                        plain = np.array([i.endswith(RAW) for i in ids])
                        of_plain = [owner for owner, is_raw in zip(of, plain, strict=True) if is_raw]
                        why = explained(tasks, families, asked["raw"][1], raw, asked["raw"][0],
                                        (held[plain], of_plain), masses_of(weights, names), rows, seed)  # fmt: skip
                if template == "both" and (rows, seed) == (least, options.seeds[0]) and not options.no_withheld:
                    outside = withheld(index, asked, names, progress())
                if template == "both" and (rows, seed) == (options.rows, options.seeds[0]):
                    report = {"rows": len(index), "vectors": sum(t.vectors for t in index.tasks.values()),
                              "whole": all(len(task.examples("train")) <= rows for task in tasks)}  # fmt: skip
                index.close()
    text = page(options, names, families, asked, found, settings, report, outside, why)
    out.print(text, markup=False, soft_wrap=True)
    if options.write:
        atomic_file("docs/results/routing.md", text)
        picture(names, families, asked["raw"][1], found[options.rows, "probe", "raw"], Path("docs/results/routing.png"))


def page(options, names, families, asked, found, settings, report, outside, why) -> str:
    def over_seeds(rows: int, router: str, kind: str, key: str) -> tuple[float, float]:
        owners = asked[kind][1]
        values = [f[key] if key == "ece" else by_task(f[key], owners, names).mean() for f in found[rows, router, kind]]
        return float(np.mean(values)), float(max(values) - min(values))

    several, given = len(options.seeds) > 1, " ".join(map(str, options.seeds))
    fewer = f" --fewer {' '.join(map(str, options.fewer))}" if options.fewer else ""
    over = ", then over seeds of index sampling; ± is half the range over seeds" if several else ""
    all_rows = f" {options.rows} rows are all that a task has for training: another seed would take the same."
    lines = [
        "# Which task a query is routed to",
        "",
        f"Written by `python benchmarks/routing.py --rows {options.rows}{fewer} --queries {options.queries} --seeds {given} "
        f"--write`: {len(names)} tasks, {report['rows']:,} training rows ({report['vectors']:,} vectors, both kinds of each "
        f"row), {len(asked['raw'][1]):,} test rows. Means over tasks{over}. Weights are after the nucleus. Nothing was chosen "
        f"on test rows: what a router chose, it chose on the index's own rows.{all_rows if report['whole'] else ''}",
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
            top, own, size, ece = (over_seeds(options.rows, router, kind, key) for key in ("top", "own", "size", "ece"))
            first, weight = (f"{100 * m:.1f}" + (f" ± {50 * r:.1f} %" if several else " %") for m, r in (top, own))
            lines.append(f"| {name} | {first} | {weight} | {size[0]:.1f} | {ece[0]:.3f} |")
        lines.append("")
    lines += [
        "Asked of the suite: with the hint, own task first for 97 % and 90 % on it; raw text 88 % and 82 %, at best 92 %.",
        "The paper's kernel stays as the paper has it, whatever it measures: it is the protocol that the paper's results are",
        "compared under, and its constants (100 rows, exp(-d), p = 0.9) are not ours to tune.",
        "What is tuned is the kernel and the probe below it.",
        "",
    ]
    sizes = [*options.fewer, options.rows]
    if options.fewer:
        lines += [
            "## By rows in the index",
            "",
            "Own task first / weight on it, first seed.",
            "",
            "| rows a task | " + " | ".join(f"{ROUTERS[r]}, {kind}" for kind, r in CURVES) + " |",
            "|---|" + "---|" * len(CURVES),
        ]
        for rows in sizes:
            cells = [
                " / ".join(
                    f"{100 * by_task(found[rows, r, kind][0][key], asked[kind][1], names).mean():.1f}"
                    for key in ("top", "own")
                )
                for kind, r in CURVES
            ]
            lines.append(f"| {rows:,} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "## Raw text, by task",
        "",
        "| task | family | paper | tuned kernel | linear | probe | mostly taken for |",
        "|---|---|---|---|---|---|---|",
    ]
    routes = confusion(names, asked["raw"][1], found[options.rows, "probe", "raw"])
    for n, name in enumerate(names):
        owners = asked["raw"][1]
        tops = [
            np.mean([by_task(run["top"], owners, names)[n] for run in found[options.rows, router, "raw"]])
            for router in ("paper", "kernel", "linear", "probe")
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
    lines += ["## Where raw text goes astray", "", *why]
    if outside:
        lines += [
            "## Queries of a task that the index does not hold",
            "",
            f"Each task is withheld in turn (an index of {min(sizes)} rows a task, first seed); the score `unlike` of its "
            "queries is compared with that of the others'.",
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


if __name__ == "__main__":
    main()
