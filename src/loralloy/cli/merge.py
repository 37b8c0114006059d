"""`loralloy merge`: adapters or a recipe in, one adapter out, with the error it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import LoralloyError
from . import parameters
from .common import Json, OptionalPath, SameBase, parse_rank
from .flags import from_flags, numbers

if TYPE_CHECKING:
    from ..merging import Merged
    from ..recipe import Job

_WEIGHTS = ("--weights", "-w")


class MergeCommand(parameters.ParameterCommand):
    """`--weights 0.6 -0.4`, `--weights=0.6 -0.4` and `-w0.6 -0.4`: an option takes one value, so the numbers are made one
    before parsing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for text in args:
            flag, equals, value = text.partition("=")
            if not (equals and flag in _WEIGHTS):
                flag, value = text[:2], text[2:]
                equals = "attached" if flag in _WEIGHTS and numbers(value) else ""
            if equals and "--" not in joined:
                joined += [flag, value]
            elif len(joined) > 1 and joined[-2] in _WEIGHTS and numbers(joined[-1]) and numbers(text):
                joined[-1] += f",{text}"
            else:
                joined.append(text)
        return super().parse_args(ctx, joined)


COMMAND = MergeCommand


def merge(
    context: typer.Context,
    adapters: Annotated[list[str], typer.Argument(help="Adapter folders or org/name@revision; or one recipe.yaml.")],
    out: Annotated[OptionalPath, typer.Option("-o", "--out", help="Folder to write.")] = None,
    weights: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--weights", "-w", help='One number an adapter: --weights 0.6 0.4, or "0.6,0.4", or a weights file.'
        ),
    ] = None,
    rule: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="How they combine; `loralloy rules` lists all.", show_default="linear"),
    ] = None,
    space: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="delta acts on dW; factors on A and B apart, as PEFT does; knots and core on aligned parts.",
            show_default="the rule's first",
        ),
    ] = None,
    rank: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A number, max (the largest parent's) or full (no cut).", show_default="the rule's own"),
    ] = None,
    energy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Instead of --rank: the smallest rank that keeps this fraction of ||dW||^2, such as 0.99."),
    ] = None,
    before: Annotated[Optional[str], typer.Option(help="A plug-in that runs before the rule.")] = None,  # noqa: UP045
    after: Annotated[Optional[str], typer.Option(help="A plug-in that runs after the rule.")] = None,  # noqa: UP045
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the result: fp16, bf16 or fp32.", show_default="the adapters'"),
    ] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda or cuda:1.", show_default="cpu")] = None,  # noqa: UP045
    measure: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The error against the exact weighted sum: exact, estimate or none.", show_default="exact"),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the plan and write nothing.")] = False,
    save_recipe: Annotated[
        OptionalPath, typer.Option("--save-recipe", help="Write all of this as a recipe, with content hashes.")
    ] = None,
    update_lock: Annotated[
        bool, typer.Option("--update-lock", help="Take adapters as they are, though a recipe's hash says otherwise.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:
    """Merge adapters of one base model into one standard PEFT adapter; no base model is needed.

    Prints the relative error of the result against the exact weighted sum, before and after the cast. The output folder
    holds a recipe.yaml that repeats the merge.

    Example: loralloy merge bank/a bank/b --weights 0.6 0.4 --rule ties --density 0.3 --rank 8 -o merged
    """
    from ..atomic import atomic_file
    from ..console import out as stdout
    from ..console import progress
    from ..recipe.job import check_out

    flags = {
        "rule": rule, "before": before, "after": after, "space": space, "rank": parse_rank(rank), "energy": energy,
        "dtype": dtype, "device": device, "measure": measure, "assume_same_base": assume_same_base or None,
    }  # fmt: skip
    given = {field: value for field, value in flags.items() if value is not None}
    recipe, said = from_flags(adapters, weights, given, parameters.given(context))
    target = out or recipe.out_path
    if target is None and not explain and save_recipe is None:
        raise typer.BadParameter("give the folder to write", context, param_hint="'-o' / '--out'")
    if target is not None and not explain:
        check_out(target.absolute(), overwrite)
    if save_recipe is not None and save_recipe.exists() and not overwrite:
        raise LoralloyError(f"--save-recipe {save_recipe} exists already; choose another name or pass --overwrite")
    job = recipe.prepare(update_lock)
    if explain or target is None:
        from .explain import describe, show

        data = describe(job, said)
        what = "merged" if save_recipe is not None else "written"
        why = "--explain" if explain else "no -o"
        stdout.print_json(data=data) if json else show(data, job, stdout, f"nothing was {what} ({why})")
    if save_recipe is not None:
        atomic_file(save_recipe, job.to_yaml(save_recipe.absolute().parent, target), overwrite)
        if not json:
            stdout.print(f"wrote {save_recipe}", markup=False, soft_wrap=True)
    if explain or target is None:
        return
    with progress() as bar:
        task = bar.add_task(f"{job.rule.name} ({job.space})", total=len(job.bank.modules) - len(job.left_out))
        merged = job.merge(target, overwrite, lambda _: bar.advance(task))
    if json:
        record = merged.adapter.provenance["merge"] | {"out": str(target), "rank_out": merged.adapter.max_rank}
        stdout.print_json(data=record | {"overrides": said, "notes": [*job.notes(), *merged.report.notes]})
        return
    _print(merged, job, said)
    stdout.print(f"wrote {target}", markup=False, soft_wrap=True)


def _print(merged: Merged, job: Job, said: list[str]) -> None:
    """What was done, and what it cost."""
    from ..console import out as stdout
    from .explain import scope, weights_table

    def line(text: str) -> None:
        stdout.print(text, markup=False, soft_wrap=True)

    report = merged.report
    for text in said:
        line(text)
    stdout.print(weights_table(job.given, job.bank))
    energy = job.recipe.energy
    how = f" (energy {energy:g})" if energy is not None else f" ({report.rank})" if not report.rank.isdigit() else ""
    line(
        f"rule {job.rule}, {report.space} space, rank {merged.adapter.max_rank}{how}, "
        f"{len(merged.adapter)} modules, stored as {report.dtype}"
    )
    for text in scope(job.rule):
        line(text)
    for when, plugin in (("before", job.before), ("after", job.after)):
        if plugin is not None:
            line(f"{when} it: {plugin}")
    if report.measured == "none":
        line("the error was not measured (--measure none)")
    else:
        about = " (estimated)" if report.measured == "estimate" else ""
        line(
            f"relative error of dW against the exact weighted sum{about}: {report.error_before_cast:.2e} before the cast, "
            f"{report.error:.2e} as stored"
        )
        if report.error > 0.01:
            line("largest by module: " + ", ".join(f"{module} {error:.2f}" for module, error in report.worst(3)))
    if report.cut > 0:  # NaN where nothing was measured
        line(
            f"the cut to rank {merged.adapter.max_rank} lost {report.cut:.2e} of the rule's own result (relative, Frobenius)"
        )
    for note in [*job.notes(), *report.notes]:
        line(f"note: {note}")
