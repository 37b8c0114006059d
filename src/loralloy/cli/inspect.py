"""`loralloy inspect`: what an adapter is, module by module and layer by layer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json

if TYPE_CHECKING:
    from ..adapter import Adapter


def inspect(
    adapter: Annotated[str, typer.Argument(help="An adapter folder, or org/name@revision.")],
    modules: Annotated[bool, typer.Option("--modules", help="One row a module instead of one a layer.")] = False,
    json: Json = False,
) -> None:
    """Show an adapter: base model, licence, modules, ranks, and the norm of dW by layer. Reads every tensor once.

    Example: loralloy inspect examples/bank/sms_spam
    """
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
    stdout.print(
        f"{len(loaded)} modules, rank {_span([m['rank'] for m in data['modules']])}, "
        f"scaling {_span([m['scaling'] for m in data['modules']])}, {data['dtype']}, licence {data['licence'] or 'not stated'}",
        markup=False,
        soft_wrap=True,
    )
    stdout.print(f"content {data['content_hash']}", soft_wrap=True)
    if loaded.extra:
        stdout.print(f"also saves whole: {', '.join(loaded.extra)}", markup=False)
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
