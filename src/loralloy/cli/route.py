"""``loralloy route``: which adapters a question asks for, how much of each, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def route(
    index: Annotated[Path, typer.Argument(help="An index folder, from `loralloy index`.")],
    text: Annotated[str, typer.Argument(help="The question.")],
    k: Annotated[int, typer.Option(help="How many nearest examples vote.")] = 100,
    p: Annotated[float, typer.Option(help="Nucleus: keep the largest tasks up to this share of the mass.")] = 0.9,
    kernel: Annotated[str, typer.Option(help="exp (the paper's), inverse or uniform.")] = "exp",
    temperature: Annotated[float, typer.Option(help="T in exp(-d/T); below 1, nearer examples count more.")] = 1.0,
    exclude: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Leave this task out; repeatable.")] = None,
    embedder: Annotated[
        str | None, typer.Option(help="The embedder that the index was built with; default: all-MiniLM-L6-v2.")
    ] = None,
    neighbours: Annotated[int, typer.Option(help="How many of the nearest examples to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the weights file (JSON) instead.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Save the weights as a picture.")] = None,
) -> None:
    """Weigh the adapters for one question by its nearest examples.

    Example: loralloy route my-index "WINNER!! Claim your free prize now" --k 50
    """
    import json

    from ..console import out
    from ..retrieval import Embedder, Index
    from ..weighting import Router

    with Index.open(index, Embedder(embedder)) as opened:
        router = Router(opened, k=k, p=p, kernel=kernel, temperature=temperature, show=neighbours)
        weights = router.weigh(text, exclude or ())
    if plot is not None:
        weights.plot(plot)
    if as_json:
        print(json.dumps(weights.to_dict(), indent=2, ensure_ascii=False))
        return
    out.print(weights)
    if weights.explain["neighbours"]:
        out.print(neighbour_table(weights.explain["neighbours"]))


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
        table.add_row(row["task"], f"{row['distance']:.3f}", Text(" ".join(row["text"].split("\n", 1)[-1].split())))
    return table
