"""`loralloy merge`: adapters in, one adapter out, with the error it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from ..errors import LoralloyError
from .common import Json, SameBase, parse_dtype, parse_rank

if TYPE_CHECKING:
    from ..weights import Weights


class MergeCommand(TyperCommand):
    """`--weights 0.6 -0.4`: an option takes one value, so the numbers after it are made one before they are parsed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for text in args:
            if len(joined) > 1 and joined[-2] in ("--weights", "-w") and _numbers(joined[-1]) and _numbers(text):
                joined[-1] += f",{text}"
            else:
                joined.append(text)
        return super().parse_args(ctx, joined)


COMMAND = MergeCommand


def merge(
    adapters: Annotated[list[str], typer.Argument(help="Adapter folders, or org/name@revision.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    weights: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--weights", "-w", help='One number an adapter: --weights 0.6 0.4, or "0.6,0.4", or a weights file.'
        ),
    ] = None,
    rule: Annotated[str, typer.Option(help="linear, cat or svd.")] = "linear",
    space: Annotated[
        str, typer.Option(help="delta acts on dW (exact); factors on A and B apart, as PEFT does.")
    ] = "delta",
    rank: Annotated[
        str | None, typer.Option(help="A number, max or full; the rule's own default if not given.")
    ] = None,
    dtype: Annotated[Optional[str], typer.Option(help="fp16, bf16 or fp32; the adapters' if not given.")] = None,  # noqa: UP045
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:
    """Merge adapters of one base model into one standard PEFT adapter; no base model is needed.

    Prints the relative error of the result against the exact weighted sum, before and after the cast.

    Example: loralloy merge bank/a bank/b --weights 0.6 0.4 --rule svd --rank 8 -o merged
    """
    from ..atomic import check_free
    from ..bank import Bank
    from ..console import out as stdout
    from ..console import progress
    from ..merging import get_rule
    from ..merging import merge as run

    chosen = get_rule(rule)
    checked = chosen.check_space(space)
    check_free(out.absolute(), overwrite)
    cut, stored = parse_rank(rank), parse_dtype(dtype)
    bank = Bank.load(adapters, assume_same_base)
    given = _weights(weights, bank.names)
    with progress() as bar:
        task = bar.add_task(f"{rule} ({space})", total=len(bank.modules))
        merged = run(bank, given, chosen, checked, cut, stored, out.name, lambda _: bar.advance(task))
    merged.adapter.save(out, overwrite)
    report = merged.report
    if json:
        stdout.print_json(
            data=merged.adapter.provenance["merge"] | {"out": str(out), "rank_out": merged.adapter.max_rank}
        )
        return
    stdout.print(given)
    how = f" ({report.rank})" if report.rank in ("max", "full") else ""
    stdout.print(
        f"rule {report.rule}, {report.space} space, rank {merged.adapter.max_rank}{how}, "
        f"{len(merged.adapter)} modules, stored as {report.dtype}"
    )
    stdout.print(
        f"relative error of dW against the exact weighted sum: {report.error_before_cast:.2e} before the cast, "
        f"{report.error:.2e} as stored"
    )
    if report.error > 0.01:
        worst = ", ".join(f"{module} {error:.2f}" for module, error in report.worst(3))
        stdout.print(f"largest by module: {worst}")
    for note in report.notes:
        stdout.print(f"note: {note}", markup=False, soft_wrap=True)
    stdout.print(f"wrote {out}", markup=False, soft_wrap=True)


def _numbers(text: str) -> list[float] | None:
    """The numbers of `0.6`, `0.6,0.4` or `0.6 0.4`; None if it is anything else."""
    try:
        return [float(part) for part in text.replace(",", " ").split()] or None
    except ValueError:
        return None


def _weights(texts: list[str] | None, names: list[str]) -> Weights:
    from ..weights import Weights

    if not texts:
        return Weights.uniform(names)
    if len(texts) == 1 and Path(texts[0]).is_file():
        return Weights.load(texts[0])
    values: list[float] = []
    for text in texts:
        found = _numbers(text)
        if found is None:
            raise LoralloyError(
                f"--weights {text!r} is neither a number nor a weights file that exists; give one of them"
            )
        values += found
    if len(values) != len(names):
        raise LoralloyError(
            f"--weights gives {len(values)} numbers for {len(names)} adapters ({', '.join(names)}); give one each"
        )
    try:
        return Weights(dict(zip(names, values, strict=True)))
    except LoralloyError as error:
        raise error.within("--weights") from None
