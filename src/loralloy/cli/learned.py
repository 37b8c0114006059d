"""What `loralloy learn` prints and records of a result."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import atomic_file, check_free
from ..errors import LoralloyError

if TYPE_CHECKING:
    from ..bank import Bank
    from ..weighting.learned import Learned
    from ..weighting.measured import Figures
    from ..weights import Weights
    from .learn import Asked


def record(asked: Asked, result: Learned, measured: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any]:
    """For the weights file: the strategy, and figures of the base, of equal weights and of these, by domain."""
    figures = {name: {d or "all": f.to_dict() for d, f in of.items()} for name, of in measured.items()}
    return {
        "strategy": asked.strategy, "rule": str(asked.rule), "space": asked.space,
        "rank": asked.given.get("rank", "full"),
        "seconds": round(result.seconds, 2), "examples": figures,
    }  # fmt: skip


def check_outputs(out: Path, plot: Path | None, overwrite: bool) -> None:
    """Raise LoralloyError where the weights file or the picture could not be written, before any work."""
    from ..weighting.gate_view import check_picture

    check_free(out.absolute(), overwrite)
    if out.is_dir():
        raise LoralloyError(f"-o {out} is a folder; give the name of a file, such as {out / 'weights.json'}")
    if plot is not None:
        check_picture(plot, overwrite)


def draw(weights: Weights, path: Path, overwrite: bool) -> None:
    """Save the weights as a picture (PNG), whole or not at all."""
    picture = io.BytesIO()
    weights.plot(picture)  # type: ignore[arg-type]  # matplotlib writes PNG to a file object
    atomic_file(path, picture.getvalue(), overwrite)


def show(
    asked: Asked,
    result: Learned,
    measured: Mapping[str, Mapping[str, Figures]],
    bank: Bank,
    given: Sequence[str],
    out: Path,
    assume_same_base: bool = False,
) -> None:
    """Bars of the weights, how the run went, loss and accuracy before and after, and what to do next."""
    from ..console import out as stdout
    from .explain import weights_table

    def line(text: str) -> None:
        stdout.print(text, markup=False, soft_wrap=True)

    stdout.print(weights_table(result.weights, bank))
    if measured:
        stdout.print(_table(measured))
    for text in [*_said(asked, result), *_doubtful(asked, result, measured)]:
        line(text)
    line(f"wrote {out}")
    line(f"next: {_merge(asked, given, out)}{' --assume-same-base' * assume_same_base}")


def _table(measured: Mapping[str, Mapping[str, Figures]]) -> Any:
    """A row a domain, loss and accuracy of every composition; the last row is all of them."""
    from rich.table import Table
    from rich.text import Text

    first = next(iter(measured.values()))
    what = "loss" if first[""].kind == "answer" else "entropy"
    accurate = any(f.accuracy is not None for f in first.values())
    table = Table(box=None, pad_edge=False, header_style="dim", title="on the examples", title_justify="left")
    table.add_column("domain", no_wrap=True)
    table.add_column("n", justify="right")
    for name in measured:
        table.add_column(f"{what},\n{name}", justify="right", no_wrap=True)
    for name in measured if accurate else ():
        table.add_column(f"accuracy,\n{name}", justify="right", no_wrap=True)
    domains = [d for d in first if d]
    for domain in [*(domains if len(domains) > 1 else ()), ""]:
        every = [of[domain] for of in measured.values()]
        row = [f"{f.loss:.3f}" for f in every]
        if accurate:
            row += ["-" if f.accuracy is None else f"{f.accuracy:.2f}" for f in every]
        style = "bold" if not domain else ""
        table.add_row(*(Text(cell, style) for cell in (domain or "all", str(every[0].n), *row)))
    return table


def _said(asked: Asked, result: Learned) -> list[str]:
    """How the run went, a line each."""
    settings, last = result.settings, result.history[result.best_step]
    rule = f"rule {asked.rule}, {asked.space} space"
    if asked.strategy == "regmean":
        errors = ", ".join(f"{name} {error:.3f}" for name, error in settings["error"].items())
        return [f"{rule}; relative error of the sum on each domain's inputs: {errors}; {result.seconds:.1f} s"]
    if asked.strategy == "search":
        base = "" if result.best_step else ", the plain base"
        best = f"{settings['evaluations']} evaluations, the best was number {result.best_step + 1}{base}"
        return [f"{rule}; {best}; {result.seconds:.1f} s"]
    steps = len(result.history) - 1
    noise = f", label noise {settings['label_noise']:g}" if settings["label_noise"] else ""
    lines = [f"{rule}; from {result.start_scale:.2f} each, {steps} steps{noise}; {result.seconds:.1f} s"]
    if settings["hold_out"]:
        before = result.history[0]["held_out"]
        lines.append(
            f"{settings['hold_out']} of {settings['rows']} examples were held out: their loss went from {before:.3f} to "
            f"{last['held_out']:.3f}, at step {result.best_step}, which was kept"
        )
    else:
        lines.append("none were held out: the figures above are of what was learned from")
    return lines


def _doubtful(asked: Asked, result: Learned, measured: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """The examples that equal weights answer otherwise with confidence: few of them can decide all that is learned."""
    found = measured["equal"][""].doubtful if measured else ()
    if not found:
        return []
    said = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    line = f"doubtful: {said} (an answer of less than 5 % under equal weights): check what is asked and answered there"
    noise = asked.strategy == "gradient" and not result.settings["label_noise"]
    return [line + ("; with --label-noise 0.1 it counts for less" if noise else "")]


def _merge(asked: Asked, given: Sequence[str], out: Path) -> str:
    """The command that merges with these weights, as they were measured."""
    from ..adapter import CONFIG_FILE

    folders = [Path(g).is_dir() and not (Path(g) / CONFIG_FILE).is_file() for g in given]  # of adapters; or adapters
    words = [shlex.quote(g.rstrip("/")) + "/*" * many for g, many in zip(given, folders, strict=True)]
    own = [f"--{name.replace('_', '-')} {value}" for name, value in asked.rule.given.items()]
    rank = asked.given.get("rank", "full")
    parts = [*words, "--weights", shlex.quote(str(out)), "--rule", asked.rule.name, *own, "--space", asked.space]
    return f"loralloy merge {' '.join(parts)} --rank {rank} -o merged"
