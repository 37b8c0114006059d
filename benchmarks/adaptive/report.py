"""docs/results/adaptive-{emoji,sentiment,multiemo}.{md,json,png} from cells.

python benchmarks/adaptive/report.py                   # print the verdicts
python benchmarks/adaptive/report.py --write           # and write the pages
python benchmarks/adaptive/report.py --write --add     # and what the committed .json files have beside, of the same adapters
python benchmarks/adaptive/report.py --write --again   # from the committed .json files, without cells

Growth that is of adapters of its own (text20) stays as the .json file has it where there are no new cells of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parent), str(ROOT / "src")) if p not in sys.path]

import checks  # noqa: E402
import claims  # noqa: E402
import streams  # noqa: E402
import tables  # noqa: E402
import wording  # noqa: E402
from cells import GRID, LONG, NOISY_MORE, cell_name  # noqa: E402
from figures import draw  # noqa: E402
from plan import BENCHES  # noqa: E402
from results import Cells, joined  # noqa: E402

from loralloy.atomic import atomic_file  # noqa: E402
from pages import report_parser, sections  # noqa: E402

PAGES = {"emoji": ("emoji4", ("emoji7",)), "sentiment": ("sentiment4", ("text20",)), "multiemo": ("multiemo4", ())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = report_parser(__doc__, "pages", PAGES, ROOT / ".assets/adaptive/cells", ROOT / "docs/results")
    parser.add_argument(
        "--add", action="store_true", help="to the cells that the .json files have, of the same adapters"
    )
    options = parser.parse_args(argv)
    for page in options.pages or PAGES:
        data = options.docs / f"adaptive-{page}.json"
        found = read(page, options.cells, data if options.again else None)
        if options.add:
            old = read(page, options.cells, data)
            found = {b: Cells(b, joined(old[b].rows, some.rows, f"--add {page}")) for b, some in found.items()}
        for bench in PAGES[page][1]:
            own = BENCHES[bench].share != BENCHES[PAGES[page][0]].share
            if own and not found[bench].rows and (kept := read(page, options.cells, data)[bench]).rows:
                print(f"{page}: no new cells of {bench}: the {len(kept.rows)} that {data.name} has stay")
                found[bench] = kept
        if not found[PAGES[page][0]].rows:
            print(f"{page}: no cells")
            continue
        text, verdicts, picture = build(page, found)
        for what, _, verdict in verdicts:
            print(f"{page}: {what}: {verdict}")
        if options.write:
            cells = {bench: some.rows for bench, some in found.items()}
            plain = json.dumps({"version": 1, "verdicts": verdicts, "cells": cells}, separators=(",", ":"))
            atomic_file(data, plain.replace('{"cell":', '\n{"cell":') + "\n")
            atomic_file(options.docs / f"adaptive-{page}.md", text)
            atomic_file(options.docs / f"adaptive-{page}.png", picture)
    return 0


def read(page: str, cells: Path, data: Path | None) -> dict[str, Cells]:
    """The cells of a page's benches: from their files, or from what an earlier report kept of them.

    Those that the plan has; of the files in the digits that are kept, so that the page made again is the same.
    """
    name, more = PAGES[page]
    kept = json.loads(data.read_text(encoding="utf-8"))["cells"] if data is not None and data.is_file() else {}
    found = {}
    for bench in (name, *more):
        plan = checks.planned(bench, BENCHES[bench].stream())
        rows = Cells.load(cells, bench).compact() if data is None else kept.get(bench, [])
        found[bench] = Cells(bench, [row for row in rows if cell_name(row["cell"]) in plan])
    return found


def build(page: str, found: dict[str, Cells]) -> tuple[str, list[tuple[str, str, str]], bytes]:
    """The page's text, its verdicts and its picture."""
    name, more = PAGES[page]
    stream = BENCHES[name].stream()
    bench = BENCHES[name]
    b = tables.Bench(found[name], tuple(stream.names), stream.orders, bench.follow, bench.best)
    kind, growing = stream.fields.kind, {bench: found[bench] for bench in more}
    devices = sorted({row["device"] for cells in growing.values() for row in cells.rows})
    drawn = checks.drawn(b)
    grown = [line for cells in growing.values() for line in streams.growth(cells)]
    search = wording.SEARCHED[b.start(1)]
    poster = wording.POSTER.format(count=len(GRID), first=GRID[0], last=GRID[-1], search=search)
    parts: list[tuple[str, str, list[str]]] = [
        ("What it was to show", "", claims.verdict_lines(b, kind, growing)),
        ("The poster's table", poster + drawn, tables.poster(b)),
        ("Learned against its controls", wording.CONTROLS + drawn, tables.controls(b)),
        ("Other ways to the same end", wording.OTHERS, tables.others(b)),
        (
            "Buffer size and granularity",
            wording.BUFFERS.format(page=page, few=wording.BEGUN[b.start(1)]),
            tables.buffers(b),
        ),
        ("After every experience", wording.PATH, streams.path_table(b)),
        ("Coefficients by experience", "Means over seeds, the first order.", streams.coefficients(b)),
        ("Classifier heads", wording.HEADS, tables.heads(b) if kind == "images" else []),
        ("Why wrong weights collapse", wording.COLLAPSE, tables.collapse(b)),
        ("Answers evened out", wording.EVENED, checks.evened(b)),
        ("What the cut to a rank costs", wording.RANKS, tables.ranks(b)),
        ("Rows that no adapter was trained on", wording.UNTRAINED + drawn, checks.untrained(b)),
        ("More steps", wording.LONG, checks.beside(b, LONG, "60 steps", "240 steps")),
        ("Label noise with more rows", wording.NOISY_MORE, checks.beside(b, NOISY_MORE, "without", "with")),
        ("Where the learner begins", wording.STARTS, checks.starts(b)),
        ("Growth", wording.GROWTH.format(devices=f" ({', '.join(devices)})" if devices else ""), grown),
    ]
    lines = [f"# Adaptive merging: {stream.fields.title}", "", *preamble(page, b, found), "", *sections(parts)]
    return "\n".join(lines).rstrip() + "\n", claims.verdicts(b, kind, growing), draw(b, growing)


