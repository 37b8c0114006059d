"""The model card of a trained adapter: README.md with the front matter that the hub reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .. import __version__
from .loop import LOG_NAME

if TYPE_CHECKING:
    from ..tasks.task import Task
    from .mixture import Mixture

_HOW = "The option whose text has the highest log-likelihood counts as the answer (greedy text where the task has no options)."


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row(name: str, entry: dict[str, Any]) -> str:
    return f"| {name} | {entry['accuracy']:.3f} | {entry['low']:.3f} to {entry['high']:.3f} | {entry['n']} |"


def _first_stage(first: dict[str, Any] | None) -> list[str]:
    """What an adapter that went on from another one says of it."""
    if first is None:
        return []
    told = first["training"]
    settings = ", ".join(f"{k} {_plain(v)}" for k, v in told.get("hyperparameters", {}).items() if v is not None)
    steps = f"{told.get('steps', '?')} steps on {told.get('rows', '?')} rows"
    return [f"It went on from an adapter `{first['hash']}` trained before ({steps}; {settings}).", ""]


def model_card(
    task: Task,
    base: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any],
    command: str,
    licence: str,
    name: str,
) -> str:
    """README.md of one task's adapter: what it is for, its accuracies, and how to make it again."""
    lines = _front(base, licence, name, task.family)
    lines += [
        f"A LoRA adapter of `{base['name']}` for the task **{task.name}** (family {task.family}), made with LoRAlloy.",
        "",
    ]
    lines += [f"- Task: {task.hint}"]
    if task.labels:
        lines += [f"- Answers: {', '.join(task.labels)}"]
    lines += [f"- Data: {task.data_source or 'not stated'}", f"- Licence of the data: {task.licence or 'not stated'}"]
    lines += [*_base(base), "", "## Accuracy", ""]
    test = metrics.get("test")
    if test:
        chosen = metrics["base_format"]["name"]
        lines += ["| on held-out test rows | accuracy | 95 % interval (Wilson) | n |", "|---|---|---|---|"]
        lines += [_row("this adapter", test["adapter"]), _row("base, the adapter's prompt", test["base"])]
        lines += [_row(f"base, best prompt on validation rows (`{chosen}`)", test["base_best_format"])]
        label, share = test["majority"]["label"], test["majority"]["share"]
        lines += [f"| majority class ({label}) | {share:.3f} | | {test['adapter']['n']} |", "", _HOW]
    else:
        lines += ["Not evaluated (`--no-evaluate`, or no test rows)."]
    return "\n".join([*lines, *_made(base, training, command)])


def mixture_card(
    mixture: Mixture,
    base: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any],
    command: str,
    licence: str,
    name: str,
) -> str:
    """README.md of one adapter for several tasks: its tasks with their data, and accuracies by task."""
    lines = _front(base, licence, name, *sorted({task.family for task in mixture.tasks} - {""}))
    lines += [
        f"One LoRA adapter of `{base['name']}` for {len(mixture.tasks)} tasks together, trained on the union of their "
        "training rows; made with LoRAlloy.",
        "",
    ]
    lines += _base(base)
    lines += ["", "## Tasks", "", "| task | training rows | data | licence of the data |", "|---|---|---|---|"]
    for task in mixture.tasks:
        rows = training["tasks"][task.name]["rows"]
        lines += [f"| {task.name} | {rows} | {task.data_source or 'not stated'} | {task.licence or 'not stated'} |"]
    lines += ["", "## Accuracy", ""]
    mean = metrics.get("mean", {}).get("test")
    if mean:
        lines += [
            "| on held-out test rows | this adapter | 95 % interval (Wilson) | base, same prompt | base, best prompt | n |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        for task_name, told in metrics["tasks"].items():
            if "test" not in told:
                continue
            own, plain, best = (told["test"][k] for k in ("adapter", "base", "base_best_format"))
            lines += [
                f"| {task_name} | {own['accuracy']:.3f} | {own['low']:.3f} to {own['high']:.3f} | {plain['accuracy']:.3f} | "
                f"{best['accuracy']:.3f} | {own['n']} |"
            ]
        lines += [
            f"| mean of {mean['tasks']} tasks | {mean['adapter']:.3f} | | {mean['base']:.3f} | "
            f"{mean['base_best_format']:.3f} | |",
            "",
            _HOW,
        ]
    else:
        lines += ["Not evaluated (`--no-evaluate`, or no test rows)."]
    return "\n".join([*lines, *_made(base, training, command)])


def _front(base: dict[str, Any], licence: str, name: str, *tags: str) -> list[str]:
    import yaml

    front = {
        "base_model": base["name"],
        "library_name": "peft",
        "license": licence,
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", "loralloy", *tags],
    }
    return ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]


def _base(base: dict[str, Any]) -> list[str]:
    lines = [f"- Base: `{base['name']}`" + (f", revision `{base['revision']}`" if base["revision"] else "")]
    lines += [f"- Fingerprint of the base: `{base['fingerprint']}`"]
    lines += [f"- sha256 of the base's {file}: `{digest}`" for file, digest in base.get("files", {}).items()]
    if base.get("files"):
        lines += [
            f"- The base was a local copy with these weights. A checkpoint called `{base['name']}` with others (another "
            "quantisation, say) is another base: LoRAlloy compares fingerprints and refuses it."
        ]
    return lines


def _made(base: dict[str, Any], training: dict[str, Any], command: str) -> list[str]:
    lines = ["", "## Made with", "", "```", command, "```", ""]
    lines += _first_stage(training.get("first_stage"))
    lines += ["| setting | value |", "|---|---|"]
    shown = {k: _plain(v) for k, v in training["hyperparameters"].items()}
    lines += [f"| {k} | {v} |" for k, v in shown.items()]
    lines += [f"| training rows | {training['rows']} |", f"| steps | {training['steps']} |"]
    lines += [f"| base dtype | {training['dtype']} |", f"| saved as | {training['saved_as']} |"]
    final = training["final_loss"]
    if math.isfinite(final):
        lines += [f"| loss at the end (mean of the last 10 steps) | {final:.4f} |"]
    lines += ["", f"LoRAlloy {__version__}. Losses step by step: `{LOG_NAME}`; all figures: `metrics.json`.", ""]
    lines += [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
    ]
    lines += [f'base = AutoModelForCausalLM.from_pretrained("{base["name"]}")']
    lines += ['model = PeftModel.from_pretrained(base, "path/to/this/folder")', "```", ""]
    return lines
