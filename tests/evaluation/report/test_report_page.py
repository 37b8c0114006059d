"""The files: complete, self-contained, honest about holes, and without any row's text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from fake_cells import write_cells

from loralloy.errors import LoralloyError
from loralloy.evaluation.report import report
from loralloy.evaluation.report.blocks import Fold, Heading, Items, Picture, Text, markdown, table
from loralloy.evaluation.report.html import page
from loralloy.tasks import load_tasks

NAMES = ["r-average.png", "r-cost.png", "r-mass.png", "r-routes.png", "r.html", "r.json", "r.md"]
VOID = {"meta", "img", "br", "link", "input"}


class Checked(HTMLParser):
    """Every tag closed in order; collects references and the cells of each table's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.rows: list[list[int]] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.sources += [given[a] for a in ("src", "href") if a in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag == "table":
            self.rows.append([])
        if tag == "tr":
            self.rows[-1].append(0)
        if tag in ("td", "th"):
            self.rows[-1][-1] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    steps = []
    files, summary = report(whole, folder, "r", command="loralloy report x", samples=200, step=steps.append)
    assert "plots" in steps
    return folder, files, summary


def test_what_trained_gates_have_seen_is_said(made):
    """They read the hint in raw queries too, and were trained on the rows of a task that is left out."""
    sections = (made[0] / "r.md").read_text(encoding="utf-8").split("\n### ")
    protocols = {s.splitlines()[0].strip(): s for s in sections if re.match(r"(In domain|Own task left out), ", s)}
    assert len(protocols) == 4
    for name, text in protocols.items():
        assert "their gates read the whole prompt" in text
        assert ("those of the task left out among them" in text) == name.startswith("Own task left out")


def test_files(made):
    folder, files, summary = made
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in files) == NAMES
    assert json.loads((folder / "r.json").read_text()) == summary
    for name in NAMES[:4]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "r.html").stat().st_size < 1_500_000


def test_html_is_one_whole_file(made):
    text = (made[0] / "r.html").read_text()
    found = Checked()
    found.feed(text)
    assert not found.open
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in found.sources)
    assert {s[1:] for s in found.sources if s.startswith("#")} <= set(found.ids)
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(found.rows) > 12 and all(len(set(rows)) == 1 for rows in found.rows)


def test_markdown_tables_are_even(made):
    lines = (made[0] / "r.md").read_text().split("\n")
    width = None
    tables = 0
    for line in lines:
        cells = len(re.split(r"(?<!\\)\|", line)) if line.startswith("|") else None
        tables += cells is not None and width is None
        assert cells is None or width is None or cells == width, line
        width = cells
    assert tables > 12
    text = "\n".join(lines)
    for heading in (
        "What this says",
        "Retrieval quality",
        "Controls",
        "Error analysis",
        "Efficiency",
        "Other metrics",
        "Tasks",
    ):
        assert f"## {heading}" in text
    assert "Made by `loralloy report x`." in text and "they are not further examples" in text


def test_no_row_is_in_any_file(made, whole):
    """Neither texts nor free answers nor ids: tasks whose rows may not be published stay unpublished."""
    text = "".join((made[0] / name).read_text() for name in NAMES[4:])
    for given in load_tasks(whole.fields.tasks):
        for e in given.examples("test"):
            assert e.raw not in text and e.id not in text
            assert given.labels or f'"{e.answer}"' not in text


def test_holes_are_marked(suite, tmp_path):
    write_cells(suite, skip={"linear__raw__in_domain__1", "multitask__any__in_domain__any"})
    report(suite, tmp_path / "o", "r", samples=100)
    text = (tmp_path / "o" / "r.md").read_text()
    assert "2 cells are missing" in text and "- multitask__any__in_domain__any" in text
    rows = [line for line in text.split("\n") if line.startswith("| multitask |")]
    assert rows[0] == "| multitask | - | live | - | - | - |  | - | - |"
    assert "| routed, linear | delta | linear, live | 20 | 1 of 2 |" in text


def test_only_some_cells(suite, tmp_path):
    """Base and majority alone: no plot of routes, and nothing breaks."""
    from loralloy.evaluation.suite.cells import cells_of

    names = {c.name for c in cells_of(suite)}
    write_cells(suite, skip=names - {"base__any__any__any", "majority__any__any__any"})
    files, summary = report(suite, tmp_path / "o", "r", samples=100)
    assert sorted(p.name for p in files) == ["r-average.png", "r-cost.png", "r.html", "r.json", "r.md"]
    assert summary["against_own"] == [] and summary["routing"] == []


def test_refusals(whole, suite, tmp_path, made):
    with pytest.raises(LoralloyError, match=r"r\.md exists already"):
        report(whole, made[0], "r", samples=100)
    with pytest.raises(LoralloyError, match="is no file name"):
        report(whole, tmp_path, "a/b")
    with pytest.raises(LoralloyError, match="at least 100"):
        report(whole, tmp_path, "r", samples=10)
    with pytest.raises(LoralloyError, match="no cells there"):
        report(suite, tmp_path / "o", "r")
    assert not (tmp_path / "o").exists()


def test_blocks_escape():
    blocks = [
        Heading("A <b>", 1), Text("x * y, **bold** and `a|b` of _snake_case_ task_name"), Items(("one <i>",)),
        table(["a|b", "n"], [["p|q", "**1.0**"]]), Fold("more & more", (Text("in"),)), Picture("p.png", 'a "b"'),
    ]  # fmt: skip
    text = markdown(blocks)
    assert "# A \\<b>" in text and "x \\* y, **bold** and `a|b`" in text and "task_name" in text
    assert "| a\\|b | n |" in text and "<summary>more &amp; more</summary>" in text
    html = page("T & T", blocks, {"p.png": b"png"})
    Checked().feed(html)
    assert "<title>T &amp; T</title>" in html and '<h1 id="a-b">A &lt;b&gt;</h1>' in html
    assert '<td class="best"><strong>1.0</strong></td>' in html and "<code>a|b</code>" in html
