"""`train`: from a task file and a base model to an adapter on disk, with its figures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..adapter import Adapter
from ..atomic import check_free
from ..base_ref import BaseRef, compare
from ..console import console, progress
from ..errors import LoralloyError
from . import checkpoint
from . import output as output_files
from .config import TrainConfig
from .data import encode_examples, fingerprint, fit_prompt
from .loop import attach, check_tracker, fit, total_steps

if TYPE_CHECKING:
    from ..tasks.task import Example, Task


def train(
    task: Task | str | Path,
    model: str,
    output: str | Path,
    *,
    config: TrainConfig | None = None,
    dtype: str = "auto",
    device: str = "auto",
    base_name: str | None = None,
    save_dtype: str = "fp16",
    save_every: int = 100,
    resume: bool = True,
    overwrite: bool = False,
    tracker: str = "none",
    evaluate: bool = True,
    eval_limit: int | None = None,
    eval_batch_size: int = 32,
    licence: str = "apache-2.0",
    command: str | None = None,
    **hyperparameters: Any,
) -> dict[str, Any]:
    """Train one LoRA adapter of `model` on `task`, write it to `output` in PEFT's format, and return its metrics.

    task: a Task or the path of its YAML file. model: folder or hub id ``org/name@revision``. Hyperparameters: fields of
    :class:`TrainConfig` (rank, alpha, dropout, target_modules, lr, ...), by keyword or as `config`.
    base_name: the hub id to record (``org/name`` or ``org/name@revision``) when `model` is a local copy of it.
    save_dtype: "fp16", "bf16" or "fp32" of the saved factors (they are trained in float32). eval_limit: at most so many
    rows of each of test and validation. tracker: "none", "tensorboard" or "wandb".

    The output folder appears whole at the end. Until then only ``<output>.training`` exists beside it: checkpoints
    every `save_every` steps, from which the same call goes on after a kill; it is removed at the end.
    Raises LoralloyError before any work when `output` exists (without overwrite) or an option is wrong, and when a
    checkpoint belongs to other settings.
    """
    from ..hub import parse_ref
    from ..live.base import load_base, pick_device
    from ..tasks.task import Task

    target = Path(output).absolute()
    check_free(target, overwrite)
    config = TrainConfig.of(config, hyperparameters)
    if save_dtype not in output_files.SAVE_DTYPES:
        raise LoralloyError(f"--save-dtype {save_dtype!r} is unknown; use {', '.join(output_files.SAVE_DTYPES)}")
    if eval_limit is not None and eval_limit < 1:
        raise LoralloyError(f"--eval-limit is {eval_limit}; it must be at least 1 (--no-evaluate skips the evaluation)")
    check_tracker(tracker)
    if not isinstance(task, Task):
        task = Task.load(task)
    examples = task.examples("train", config.limit)
    if dtype == "auto" and pick_device(device).type == "cpu":
        dtype = "float32"  # measured faster than bfloat16 in training, and a resumed run must not depend on a timing
    base, tokenizer = load_base(model, dtype, device)
    name, revision = parse_ref(base_name or model)
    local = model if Path(model).is_dir() else None
    record = output_files.base_record(base, local, name, revision)
    encoded, cuts = encode_examples(tokenizer, examples, task.hint, config.max_length)
    if cuts:
        console.print(
            f"{task.name}: {cuts} of {len(encoded)} prompts cut to {config.max_length} tokens (start of their text)",
            soft_wrap=True,
        )
    device_, dtype_ = base.get_input_embeddings().weight.device, str(base.dtype).removeprefix("torch.")
    peft_model = attach(base, config, name, revision)
    count = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    steps = total_steps(len(encoded), config)
    console.print(
        f"{task.name}: {len(encoded)} rows, {steps} steps of {config.batch_size * config.grad_accumulation}, "
        f"{count:,} trainable parameters, {device_.type} {dtype_}",
        soft_wrap=True,
    )
    start = _first_stage(config, record)
    identity = {
        "hyperparameters": config.to_dict() | start,
        "data": fingerprint(encoded),
        "base": record["fingerprint"],
        "dtype": dtype_,
    }
    work = checkpoint.folder_for(target)
    try:
        log = fit(
            peft_model, encoded, config, folder=work, identity=identity, pad=tokenizer.pad_token_id, title=task.name,
            save_every=save_every, resume=resume, tracker=tracker, runs=Path("runs") / target.name,
        )  # fmt: skip
        metrics: dict[str, Any] = {"version": 1, "task": task.name, "base": record, "truncated": cuts}
        tail = [entry["loss"] for entry in log[-10:]]
        training = {
            "task": task.name,
            "hyperparameters": config.to_dict(),
            "rows": len(encoded),
            "steps": len(log),
            "dtype": dtype_,
            "saved_as": save_dtype,
            "final_loss": sum(tail) / len(tail),
            "eos_token": tokenizer.eos_token,
            "loralloy": __version__,
        } | start
        metrics["training"] = training | {
            "seconds": log[-1]["seconds"],
            "device": device_.type,
            "tokens": log[-1]["tokens"],
        }
        if evaluate:
            metrics |= evaluate_adapter(peft_model, tokenizer, task, config, eval_limit, eval_batch_size)
        command = command or command_line(task, model, output, config, base_name)
        output_files.write(
            target, peft_model, task=task, base=record, training=training, metrics=metrics, log=log,
            save_dtype=save_dtype, command=command, licence=licence, overwrite=overwrite,
        )  # fmt: skip
    except KeyboardInterrupt:
        if work.is_dir():
            console.print(
                f"stopped; only {work} was written: the same command goes on from it (--no-resume: anew)",
                soft_wrap=True,
            )
        raise
    checkpoint.remove(work)
    return metrics


def _first_stage(config: TrainConfig, base: dict[str, Any]) -> dict[str, Any]:
    """What a run that goes on from an adapter records of it: its name, hash and own training. Checks that the base is its."""
    if config.init_adapter is None:
        return {}
    adapter = Adapter.load(config.init_adapter)
    verdict, why = compare(adapter.base, BaseRef.from_dict(base))
    if verdict == "different":
        raise LoralloyError(f"--init-adapter {adapter.name!r} is of {adapter.base}, another base model: {why}")
    first = {"name": adapter.name, "hash": adapter.content_hash, "training": adapter.provenance.get("training", {})}
    return {"first_stage": first}


def evaluate_adapter(
    model: Any, tokenizer: Any, task: Task, config: TrainConfig, limit: int | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """Accuracies of `model` (a PeftModel) and its base: ``{"base_format", "validation", "test"}``, as in metrics.json.

    The base also answers in the prompt format that suits it best on validation rows (:mod:`..live.base_format`).
    A split without rows is left out.
    """
    from ..live.base_format import BaseFormat, best_base_format, usable_formats
    from ..live.scoring import correct, predict
    from ..stats import Accuracy, accuracy, majority

    room = config.max_length - 16

    def answered(examples: Sequence[Example], prompts: list[str], tick: Any) -> Accuracy:
        rows = [example.options for example in examples]
        found = predict(model, tokenizer, prompts, rows, batch_size=batch_size, progress=tick)
        return accuracy(correct(found, [example.answer for example in examples]))

    splits = {split: task.examples(split, limit) for split in ("validation", "test")}
    formats = usable_formats(tokenizer)
    result: dict[str, Any] = {}
    total = len(splits["validation"]) * (1 + len(formats)) + len(splits["test"]) * 3
    with progress() as bar:
        job = bar.add_task(f"{task.name}: evaluating", total=total)

        def tick(n: int) -> None:
            bar.update(job, advance=n)

        form = BaseFormat("as_trained")
        if splits["validation"]:
            with model.disable_adapter():
                form = best_base_format(
                    model, tokenizer, task, splits["validation"], formats=formats, batch_size=batch_size, progress=tick
                )
        result["base_format"] = {"name": form.name, "validation": {k: v.to_dict() for k, v in form.validation.items()}}
        for split, examples in splits.items():
            if not examples:
                continue
            prompts = [fit_prompt(tokenizer, example, task.hint, room)[0] for example in examples]
            entry: dict[str, Any] = {"adapter": answered(examples, prompts, tick).to_dict()}
            if split == "test":
                with model.disable_adapter():
                    entry["base"] = answered(examples, prompts, tick).to_dict()
                    best = [form.render(task, example, tokenizer) for example in examples]
                    same = form.name == "as_trained"
                    entry["base_best_format"] = entry["base"] if same else answered(examples, best, tick).to_dict()
            else:
                entry["base"] = form.validation["as_trained"].to_dict()
                entry["base_best_format"] = form.validation[form.name].to_dict()
            label, share = majority([example.answer for example in examples])
            result[split] = entry | {"majority": {"label": label, "share": share}}
    return result


def command_line(task: Task, model: str, output: str | Path, config: TrainConfig, base_name: str | None) -> str:
    """The `loralloy train` command that makes this adapter again: only what differs from the defaults is named."""
    words = ["loralloy", "train", str(task.path or f"{task.name}.yaml"), "--model", model, "-o", str(output)]
    if base_name:
        words += ["--base-name", base_name]
    default = TrainConfig()
    for option in fields(TrainConfig):
        value = getattr(config, option.name)
        if value == getattr(default, option.name):
            continue
        flag = "--" + option.name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else [f"--no-{flag[2:]}"]
        else:
            number = f"{value:g}" if isinstance(value, float) else str(value)
            words += [flag, ",".join(value) if isinstance(value, tuple) else number]
    return shlex.join(words)
