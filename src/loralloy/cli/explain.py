"""What a merge will do, as plain data and as a page: `loralloy merge --explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .parameters import said

if TYPE_CHECKING:
    from rich.console import Console

    from ..bank import Bank
    from ..merging.rule import Part
    from ..recipe import Job
    from ..weights import Weights

# Said in words for the parameters whose value nobody should have to guess.
_SCOPE = {
    ("trim", "tensor"): "trimming: each tensor by itself to the density (PEFT's scope)",
    ("trim", "all"): "trimming: all modules of an adapter together to the density (the TIES paper's scope)",
    (
        "normaliser",
        "count",
    ): "normaliser: the number of adapters that agree (PEFT's; shrinks dW when weights sum to 1)",
    ("normaliser", "weights"): "normaliser: the sum of the weights of the adapters that agree",
}
_BLOCKS = " ▁▂▃▄▅▆▇█"


def scope(rule: Part) -> list[str]:
    """The trimming scope and the normaliser of a rule that has them, in words."""
    return [words for item, words in _SCOPE.items() if item in rule.values.items()]


def describe(job: Job, overrides: list[str]) -> dict[str, Any]:
    """The plan as plain data: adapters with hashes, weights, every parameter, space, ranks, modules, size, notes."""
    from ..merging.rule import SPACES
    from ..saving import dtype_name

    plan = job.plan()
    bank = job.bank
    layers = _layers(plan.modules)
    return {
        "recipe": str(job.recipe.path) if job.recipe.path else None,
        "overrides": overrides,
        "base": bank.base.to_dict(),
        "adapters": [
            {
                "name": name,
                "path": job.recipe.source(n)[0],
                "hash": bank[name].content_hash,
                "modules": len(bank[name]),
                "ranks": sorted({bank[name].rank(m) for m in bank[name]}),
                "dtype": dtype_name(bank[name].dtype),
                "licence": bank[name].licence,
            }
            for n, name in enumerate(bank.names)
        ],
        "weights": job.weights.to_dict()["weights"],
        "rule": _part(job.rule),
        "before": _part(job.before) if job.before else None,
        "after": _part(job.after) if job.after else None,
        "scope": scope(job.rule),
        "space": {"name": plan.space, "meaning": SPACES[plan.space]},
        "rank": {
            "asked": job.rank,
            "energy": plan.energy,
            "in": sorted({r for g in plan.groups for r in g.ranks}),
            "out": plan.top,
            "cut_modules": sum(len(g.modules) for g in plan.groups if g.cut),
        },
        "modules": {
            "count": len(plan.modules),
            "layers": [layers[0], layers[-1]] if layers else None,
            "left_out": list(job.left_out),
            "shapes": [
                {"shape": list(g.shape), "modules": len(g.modules), "ranks": list(g.ranks), "rank_out": g.rank}
                for g in plan.groups
            ],
        },
        "output": {"dtype": dtype_name(plan.dtype), "bytes": plan.bytes_out},
        "device": str(plan.device),
        "measure": plan.measure,
        "notes": [*job.notes(), *plan.notes],
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "summary": part.summary,
        "source": part.source,
        "parameters": {
            name: {"value": part.values[name], "default": p.default, "allowed": p.allowed, "help": p.help}
            for name, p in part.parameters.items()
        },
    }


def show(data: dict[str, Any], job: Job, stdout: Console, closing: str) -> None:
    """Print the plan, and `closing` as its last line."""
    from rich.table import Table
    from rich.text import Text

    def line(text: str) -> None:
        stdout.print(text, markup=False, soft_wrap=True)

    def head(title: str, text: str = "") -> None:
        stdout.print(Text.assemble((f"{title:<11}", "bold"), text), soft_wrap=True)

    for text in data["overrides"]:
        line(text)
    base = job.bank.base
    head("base", str(base))
    table = Table(box=None, pad_edge=False)
    for title in ("adapter", "rank", "modules", "dtype", "content", "from"):
        table.add_column(title, overflow="fold")
    for a in data["adapters"]:
        digest = a["hash"].split(":")[-1][:12]
        table.add_row(
            Text(a["name"]), _span(a["ranks"]), str(a["modules"]), a["dtype"], digest, Text(_short(a["path"]))
        )
    stdout.print(table)
    head("weights", "" if not job.given.per_module else "mean, smallest and largest, and by layer")
    stdout.print(weights_table(job.given, job.bank))
    for title in ("rule", "before", "after"):
        if data[title] is not None:
            _show_part(title, data[title], head, stdout)
    for text in data["scope"]:
        line(f"{'':<11}{text}")
    head("space", f"{data['space']['name']}: {data['space']['meaning']}")
    rank, modules, output = data["rank"], data["modules"], data["output"]
    asked = f"energy {rank['energy']:g}, at most " if rank["energy"] is not None else ""
    how = f" ({rank['asked']})" if rank["asked"] in ("max", "full") else ""
    cut = f"; {rank['cut_modules']} modules are cut to it" if rank["cut_modules"] else "; nothing is cut"
    head("rank", f"{_span(rank['in'])} in, {asked}{rank['out']} out{how}{cut if rank['energy'] is None else ''}")
    layers = f", layers {modules['layers'][0]} to {modules['layers'][1]}" if modules["layers"] else ""
    head("modules", f"{modules['count']}{layers}")
    if modules["left_out"]:
        line(f"{'':<11}left out: {_some(modules['left_out'])}")
    about = "at most" if rank["energy"] is not None else "about"
    head("output", f"{about} {_size(output['bytes'])} in {output['dtype']}")
    head("runs on", f"{data['device']}; error: {data['measure']}")
    for note in data["notes"]:
        line(f"note: {note}")
    line(closing)


def _show_part(title: str, part: dict[str, Any], head: Any, stdout: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    head(title, f"{part['name']}: {part['summary']}")
    if not part["parameters"]:
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for name, p in part["parameters"].items():
        origin = "default" if p["value"] == p["default"] else f"default {said(p['default'])}"
        meaning = Text(f"{p['help']}: {p['allowed']}", style="dim")
        table.add_row(" " * 11 + name, said(p["value"]), f"({origin})", meaning)
    stdout.print(table)


def weights_table(weights: Weights, bank: Bank) -> Any:
    """One bar an adapter; where weights are by module, their mean and range and a column a layer (its mean)."""
    if not weights.per_module:
        return weights
    from rich.table import Table
    from rich.text import Text

    from ..layerwise import layer_of

    values = {name: {m: weights.of(name, m) for m in bank[name]} for name in weights.names}
    layers = _layers(m for of in values.values() for m in of)
    table = Table(box=None, show_header=False, pad_edge=False)
    rows: dict[str, list[float | None]] = {}
    for name, of in values.items():
        by_layer: dict[int | None, list[float]] = {}
        for module, w in of.items():
            by_layer.setdefault(layer_of(module), []).append(w)
        found = [by_layer.get(layer) for layer in layers]
        rows[name] = [sum(ws) / len(ws) if ws else None for ws in found]
    top = max((abs(w) for row in rows.values() for w in row if w is not None), default=1.0) or 1.0
    for name, row in rows.items():
        bars = Text()
        for mean in row:
            block = " " if mean is None else _BLOCKS[max(1, round(8 * abs(mean) / top))] if mean else "·"
            bars.append(block, style="red" if mean is not None and mean < 0 else "cyan")
        every = list(values[name].values()) or [0.0]  # an adapter without modules only saves tensors
        mean_of_all = sum(every) / len(every)
        table.add_row(Text(name, style="bold"), f"{mean_of_all:.3f}", f"{min(every):.3f} to {max(every):.3f}", bars)
    if layers:
        table.add_row("", "", "layer", f"{layers[0]}" + f"{layers[-1]}".rjust(len(layers) - len(str(layers[0]))))
    return table


def _layers(modules: Any) -> list[int]:
    from ..layerwise import layer_of

    return sorted({layer for m in modules if (layer := layer_of(m)) is not None})


def _span(values: list[int]) -> str:
    if not values:
        return "none"
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _some(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError


def _short(path: str) -> str:
    """A folder as seen from here where that is shorter."""
    import os

    try:
        near = os.path.relpath(path) if os.path.isdir(path) else path
    except ValueError:
        return path
    return near if len(near) < len(path) else path
