"""``loralloy index``: build an index from task files, or change one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LoralloyError

if TYPE_CHECKING:
    from ..weighting import ProbeRouter


def index(
    tasks: Annotated[list[Path] | None, typer.Argument(help="Task files, or folders of them.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The index folder, made or updated.")] = Path("index"),
    store: Annotated[
        str | None, typer.Option(help="chroma, or exact (NumPy); default: what the index has, else chroma.")
    ] = None,
    rows: Annotated[int, typer.Option(help="At most so many training rows a task.")] = 2000,
    seed: Annotated[int, typer.Option(help="Decides which rows are taken when a task has more.")] = 0,
    template: Annotated[
        str | None,
        typer.Option(
            help="Text to embed: hinted (hint and columns), raw (columns) or both; default: what the index has, else both."
        ),
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="sentence-transformers folder or org/name@revision; default: all-MiniLM-L6-v2.")
    ] = None,
    remove: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Take a task out; may be repeated.")] = None,
    add_only: Annotated[bool, typer.Option("--add-only", help="Refuse to change a task that is there.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Embed the given tasks again even if unchanged.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Build the whole index anew.")] = False,
) -> None:
    """Build a retrieval index from task files; answers are never indexed.

    Run again, it skips what is unchanged, replaces what changed, and finishes what was cut short.

    Example: loralloy index examples/tasks -o my-index --rows 500
    """
    from ..console import console, out
    from ..retrieval import Embedder, Index, Manifest
    from ..tasks import load_tasks
    from ..weighting.choose import fit_all

    if not tasks and not remove:
        raise LoralloyError("nothing to do: give task files to index, or --remove NAME")
    if add_only and (replace or overwrite):
        raise LoralloyError("--add-only refuses to change what is there; drop it, or drop --replace and --overwrite")
    if remove and overwrite:
        raise LoralloyError("--overwrite builds the index anew, so there is nothing to --remove; drop one of them")
    given = load_tasks(tasks) if tasks else []
    encoder = Embedder(embedder)
    old = Manifest.load(output) if (output / "manifest.json").is_file() and not overwrite else None
    if add_only and old and (there := [task.name for task in given if task.name in old.tasks]):
        raise LoralloyError(f"{output}: task {there[0]!r} is in the index already, and --add-only keeps it as it is")
    store = store or (old.store if old else "chroma")
    template = template or (old.template if old else "both")
    if not given:
        opened = Index.open(output, encoder, template=template)
    else:
        first = given if overwrite else []  # replaced as a whole; else task by task, so that each is reported
        opened = Index.build(output, first, encoder, store, rows, seed, template, overwrite=overwrite, progress=True)
    with opened as built:
        for name in remove or []:
            built.remove(name)
            out.print(f"removed {name}")
        for task in given:
            changed = overwrite or built.add(task, rows, seed, force=replace, progress=True)
            out.print(f"{'indexed' if changed else 'unchanged'} {task.name}: {built.tasks[task.name].rows} rows")
        with console.status("fitting the router"):
            router = fit_all(built)
        if router is not None and (line := probe_line(router)):
            out.print(line, markup=False, soft_wrap=True)
        kind = f"store {built.manifest.store}, template {built.manifest.template}, embedder {built.manifest.embedder}"
        out.print(f"{output}: {len(built.tasks)} tasks, {len(built)} rows; {kind}", markup=False, soft_wrap=True)


def probe_line(router: ProbeRouter) -> str:
    """How well the fitted probe knows the index's own held-out examples; "" where there were too few to hold out."""
    report = router.fit().report
    said = [f"{report[kind]['top1']:.1%} {kind}" for kind in ("hinted", "raw") if kind in report]
    return f"router fitted; own task first on held-out examples of the index: {', '.join(said)}" if said else ""
