"""`loralloy inspect`: what an adapter is, module by module and layer by layer; of several, what they share."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LoralloyError
from .common import Json, OptionalPath, SameBase

if TYPE_CHECKING:
    from ..adapter import Adapter


def inspect(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Adapter folders, org/name@revision, or a folder of adapters."),
    ],
    modules: Annotated[bool, typer.Option("--modules", help="One row a module instead of one a layer.")] = False,
    by: Annotated[str, typer.Option(help="Of several adapters: rows by layer or by projection.")] = "layer",
    plot: Annotated[OptionalPath, typer.Option("--plot", help="Of several adapters: a picture to write (PNG).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing picture.")] = False,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:
    """Show an adapter: base model, licence, modules, ranks, and the norm of dW by layer. Reads every tensor once.

    Of two or more: what they share before you merge them (cosine of dW, shared directions, sign conflict, SAR, norms), and
    what the numbers say about the choice of rule.

    Example: loralloy inspect examples/bank/sms_spam examples/bank/sarcasm --plot overlap.png
    """
    if by not in ("layer", "projection"):
        raise LoralloyError(f"--by {by!r} is not known; choose layer or projection, or pass --modules for every module")
    if by != "layer" and modules:
        raise LoralloyError(f"--by {by} and --modules are two ways to cut the rows; pass one of them")
    from ..bank import adapters_in

    given = [str(found) for ref in adapters for found in adapters_in(ref)]
    if len(given) > 1:
        _overlap(given, "module" if modules else by, plot, overwrite, assume_same_base, json)
        return
    for flag, used in (("--by projection", by != "layer"), ("--plot", plot is not None)):
        if used:
            raise LoralloyError(f"{flag} compares adapters, and only {given[0]} was given; name two or more")
    _one(given[0], modules, json)


def _one(adapter: str, modules: bool, json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from ..adapter import Adapter
    from ..console import out as stdout

    loaded = Adapter.load(adapter).validate()
    data = describe(loaded)
    if json:
        stdout.print_json(data=data)
        return
    stdout.print(Text.assemble((loaded.name, "bold"), f", a LoRA adapter of {loaded.base}"), soft_wrap=True)
    ranks, scalings = ([m[key] for m in data["modules"]] for key in ("rank", "scaling"))
    factors = (
        f"{len(loaded)} modules, rank {_span(ranks)}, scaling {_span(scalings)}" if len(loaded) else "no LoRA module"
    )
    stdout.print(f"{factors}, {data['dtype']}, licence {data['licence'] or 'not stated'}", markup=False, soft_wrap=True)
    stdout.print(f"content {data['content_hash']}", soft_wrap=True)
    if loaded.extra:
        also = "also saves" if len(loaded) else "it only saves tensors"
        stdout.print(f"{also} whole: {', '.join(loaded.extra)}", markup=False, soft_wrap=True)
    if not len(loaded):
        return
    table = Table(box=None, pad_edge=False)
    if modules:
        for heading in ("module", "rank", "out x in", "norm of dW", ""):
            table.add_column(heading)
        top = max(m["norm"] for m in data["modules"]) or 1.0
        for m in data["modules"]:
            bar = Text("█" * round(28 * m["norm"] / top), style="cyan")
            table.add_row(m["module"], str(m["rank"]), f"{m['shape'][0]} x {m['shape'][1]}", f"{m['norm']:.4f}", bar)
    else:
        for heading in ("layer", "modules", "norm of dW", ""):
            table.add_column(heading)
        top = max(layer["norm"] for layer in data["layers"]) or 1.0
        for layer in data["layers"]:
            bar = Text("█" * round(28 * layer["norm"] / top), style="cyan")
            table.add_row(str(layer["layer"]), str(layer["modules"]), f"{layer['norm']:.4f}", bar)
    stdout.print(table)


def _overlap(refs: list[str], by: Any, plot: Path | None, overwrite: bool, assume_same_base: bool, json: bool) -> None:
    from ..atomic import check_free
    from ..bank import Bank
    from ..console import console, progress
    from ..console import out as stdout
    from ..overlap import draw, overlap, tables

    if plot is not None:  # before any work
        if importlib.util.find_spec("matplotlib") is None:
            raise LoralloyError("--plot draws a picture, which needs matplotlib: pip install 'loralloy[plots]'")
        if plot.suffix.lower() != ".png":
            raise LoralloyError(f"--plot {plot} is not a PNG file; give a name that ends in .png")
        check_free(plot.absolute(), overwrite)
    bank = Bank.load(refs, assume_same_base)
    with progress() as bar:
        task = bar.add_task("overlap", total=len(bank.modules))
        found = overlap(bank, on_module=lambda _: bar.advance(task))
    if plot is not None:
        with console.status("drawing"):
            draw(found, plot, overwrite)
    if json:
        stdout.print_json(data=found.to_dict(by) | ({"plot": str(plot)} if plot is not None else {}))
        return
    stdout.print(f"{len(bank)} adapters of {bank.base}", markup=False, soft_wrap=True)
    for part in tables(found, by):
        stdout.print()
        stdout.print(part)
    if plot is not None:
        stdout.print(f"wrote {plot}", markup=False, soft_wrap=True)


def describe(adapter: Adapter) -> dict[str, Any]:
    """An adapter as plain data; norms are ||dW||_F, a layer's is the root of the sum of squares."""
    from ..factors import norm
    from ..saving import dtype_name

    rows: list[dict[str, Any]] = []
    layers: dict[Any, list[float]] = {}
    for module in sorted(adapter, key=_natural):
        f = adapter[module]
        size = norm(f)
        rows.append({
            "module": module, "kind": f.kind, "rank": f.rank, "shape": list(f.shape), "scaling": f.scaling, "norm": size,
        })  # fmt: skip
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
        layer = layers.setdefault(int(match[1]) if match else module, [0, 0.0])
        layer[0] += 1
        layer[1] += size**2
    return {
        "name": adapter.name,
        "base": adapter.base.to_dict(),
        "dtype": dtype_name(adapter.dtype),
        "licence": adapter.licence,
        "content_hash": adapter.content_hash,
        "extra": adapter.extra,
        "provenance": adapter.provenance,
        "modules": rows,
        "layers": [
            {"layer": k, "modules": n, "norm": square**0.5}
            for k, (n, square) in sorted(layers.items(), key=lambda item: (isinstance(item[0], str), item[0]))
        ],
    }


def _natural(module: str) -> list[tuple[bool, int | str]]:
    """layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in module.split(".")]


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
