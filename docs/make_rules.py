"""Write the table of rules into docs/merging.md, from the rules themselves.

Example:
    python docs/make_rules.py
"""

from __future__ import annotations

from pathlib import Path

from loralloy.merging import PLUGINS, RULES, SPACES, Part

PAGE = Path(__file__).with_name("merging.md")
START, END = "<!-- rules -->", "<!-- end of rules -->"


def row(part: Part, where: str) -> str:
    """One line of the table."""
    parameters = "; ".join(f"`{p.name}` = {p.default} ({p.allowed})" for p in part.parameters.values()) or "none"
    return f"| `{part.name}` | {where} | {part.summary} | {part.use_when} | {parameters} | {part.source} |"


def table() -> str:
    """The rules, plug-ins and spaces in Markdown."""
    head = "| | {} | what it does | when | parameters = default | source |\n|---|---|---|---|---|---|"
    lines = [head.format("spaces")]
    lines += [row(rule, ", ".join(rule.spaces)) for rule in RULES.values()]
    lines += ["", "Plug-ins run before or after any rule:", "", head.format("runs")]
    lines += [row(plugin, plugin.when) for plugin in PLUGINS.values()]
    lines += ["", "Spaces:", "", "| | where the rule works |", "|---|---|"]
    lines += [f"| `{name}` | {how} |" for name, how in SPACES.items()]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table as it should be."""
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1] if END in rest else "\n"
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
