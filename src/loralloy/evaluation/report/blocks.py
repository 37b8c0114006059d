"""A page as a list of blocks, written once and rendered to Markdown here and to HTML in `html.py`.

Text may hold ``**bold**`` and ```code```; nothing else is markup, and both renderers escape the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """`left`: how many columns from the left hold words (the others are numbers, to the right)."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    caption: str = ""
    dense: bool = False
    """Many columns: headers stand upright on the HTML page."""


@dataclass(frozen=True)
class Picture:
    file: str
    alt: str


@dataclass(frozen=True)
class Fold:
    """Shut until a reader opens it."""

    title: str
    blocks: tuple[Block, ...] = field(default_factory=tuple)


Block: TypeAlias = "Heading | Text | Items | Table | Picture | Fold"
INLINE = re.compile(r"(\*\*.+?\*\*|`[^`]+`)")


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, caption: str = "", dense: bool = False
) -> Table:
    """A table; rows of another length than the header are a mistake of the caller."""
    assert all(len(row) == len(header) for row in rows), (header, [row for row in rows if len(row) != len(header)][:1])
    return Table(tuple(header), tuple(map(tuple, rows)), left, caption, dense)


def markdown(blocks: Sequence[Block]) -> str:
    """The page as GitHub's Markdown."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + _escape(block.text)
    if isinstance(block, Text):
        return _escape(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_escape(item)}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{_escape(block.alt)}]({block.file})"
    if isinstance(block, Fold):
        inner = markdown(block.blocks)
        return f"<details>\n<summary>{_html(block.title)}</summary>\n\n{inner}\n</details>"
    lines = [f"{_escape(block.caption)}\n"] if block.caption else []
    lines.append("| " + " | ".join(map(_cell, block.header)) + " |")
    lines.append("|" + "".join("---|" if i < block.left else "---:|" for i in range(len(block.header))))
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in block.rows]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Outside bold and code, what Markdown would take as markup: ``*``, ``_`` at a word's edge, ``<``."""
    parts = INLINE.split(text)
    return "".join(
        part if i % 2 else re.sub(r"([*<])|(?<!\w)(_)|(_)(?!\w)", r"\\\g<0>", part) for i, part in enumerate(parts)
    )


def _cell(text: str) -> str:
    return _escape(text).replace("|", "\\|").replace("\n", " ")


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
