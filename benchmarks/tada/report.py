"""The report of TaDA from the cells: docs/results/tada-{language,vision}.{md,json,png}.

python benchmarks/tada/report.py --screen        # which pairs have room, by validation rows
python benchmarks/tada/report.py --development   # designs on the development pairs, from which pairs.yaml names some
python benchmarks/tada/report.py --write
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

import claims  # noqa: E402
import notes  # noqa: E402
from designs import BASELINES, DESIGNS, LEARNED, METHODS, RANKS, SIZES, TUNED_BESIDE, of_half  # noqa: E402
from figures import draw  # noqa: E402
from plan import ALONE, HALVES, Half, load  # noqa: E402
from results import Cells, bits, packed, percent  # noqa: E402

from cell_files import rounded  # noqa: E402
from loralloy.atomic import atomic_file  # noqa: E402
from loralloy.weighting.levels import LEVELS  # noqa: E402
from pages import report_parser, sections, table  # noqa: E402

AT = {
    "even": "0.5/0.5", "ones": "1/1", "free": "level chosen without labels", "balanced": "1/1, answers balanced without labels",
    "best": "best by validation", "tuned": "best by validation, then balanced",
}  # fmt: skip
BALANCED = "task adapter alone, answers balanced without labels"
ROOM, OVER_BASE = 0.03, 0.05  # the rule of pairs.yaml


def main(argv: Sequence[str] | None = None) -> int:
    parser = report_parser(__doc__, "half", HALVES, ROOT / ".assets/tada/cells", ROOT / "docs/results")
    parser.add_argument("--screen", action="store_true", help="print the room of the final pairs and the reserves")
    parser.add_argument("--development", action="store_true", help="print the designs on the development pairs")
    options = parser.parse_args(argv)
    for name in options.half or HALVES:
        half = load(name)
        kept = options.docs / f"tada-{name}.json" if options.again else None
        screen, develop, final = (read(options.cells, name, which, kept) for which in ("screen", "develop", "final"))
        if options.screen:
            print("\n".join([f"# {name}", "", *screened(half, screen)]))
        elif options.development:
            print("\n".join([f"# {name}", "", *developed(half, develop)]))
        elif not final.rows:
            print(f"{name}: no cells")
        else:
            verdicts = claims.verdicts(half, final)
            for what, said, verdict in verdicts:
                print(f"{name}: {what}: {verdict} ({said})")
            if options.write:
                told = {
                    "version": 1,
                    "verdicts": verdicts,
                    "screen": screen.rows,
                    "develop": develop.rows,
                    "final": final.rows,
                }
                plain = json.dumps(told, separators=(",", ":")).replace(
                    '{"version":1,"cell":', '\n{"version":1,"cell":'
                )
                atomic_file(options.docs / f"tada-{name}.json", plain + "\n")
                atomic_file(options.docs / f"tada-{name}.md", page(half, screen, develop, final, verdicts))
                atomic_file(options.docs / f"tada-{name}.png", draw(half, final))
    return 0


def read(folder: Path, half: str, which: str, kept: Path | None) -> Cells:
    """The cells from their files, or from what an earlier report kept of them (row-by-row answers too: intervals need them)."""
    if kept is not None:
        return Cells(json.loads(kept.read_text(encoding="utf-8"))[which] if kept.is_file() else [])
    found = Cells.load(folder / f"{half}-{which}").rows
    kept_rows = [{k: rounded(v) for k, v in row.items() if k != "tried"} | _among(row) for row in found]
    return Cells([row | ({"correct": packed(row["correct"])} if "correct" in row else {}) for row in kept_rows])


def _among(row: dict[str, Any]) -> dict[str, Any]:
    """Among how many coefficients a cell's best were chosen."""
    tried = row.get("tried") if row["cell"]["at"] == "best" else None
    return {"among": len({tuple(t["scale"]) for t in tried})} if tried else {}


def screened(half: Half, cells: Cells) -> list[str]:
    """Validation rows of seed 0, and which six the rule of pairs.yaml takes."""
    rows, taken = [], []
    for pair in (*half.pairs("final"), *half.pairs("reserves")):
        seen = {
            m: cells.by_pair(m, "", half.rank, "validation").get(pair, float("nan"))
            for m in ("base", "task", "domain", "own")
        }
        room = seen["own"] - seen["task"] >= ROOM and seen["own"] - seen["base"] >= OVER_BASE
        if room and len(taken) < len(half.pairs("final")):
            taken.append(pair)
        rows.append([pair, *(percent(v) for v in seen.values()), "yes" if room else "no"])
    return [
        *table(["pair", "base", "task adapter", "domain adapter", "own adapter", "room"], rows),
        f"The rule takes: {', '.join(taken)}.", "",
    ]  # fmt: skip


def developed(half: Half, cells: Cells) -> list[str]:
    """All that was tried on the development pairs, the best first."""
    found = []
    configs = [(m.name, "", half.rank) for m in ALONE]
    configs += [("task", "balanced", half.rank)]
    configs += [(m.name, at, half.rank) for at in ("ones", "free", "balanced") for m in DESIGNS]
    configs += [(n, at, half.rank) for at in ("best", "free", "balanced") for n in TUNED_BESIDE]
    pairs = half.pairs("development")
    titles = {m.name: m.title for m in ALONE}
    for config in configs:
        if cells.of(*config):
            title = titles.get(config[0]) or METHODS[config[0]].title
            said = f"{title} ({config[0]})" + (
                f", {AT[config[1]]}" if config[1] in ("best", "free", "balanced") else ""
            )
            said = f"{BALANCED} (task)" if config[:2] == ("task", "balanced") else said
            beside = cells.difference(config, ("ties", "best", half.rank))
            whole = len(cells.by_pair(*config)) == len(
                pairs
            )  # the others stand below: their average is over other pairs
            row = [said, *_pairs(half, cells, config, "development"), beside.points()]
            found.append(((whole, cells.average(*config)), row))
    heads = ["method", *half.pairs("development"), "average", "against TIES at its best"]
    return table(heads, [row for _, row in sorted(found, key=lambda item: item[0], reverse=True)])


def _pairs(half: Half, cells: Cells, config: tuple[str, str, int], which: str = "final") -> list[str]:
    by = cells.by_pair(*config)
    whole = len(by) == len(half.pairs(which))
    average = percent(cells.average(*config)) + ("" if whole or not by else f" ({len(by)} pairs)")
    return [*(percent(by.get(p, float("nan"))) for p in half.pairs(which)), average]


def main_table(half: Half, cells: Cells) -> list[str]:
    mine = claims.ours(half)
    rows = []
    for m in ALONE:
        rows.append([m.title, *_pairs(half, cells, (m.name, "", half.rank)), ""])
    even = ("task", "balanced", half.rank)
    if cells.of(*even):
        rows.append([BALANCED, *_pairs(half, cells, even), cells.difference(even, mine).points()])
    for at, said in AT.items():
        for m in (*BASELINES, *(METHODS[n] for n in half.designs)):
            config = (m.name, at, half.rank)
            if cells.of(*config):
                title = f"**{m.title}**" if m.name in half.designs else m.title
                other = cells.difference(config, mine).points() if config != mine else "is ours"
                rows.append([f"{title}, {said}", *_pairs(half, cells, config), other])
    for m in LEARNED:
        config = (m.name, "", half.rank)
        if cells.of(*config):
            rows.append([m.title, *_pairs(half, cells, config), cells.difference(config, mine).points()])
    return table(["", *half.pairs("final"), "average", "less ours"], rows)


def gates(half: Half, cells: Cells) -> list[str]:
    rows = []
    for pair in half.pairs("final"):
        found = [
            r for (p, _), r in cells.of(half.designs[0], "ones", half.rank).items() if p == pair and "domain_share" in r
        ]
        if found:
            thirds = [sum(r["domain_share"][k] for r in found) / len(found) for k in range(3)]
            slopes = [
                f"{r['slope'][0]:+.2f} [{r['slope'][1]:+.2f}, {r['slope'][2]:+.2f}]" for r in found if "slope" in r
            ]
            rows.append([pair, *(f"{t:.3f}" for t in thirds), "; ".join(slopes)])
    return table(["pair", "first third", "middle", "last third", "slope by seed [over inputs]"], rows)


def sizes(half: Half, cells: Cells) -> list[str]:
    name, rows = half.designs[0], []
    for n in sorted((*SIZES, half.calibration)):
        config = (name if n == half.calibration else f"{name}~inputs{n}", "ones", half.rank)
        if cells.of(*config):
            rows.append(
                [str(n), percent(cells.average(*config)), cells.difference(config, (name, "ones", half.rank)).points()]
            )
    return table(["calibration inputs", "average", "less the plan's number"], rows)


def ranks(half: Half, cells: Cells) -> list[str]:
    rows = []
    for r in sorted((*RANKS, half.rank)):
        shown = [("task", ""), ("domain", ""), ("linear", "ones"), ("ties", "ones"), (half.designs[0], "ones")]
        pairs = half.pairs("final")[:2]
        seen = [cells.of(m, at, r) for m, at in shown]
        if all((p, half.seeds[0]) in s for s in seen for p in pairs):
            rows.append(
                [str(r), *(percent(sum(s[p, half.seeds[0]]["test"] for p in pairs) / len(pairs)) for s in seen)]
            )
    return table(["rank", "task adapter", "domain adapter", "linear 1/1", "TIES 0.2 1/1", "ours"], rows)


def page(half: Half, screen: Cells, develop: Cells, final: Cells, verdicts: Sequence[tuple[str, str, str]]) -> str:
    f, name = half.fields, half.name
    devices = sorted({row["device"] for row in final.rows})
    tested = {r["cell"]["pair"]: len(bits(r)) for r in final.rows if "correct" in r}
    ablated = [[t, percent(a), d.points()] for t, a, d in claims.ablation_rows(half, final)]
    design = of_half(METHODS[half.designs[0]], name)
    merged = sorted(r["seconds"]["merge"] for r in final.of(half.designs[0], "ones", half.rank).values())
    lines = [
        f"# TaDA, {name}: one task adapter and one domain adapter", "",
        f"Ours: {design.title} (`{design.name}`: rule {design.rule} {dict(design.values)}, gate {dict(design.gate or {})}, "
        f"conflicts judged on {design.judge}), cut to rank {half.rank}. The formulas are this project's own (docs/tada.md); no "
        "number is the paper's.", "",
        f"Model `{Path(f['model']).name}`, rank {half.rank}, seeds {', '.join(map(str, half.seeds))} (adapters, heads, "
        f"calibration samples of {half.calibration} inputs); {len(final.rows)} of {notes.planned(half)} cells, "
        f"{', '.join(devices)}. Pairs, losses, splits and the reasons for them: benchmarks/tada/pairs.yaml. Test rows: "
        + ", ".join(f"{p} {tested[p]}" for p in half.pairs("final") if p in tested) + ".", "",
        *notes.unfinished(half, final), *notes.other_grids(final),
        f"A level chosen without labels is the one of {len(LEVELS)} at which the answers to the calibration inputs have the most "
        "information (docs/tada.md). It, and coefficients below 0.5, came after a first round had shown the test rows of these "
        "pairs: what they add here is seen, not foretold. Coefficients and densities at their best are those that "
        "validation rows of the domain choose, for ours and all others "
        "alike; baselines are not cut to the rank unless it is said. Intervals: 95 %, a bootstrap of pairs, then seeds and rows "
        "within a pair. Six pairs are few: an interval says what these six say.", "",
        *notes.balance(final),
        "```sh", "python benchmarks/tada/run.py --jobs 12 --until 540   # again until nothing is left",
        "python benchmarks/tada/report.py --write", "```", "",
    ]  # fmt: skip
    parts: list[tuple[str, str, list[str]]] = [
        ("What it was to show", "", table(["what", "measured", "verdict"], verdicts)),
        ("All methods", f"Accuracy, %, means over seeds; the last column in points.\n\n![accuracy and gates](tada-{name}.png)",
         main_table(half, final)),
        ("Gates over depth", "The domain's share of the gate by third of the depth, mean over seeds.", gates(half, final)),
        ("Ablations", "Ours at weights of 1, one part changed.", table(["", "average", "less ours at 1/1"], ablated)),
        ("Calibration inputs", "", sizes(half, final)),
        ("Ranks", "Two pairs, seed 0: no interval.", ranks(half, final)),
        ("Development pairs", "What the design was chosen by; these pairs are in no figure above.", developed(half, develop)),
        ("Screen", "Validation rows of seed 0, before any design was run on these pairs.",
         screened(half, screen) if screen.rows else []),
    ]  # fmt: skip
    lines += sections(parts)
    if merged:
        lines += [f"A merge of ours took {merged[len(merged) // 2]:.2f} s (median, beside other processes)."]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
