"""The adapter's folder: what PEFT loads, the log, the figures, and a model card. Written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..atomic import atomic_folder
from ..errors import LoralloyError
from .loop import LOG_NAME

if TYPE_CHECKING:
    from ..tasks.task import Task

HEADER_VERSION = 1
SAVE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def base_record(model: Any, folder: str | None, name: str, revision: str | None) -> dict[str, Any]:
    """Which base this is: name, revision, fingerprint, and its weight files' sha256 when it is a local folder."""
    from ..live.base import base_fingerprint

    record: dict[str, Any] = {"name": name, "revision": revision, "fingerprint": base_fingerprint(model)}
    if folder is not None:
        files = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 22):
                    digest.update(block)
            files[path.name] = digest.hexdigest()
        record["files"] = files
    return record


def adapter_tensors(model: Any, dtype: str) -> dict[str, Any]:
    """PEFT's state dict (``base_model.model.<module>.lora_A.weight``) on the CPU, in fp16, bf16 or fp32.

    Raises LoralloyError when a value is not finite, or does not fit fp16.
    """
    import torch
    from peft import get_peft_model_state_dict

    tensors = {}
    for key, value in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items()):
        stored = value.detach().to(getattr(torch, SAVE_DTYPES[dtype])).cpu().contiguous()
        if not torch.isfinite(stored).all():
            way = "save with --save-dtype bf16" if torch.isfinite(value).all() else "lower --lr"
            raise LoralloyError(f"{key} has values that are not finite in {dtype}; {way}")
        tensors[key] = stored
    return tensors


def write(
    output: Path,
    model: Any,
    *,
    task: Task,
    base: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any],
    log: list[dict[str, Any]],
    save_dtype: str,
    command: str,
    licence: str,
    overwrite: bool,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors, training_log.jsonl, metrics.json and README.md atomically.

    The safetensors header carries ``{"format": "pt", "loralloy": {"version": 1, "base": ..., "training": ...}}``, so
    that the base can be told from the weights file alone.
    """
    from safetensors.torch import save_file

    header = {"version": HEADER_VERSION, "base": base, "training": training}
    tensors = adapter_tensors(model, save_dtype)
    with atomic_folder(output, overwrite) as new:
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt", "loralloy": json.dumps(header)})
        config = model.peft_config["default"]
        training_mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(new))
        config.inference_mode = training_mode
        path = new / "adapter_config.json"
        # safetensors writes for the owner alone; a shared adapter is as readable as the files beside it
        (new / "adapter_model.safetensors").chmod(path.stat().st_mode & 0o777)
        plain = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(plain.get("target_modules"), list):
            plain["target_modules"].sort()  # peft holds a set, whose order changes from run to run
        path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (new / LOG_NAME).write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
        (new / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        card = model_card(task, base, training, metrics, command, licence, output.name)
        (new / "README.md").write_text(card, encoding="utf-8")


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
    """README.md: YAML front matter as the hub reads it, then the task, the figures and how to make it again."""
    import yaml

    front = {
        "base_model": base["name"],
        "library_name": "peft",
        "license": licence,
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", "loralloy", task.family],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    lines += [
        f"A LoRA adapter of `{base['name']}` for the task **{task.name}** (family {task.family}), made with LoRAlloy.",
        "",
    ]
    lines += [f"- Task: {task.hint}"]
    if task.labels:
        lines += [f"- Answers: {', '.join(task.labels)}"]
    lines += [f"- Data: {task.data_source or 'not stated'}", f"- Licence of the data: {task.licence or 'not stated'}"]
    lines += [f"- Base: `{base['name']}`" + (f", revision `{base['revision']}`" if base["revision"] else "")]
    lines += [f"- Fingerprint of the base: `{base['fingerprint']}`"]
    lines += [f"- sha256 of the base's {file}: `{digest}`" for file, digest in base.get("files", {}).items()]
    if base.get("files"):
        lines += [
            f"- The base was a local copy with these weights. A checkpoint called `{base['name']}` with others (another "
            "quantisation, say) is another base: LoRAlloy compares fingerprints and refuses it."
        ]
    lines += ["", "## Accuracy", ""]
    test = metrics.get("test")
    if test:
        chosen = metrics["base_format"]["name"]
        lines += ["| on held-out test rows | accuracy | 95 % interval (Wilson) | n |", "|---|---|---|---|"]
        lines += [_row("this adapter", test["adapter"]), _row("base, the adapter's prompt", test["base"])]
        lines += [_row(f"base, best prompt on validation rows (`{chosen}`)", test["base_best_format"])]
        label, share = test["majority"]["label"], test["majority"]["share"]
        lines += [f"| majority class ({label}) | {share:.3f} | | {test['adapter']['n']} |"]
        how = "The option whose text has the highest log-likelihood counts as the answer"
        lines += ["", how + " (greedy text where the task has no options)."]
    else:
        lines += ["Not evaluated (`--no-evaluate`, or no test rows)."]
    lines += ["", "## Made with", "", "```", command, "```", ""]
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
    return "\n".join(lines)
