"""`loralloy merge`: adapters in, one adapter out, with the error it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import LoralloyError
from .common import Json, SameBase, parse_dtype, parse_rank


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
    adapters, weights = _part(adapters, weights)
    bank = Bank.load(adapters, assume_same_base)
    given = _weights(weights, bank.names)
    with progress() as bar:
        task = bar.add_task(f"{rule} ({space})", total=len(bank.modules))
        merged = run(
            bank, given, chosen, checked, parse_rank(rank), parse_dtype(dtype), out.name, lambda _: bar.advance(task)
        )
    merged.adapter.save(out, overwrite)
    report = merged.report
    if json:
        stdout.print_json(
            data=merged.adapter.provenance["merge"] | {"out": str(out), "rank_out": merged.adapter.max_rank}
        )
        return
    stdout.print(given)
    stdout.print(
        f"rule {report.rule}, {report.space} space, rank {merged.adapter.max_rank} ({report.rank}), "
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
        stdout.print(f"note: {note}", markup=False)
    stdout.print(f"wrote {out}", markup=False)


def _part(adapters: list[str], weights: list[str] | None) -> tuple[list[str], list[str] | None]:
    """`A B --weights 0.6 0.4`: an option takes one value, so the numbers after it arrive among the adapters."""
    if not weights:
        return adapters, weights
    numbers = [text for text in adapters if _is_number(text) and not Path(text).exists()]
    return [text for text in adapters if text not in numbers], [*weights, *numbers]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _weights(texts: list[str] | None, names: list[str]):  # type: ignore[no-untyped-def]
    from ..weights import Weights

    if not texts:
        return Weights.uniform(names)
    if len(texts) == 1 and Path(texts[0]).is_file():
        return Weights.load(texts[0])
    parts = [part for text in texts for part in text.replace(",", " ").split()]
    if len(parts) != len(names):
        raise LoralloyError(
            f"--weights gives {len(parts)} numbers for {len(names)} adapters ({', '.join(names)}); give one each"
        )
    try:
        numbers = [float(part) for part in parts]
    except ValueError as error:
        raise LoralloyError(f"--weights: {error}; give numbers, or one weights file") from None
    return Weights(dict(zip(names, numbers, strict=True)))
