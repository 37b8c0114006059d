"""The card of a model that an adapter was added to: what went in, its hash and licence, and how much it changed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Exported
    from .checkpoint import Checkpoint


def card(result: Exported, base: Checkpoint) -> str:
    """README.md; the header names a licence only where base and adapter state the same one."""
    import yaml

    adapter = result.adapter
    name = result.base.name if result.base.revision else None if result.assumed else adapter.base.name
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["loralloy", "merged-lora"]}
    if name and not name.startswith((".", "/")):
        front["base_model"] = name
    if base.licence and base.licence == adapter.licence:
        front["license"] = base.licence
    # A folder's path is of no use to a reader elsewhere, and not theirs to know.
    shown = result.base if result.base.revision else replace(result.base, name=name or base.folder.name)
    times = "" if result.weight == 1 else f"{result.weight:g} "
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {result.folder.name}", ""]
    lines += [
        f"The adapter `{adapter.name}` added into a copy of `{shown.name}` by LoRAlloy: W + {times}dW in "
        f"{len(result.modules)} modules, stored as {', '.join(sorted(result.dtypes)) or 'the base is'}. Every other tensor is "
        "the base's, byte for byte.",
        "",
        "| part | what | licence |",
        "|---|---|---|",
        f"| base | {shown} | {base.licence or 'not stated'} |",
        f"| adapter | {adapter.name}, weight {result.weight:g}, `{adapter.content_hash}` | {adapter.licence or 'not stated'} |",
    ]
    merge = adapter.provenance.get("merge") or {}
    for parent in merge.get("parents", []):
        weight = parent.get("weight")
        how = f"{weight:.6g}" if isinstance(weight, int | float) else "by module"
        lines.append(
            f"| merged into the adapter | {parent.get('name')}, weight {how}, `{parent.get('hash')}` | "
            f"{parent.get('licence') or 'not stated'} |"
        )
    lines += [
        "",
        "| how much it changed | |",
        "|---|---|",
        f"| norm of dW over norm of W, adapted modules | {result.change:.3e} |",
        f"| part of dW lost to rounding | {result.lost:.3e} |",
    ]
    for module, added in sorted(result.modules.items(), key=lambda item: -item[1].change)[:5]:
        lines.append(f"| most changed: {module} | {added.change:.3e} |")
    lines.append("")
    if result.replaced:
        lines += [f"Tensors that the adapter saved whole: {', '.join(f'`{n}`' for n in result.replaced)}.", ""]
    lines += [f"- {note}" for note in result.notes]
    return "\n".join(lines).rstrip() + "\n"