def preamble(page: str, b: tables.Bench, found: dict[str, Cells]) -> list[str]:
    name, more = PAGES[page]
    fields, rows = BENCHES[name].stream().fields, found[name].rows
    tested: dict[str, Any] = next((row["rows_tested"] for row in rows if row.get("rows_tested")), {})
    seeds = sorted({row["cell"]["seed"] for row in rows})
    devices = sorted({row["device"] for row in rows})
    quick = sorted(row["seconds"]["learn"] for row in b.cells.find(**b.settings(draw=None)))
    said = (
        f"Learning with one row a class took {quick[len(quick) // 2]:.1f} s (median, beside other processes)."
        if quick
        else ""
    )
    missing = checks.unfinished(found)
    seen = wording.SEEN if page in wording.SEEN_PAGES else wording.UNSEEN
    return [
        f"Domains: {', '.join(b.names)}. Seeds {', '.join(map(str, seeds))}: each its own adapters, head and buffer. "
        f"{len(rows)} cells; {', '.join(devices)}.",
        f"Test rows: {', '.join(f'{domain} {n}' for domain, n in tested.items())}. Training: {json.dumps(fields.train)}; model "
        f"`{Path(fields.model).name}` in {wording.JUDGED}",
        wording.CHOSEN.format(search=wording.NARROWED[b.start(1)]) + seen, said, "", "```sh",
        f"python benchmarks/adaptive/run.py --bench {name} --jobs 12",
        *([f"python benchmarks/adaptive/run.py --bench {' '.join(more)} --jobs 1"] if more else []),
        "python benchmarks/adaptive/report.py --write", "```", *(["", missing] if missing else []),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
