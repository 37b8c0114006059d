"""Where words go: results on stdout, progress and remarks on stderr, so that output can be piped."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False)
console = Console(stderr=True, highlight=False)


def progress(transient: bool = True) -> Progress:
    """A progress display on stderr; used for anything that takes over two seconds."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )
