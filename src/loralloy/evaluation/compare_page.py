"""A comparison as a table in the terminal, as a page, and as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from .compare import SYSTEMS, Comparison

HEADINGS = {
    "majority": "majority",
    "base": "base",
    "own": "own adapter",
    "routed": "routed",
    "routed_raw": "routed, no hint",
    "uniform": "uniform",
}
_COLOURS = {
    "majority": "#c9c9c9", "base": "#8c8c8c", "own": "#1b4965", "routed": "#e07a2f", "routed_raw": "#f2b880",
    "uniform": "#7fb7be",
}  # fmt: skip


def terminal_table(comparison: Comparison, summary: dict[str, Any]) -> Any:
    """A rich table: one row a task, one column a system, the overall row with 95 % intervals."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"accuracy on {summary['n']} held-out examples"
    table = Table(
        title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD,
        show_edge=False, pad_edge=False, collapse_padding=True,  # six systems fit in 80 columns
    )  # fmt: skip
    table.add_column("task", no_wrap=True)
    for system in comparison.correct:
        table.add_column(HEADINGS[system], justify="right")
    for task, row in summary["by_task"].items():
        table.add_row(task, *(f"{row[s]['value']:.3f}" for s in comparison.correct))
    table.add_section()
    total = summary["accuracy"]
    table.add_row("all", *(f"{total[s]['value']:.3f}" for s in comparison.correct), style="bold")
    for end, heading in (("low", "95 % from"), ("high", "95 % to")):  # two rows: a range does not fit in 80 columns
        table.add_row(heading, *(f"{total[s][end]:.3f}" for s in comparison.correct), style="dim")
    return table


def difference_lines(summary: dict[str, Any]) -> list[str]:
    """The paired differences, in points, one a line."""
    return [
        f"{name}: {100 * d['value']:+.1f} points (95 % {100 * d['low']:+.1f} to {100 * d['high']:+.1f})"
        for name, d in summary["difference"].items()
    ]


def markdown(comparison: Comparison, summary: dict[str, Any], title: str, command: str, notes: list[str]) -> str:
    """The page of a comparison: what each column is, the table, the differences, the settings."""
    systems = list(comparison.correct)
    lines = [f"# {title}", "", f"Made by `{command}`.", ""]
    lines += [f"- **{HEADINGS[s]}**: {SYSTEMS[s]}" for s in systems] + [""]
    lines.append("| task | " + " | ".join(HEADINGS[s] for s in systems) + " |")
    lines.append("|---|" + "---:|" * len(systems))
    for task, row in summary["by_task"].items():
        lines.append(f"| {task} | " + " | ".join(f"{row[s]['value']:.3f}" for s in systems) + " |")
    total = summary["accuracy"]
    lines.append(
        f"| **all** (n = {summary['n']}) | "
        + " | ".join(f"**{total[s]['value']:.3f}** ({total[s]['low']:.3f} to {total[s]['high']:.3f})" for s in systems)
        + " |"
    )
    lines += [
        "",
        "Intervals are 95 % (Wilson). Paired differences, 95 % by bootstrap over examples (10,000 draws, seed 0):",
        "",
    ]
    lines += [f"- {line}" for line in difference_lines(summary)]
    lines += ["", "Routing:", ""] + [f"- {name}: {value:.3f}" for name, value in summary["routing"].items()]
    shown = {k: v for k, v in summary["settings"].items() if k != "adapters"}
    lines += ["", "Settings: " + "; ".join(f"{k} {json.dumps(v)}" for k, v in shown.items()), ""]
    return "\n".join(lines + [f"{note}\n" for note in notes])


def plot(summary: dict[str, Any], systems: list[str], path: Path) -> None:
    """Grouped bars by task, and overall with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(summary["by_task"])
    groups = [*tasks, "all"]
    width = 0.84 / len(systems)
    figure, axes = plt.subplots(figsize=(max(8.0, 1.0 * len(groups) + 2), 4.2))
    for i, system in enumerate(systems):
        rows = [summary["by_task"][t][system] for t in tasks] + [summary["accuracy"][system]]
        values = [r["value"] for r in rows]
        errors = [[r["value"] - r["low"] for r in rows], [r["high"] - r["value"] for r in rows]]
        x = [g + (i - (len(systems) - 1) / 2) * width for g in range(len(groups))]
        axes.bar(x, values, width, yerr=errors, label=HEADINGS[system], color=_COLOURS[system],
                 error_kw={"lw": 0.7, "alpha": 0.55})  # fmt: skip
    axes.set_xticks(range(len(groups)), [g.replace("_", "\n") for g in groups], fontsize=8)
    axes.axvline(len(groups) - 1.5, color="#bbbbbb", lw=0.8)
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"accuracy ({summary['n']} held-out examples)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(systems), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12))
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    atomic_file(path, picture.getvalue())
    plt.close(figure)


def write(comparison: Comparison, summary: dict[str, Any], folder: Path, name: str, title: str, command: str,
          notes: list[str]) -> None:  # fmt: skip
    """Write NAME.md, NAME.json and NAME.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plot(summary, list(comparison.correct), folder / f"{name}.png")
    page = markdown(comparison, summary, title, command, notes) + f"\n![accuracy by task]({name}.png)\n"
    atomic_file(folder / f"{name}.md", page)
    atomic_file(folder / f"{name}.json", json.dumps(summary, indent=1) + "\n")
