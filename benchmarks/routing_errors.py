"""Why raw texts go to another task: which tasks are taken for one another, and how much of it the texts themselves share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from loralloy.retrieval.rows import RAW, task_rows
from loralloy.tasks import Task
from loralloy.tasks.splits import normalise

NEAR = (0.9, 0.8, 0.7, 0.6, 0.5)  # cosines
LETTERS = 600  # characters of a text that the spelling classifier reads
SPELLED = 500  # rows a task that it learns from, at most


def raw_texts(task: Task, rows: int, seed: int) -> list[str]:
    """The raw texts of the rows that an index of both holds."""
    ids, texts = task_rows(task, rows, seed, "both")
    return [text for i, text in zip(ids, texts, strict=True) if i.endswith(RAW)] or texts


def nearest_other(
    vectors: np.ndarray, own: np.ndarray, rows: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of each query [m] to the nearest row of its own task, and of another task."""
    mine, other = np.zeros(len(own)), np.zeros(len(own))
    for start in range(0, len(own), 256):
        block = slice(start, start + 256)
        near = vectors[block] @ rows.T
        same = own[block, None] == labels[None]
        mine[block], other[block] = np.where(same, near, -1).max(axis=1), np.where(same, -1, near).max(axis=1)
    return mine, other


def spelling(tasks: Sequence[Task], texts: list[str], rows: int, seed: int) -> dict[str, np.ndarray]:
    """The task [m], by position in `tasks`, that a linear classifier of character n-grams (2 to 5, TF-IDF) names for each
    of `texts`; without and with capitals. It is trained on the raw texts of at most 500 of the index's rows a task, with
    settings fixed beforehand, and stands for what a text says of its task beside its meaning."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier

    known, labels = [], []
    for n, task in enumerate(tasks):
        found = [text[:LETTERS] for text in raw_texts(task, min(rows, SPELLED), seed)]
        known += found
        labels += [n] * len(found)
    result = {}
    for name, lower in (("without capitals", True), ("with capitals", False)):
        reader = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), lowercase=lower, min_df=3,
                                 max_features=200_000, sublinear_tf=True, dtype=np.float32)  # fmt: skip
        model = SGDClassifier(
            loss="log_loss", alpha=1e-6, class_weight="balanced", max_iter=12, tol=None, random_state=0
        )
        model.fit(reader.fit_transform(known), labels)
        result[name] = model.predict(reader.transform([text[:LETTERS] for text in texts]))
    return result


def pairs(names: list[str], families: dict[str, str], own: np.ndarray, route: np.ndarray, show: int = 12) -> list[str]:
    """A table of the pairs that are taken for one another most."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (own, route), 1)
    wrong = int(counts.sum() - np.trace(counts))
    both = counts + counts.T
    found = sorted(((int(both[a, b]), a, b) for a in range(len(names)) for b in range(a)), reverse=True)
    lines = [
        "| pair | errors | of all errors | first taken for second, second for first | family |",
        "|---|---|---|---|---|",
    ]
    for number, a, b in found[:show]:
        kin = families[names[a]] if families[names[a]] == families[names[b]] else "different"
        lines.append(
            f"| {names[a]}, {names[b]} | {number} | {number / wrong:.1%} | {counts[a, b]}, {counts[b, a]} | {kin} |"
        )
    top = sum(number for number, _, _ in found[:show])
    return [
        *lines,
        "",
        f"These {show} pairs of {len(names) * (len(names) - 1) // 2} are {top / wrong:.0%} of the {wrong} errors.",
    ]


def explained(
    tasks: Sequence[Task], families: dict[str, str], owners: list[str], texts: list[str], vectors: np.ndarray,
    held: tuple[np.ndarray, list[str]], masses: np.ndarray, rows: int, seed: int,
) -> list[str]:  # fmt: skip
    """Lines of Markdown. `held`: the raw vectors of the index and their tasks; `masses` [m, tasks], the probe's."""
    names = [task.name for task in tasks]
    own, route = np.array([names.index(owner) for owner in owners]), masses.argmax(axis=1)
    wrong = route != own
    labels = np.array([names.index(owner) for owner in held[1]])
    mine, other = nearest_other(vectors, own, held[0], labels)
    lines = pairs(names, families, own, route)
    second = np.argsort(-masses, axis=1)[:, 1] == own
    lines += [
        f"Of the errors {(second & wrong).sum() / wrong.sum():.0%} have the own task second. The mean probability that the "
        f"probe gives its first task is {masses.max(axis=1).mean():.3f}; it is right for {1 - wrong.mean():.3f}.",
        "",
        "| nearest training row of another task | queries | errors | nearer to it than to a row of the own task |",
        "|---|---|---|---|",
    ]
    edges = (1.01, *NEAR, -1.01)
    for high, low in pairwise(edges):
        here = (other < high) & (other >= low)
        name = f"cosine at least {low}" if low > -1 else f"below {high}"
        closer = (other > mine)[here].mean() if here.any() else 0
        lines.append(f"| {name} | {here.sum()} | {wrong[here].mean() if here.any() else 0:.1%} | {closer:.0%} |")
    elsewhere = {task.name: {normalise([text]) for text in raw_texts(task, rows, seed)} for task in tasks}
    shared = np.array(
        [
            any(normalise([text]) in elsewhere[n] for n in names if n != owner)
            for text, owner in zip(texts, owners, strict=True)
        ]
    )
    words = np.array([len(text.split()) for text in texts])
    cuts = [0, *np.quantile(words, [0.25, 0.5, 0.75]).astype(int), words.max()]
    by_length = ", ".join(
        f"{low + 1} to {high} words {wrong[(words > low) & (words <= high)].mean():.1%}" for low, high in pairwise(cuts)
    )
    said = spelling(tasks, texts, rows, seed)
    share = 1 / np.bincount(own)[own] / len(names)
    lines += [
        "",
        f"{shared.sum()} of the {len(texts)} test texts are also a training row of another task (case and spaces aside). Errors "
        f"by length: {by_length}.",
        "",
        f"What the spelling says that the vectors do not: a linear classifier of character n-grams on {SPELLED} of the "
        "raw rows a task puts the own task first for "
        + ", ".join(f"{share @ (found == own):.1%} {how}" for how, found in said.items())
        + "; it is right for "
        + ", ".join(f"{(found == own)[wrong].mean():.0%} of the probe's errors {how}" for how, found in said.items())
        + f". For {((said['with capitals'] != own) & wrong).mean():.1%} of the queries both are wrong.",
        "",
    ]
    return lines


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
