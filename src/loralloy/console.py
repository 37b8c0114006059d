"""Where words go: results on stdout, progress and remarks on stderr, so that output can be piped."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Piped output has no width of its own; 80 columns would cut names that the reader needs.
_WIDTH = None if sys.stdout.isatty() else 120
out = Console(highlight=False, width=_WIDTH)
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
        disable=not (console.is_terminal or console.is_jupyter),  # elsewhere it would leave an empty line
    )
