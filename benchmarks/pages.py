"""What pages of results are made of: tables, intervals, sections, a picture; and the flags of the command that writes them."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def report_parser(
    doc: str | None, which: str, names: Iterable[str], cells: Path, docs: Path
) -> argparse.ArgumentParser:
    """Of a report over cells. which: what the positional arguments name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(which, nargs="*", help=f"only these: {', '.join(names)}")
    parser.add_argument("--cells", type=Path, default=cells)
    parser.add_argument("--docs", type=Path, default=docs)
    parser.add_argument("--write", action="store_true", help="write the pages into --docs")
    parser.add_argument("--again", action="store_true", help="from the .json files that lie in --docs")
    return parser


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; nothing for no rows."""
    lines = ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows]
    head = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return [*head, *lines, ""] if lines else []


def interval(value: float, low: float, high: float) -> str:
    """A value and its interval, in points."""
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def sections(parts: Iterable[tuple[str, str, Sequence[str]]]) -> list[str]:
    """(heading, text, lines) each, those without lines left out."""
    found: list[str] = []
    for heading, text, body in parts:
        if body:
            found += [f"## {heading}", "", *([text, ""] if text else []), *body]
    return found


def pyplot() -> Any:
    """matplotlib.pyplot, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def png(figure: Any) -> bytes:
    """The same bytes for the same picture; the figure is closed."""
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=110, metadata={"Software": None})
    pyplot().close(figure)
    return memory.getvalue()
