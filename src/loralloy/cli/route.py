"""``loralloy route``: which adapters a question asks for, how much of each, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..errors import LoralloyError
from .common import Kernel

if TYPE_CHECKING:
    from rich.text import Text

    from ..weights import Weights

RouterOption = Annotated[
    str, typer.Option(help="auto, probe, kernel (tuned on the index) or paper (top-100, exp(-d)).")
]
KOption = Annotated[Optional[int], typer.Option("--k", help="Nearest examples that vote; the paper's: 100.")]  # noqa: UP045
POption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--p", help="Nucleus: keep the largest tasks up to this share of the mass; the paper's: 0.9."),
]
TemperatureOption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="T in exp(-d/T); below 1, nearer examples count more. The paper's: 1."),
]
UnlikeOption = Annotated[
    float, typer.Option(help="Use the base model alone when the question is more unlike the index than this, 0 to 1.")
]
UNLIKE = 0.99
NoFallback = Annotated[bool, typer.Option("--no-fallback", help="Use adapters however unlike the question is.")]


def route(
    index: Annotated[Path, typer.Argument(help="An index folder, from `loralloy index`.")],
    text: Annotated[str, typer.Argument(help="The question.")],
    router: RouterOption = "auto",
    k: KOption = None,
    p: POption = None,
    kernel: Kernel = "exp",
    temperature: TemperatureOption = None,
    unlike: UnlikeOption = UNLIKE,
    no_fallback: NoFallback = False,
    exclude: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Leave this task out; repeatable.")] = None,
    embedder: Annotated[
        str | None, typer.Option(help="The embedder that the index was built with; default: all-MiniLM-L6-v2.")
    ] = None,
    neighbours: Annotated[int, typer.Option(help="How many of the nearest examples to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the weights file (JSON) instead.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Save the weights as a picture.")] = None,
) -> None:
    """Weigh the adapters for one question: by a probe of the index, or by its nearest examples.

    Example: loralloy route my-index "WINNER!! Claim your free prize now" --k 50
    """
    import json

    from ..console import console, out
    from ..retrieval import Embedder, Index
    from ..weighting import fall_back, open_weigher
    from ..weighting.unlike import check_threshold, usable_threshold

    threshold = check_threshold(1.0 if no_fallback else unlike)
    with Index.open(index, Embedder(embedder)) as opened:
        if unknown := sorted(set(exclude or ()) - set(opened.names)):
            raise LoralloyError(f"--exclude {unknown[0]}: not a task of {index}; it has {', '.join(opened.names)}")
        if no_fallback or unlike == UNLIKE:  # what was asked for by name is obeyed
            threshold = usable_threshold(threshold, opened.manifest.template)
        with console.status("fitting the router to the index"):  # once an index: it is kept there
            weigher = open_weigher(
                opened, router, k=k, p=p, kernel=kernel, temperature=temperature, show=neighbours, unlike=threshold < 1
            )
            if not exclude:
                weigher.prepare()
        weights = fall_back(weigher.weigh(text, exclude or ()), threshold)
    if plot is not None:
        weights.plot(plot)
    if as_json:
        print(json.dumps(weights.to_dict(), indent=2, ensure_ascii=False))
        return
    out.print(weights)
    if (line := unlike_line(weights)) is not None:
        out.print(line)
    if weights.explain["neighbours"]:
        out.print(neighbour_table(weights.explain["neighbours"]))


def unlike_line(weights: Weights) -> Text | None:
    """What ``explain["unlike"]`` says of the query, and whether the base model answers alone; None without a score."""
    from rich.text import Text

    score = weights.explain.get("unlike")
    if score is None:
        return None
    said = f"unlike anything here: {score:.3f}"
    if "fallback" not in weights.explain:
        return Text(f"{said} of the index's own examples are nearer to theirs", style="dim")
    routed = ", ".join(f"{name} {w:.2f}" for name, w in weights.explain["routed"].items())
    limit = weights.explain["fallback"]
    return Text(
        f"{said} > {limit:g}, so all adapters are at 0: the base model alone (routed: {routed})", style="bold red"
    )


def neighbour_table(neighbours: list[dict]) -> object:
    """The nearest examples as a table (``Weights.explain["neighbours"]``): task, cosine distance, text."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None, pad_edge=False, expand=True, title="nearest examples", title_justify="left", title_style="bold"
    )
    table.add_column("task", style="cyan", no_wrap=True)
    table.add_column("distance", justify="right")
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in neighbours:
        table.add_row(row["task"], f"{row['distance']:.3f}", Text(body(row)))
    return table


def body(row: dict) -> str:
    """A neighbour's text on one line, without the hint: a whole task has the same."""
    from ..retrieval.rows import RAW

    text = row["text"] if row["id"].endswith(RAW) else row["text"].split("\n", 1)[-1]
    return " ".join(text.split())
