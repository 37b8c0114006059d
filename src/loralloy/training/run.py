"""`train`: from a task file and a base model to an adapter on disk, with its figures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..adapter import Adapter
from ..atomic import check_free
from ..base_ref import BaseRef, compare
from ..console import console
from ..errors import LoralloyError
from . import checkpoint
from . import output as output_files
from .attach import attach
from .card import mixture_card, model_card
from .config import RunOptions, TrainConfig, flags
from .data import fingerprint
from .evaluate import evaluate_adapter
from .lock import locked
from .loop import fit, total_steps
from .mixture import Mixture

if TYPE_CHECKING:
    from ..tasks.task import Task


def train(
    task: Task | str | Path | Sequence[Task | str | Path],
    model: str,
    output: str | Path,
    *,
    name: str | None = None,
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

    task: a Task or the path of its YAML file; or several (files, folders of files), which `name` then calls together:
    the adapter learns the union of their rows (`limit` rows of each), and its metrics are by task with their mean.
    model: folder or hub id ``org/name@revision``. Hyperparameters: fields of :class:`TrainConfig` (rank, alpha, dropout,
    target_modules, lr, ...), by keyword or as `config`.
    base_name: the hub id to record (``org/name`` or ``org/name@revision``) when `model` is a local copy of it.
    save_dtype: "fp16", "bf16" or "fp32" of the saved factors (they are trained in float32). eval_limit: at most so many
    rows of each of test and validation. tracker: "none", "tensorboard" or "wandb".

    The output folder appears whole at the end. Until then only ``<output>.training`` exists beside it: checkpoints
    every `save_every` steps, from which the same call goes on after a kill; it is removed at the end.
    Raises LoralloyError before any work when `output` exists (without overwrite), another run is training it, or an
    option is wrong, and when a checkpoint belongs to other settings.
    """
    target = Path(output).absolute()
    check_free(target, overwrite)
    config = TrainConfig.of(config, hyperparameters)
    options = RunOptions(
        dtype=dtype, device=device, base_name=base_name, save_dtype=save_dtype, save_every=save_every, resume=resume,
        overwrite=overwrite, tracker=tracker, evaluate=evaluate, eval_limit=eval_limit,
        eval_batch_size=eval_batch_size, licence=licence,
    )  # fmt: skip
    mixture = Mixture.of(task, name)
    with locked(target):
        check_free(target, overwrite)  # again: another run may have written it since
        return _train(mixture, model, output, config, options, command)


def _train(
    mixture: Mixture,
    model: str,
    output: str | Path,
    config: TrainConfig,
    options: RunOptions,
    command: str | None,
) -> dict[str, Any]:
    from ..hub import parse_ref
    from ..live.base import load_base, pick_device

    target, dtype = Path(output).absolute(), options.dtype
    for task in mixture.tasks:
        task.rows()  # what is wrong with the data is said before the model is loaded
    if dtype == "auto" and pick_device(options.device).type == "cpu":
        dtype = "float32"  # measured faster than bfloat16 in training, and a resumed run must not depend on a timing
    base, tokenizer = load_base(model, dtype, options.device)
    name, revision = parse_ref(options.base_name or model)
    local = model if Path(model).is_dir() else None
    record = output_files.base_record(base, local, name, revision)
    encoded, data = mixture.encode(tokenizer, config)
    for task_name, told in data.items():
        if told["truncated"]:
            console.print(
                f"{task_name}: {told['truncated']} of {told['rows']} prompts cut to {config.max_length} tokens "
                "(start of their text)",
                soft_wrap=True,
            )
    device_, dtype_ = base.get_input_embeddings().weight.device, str(base.dtype).removeprefix("torch.")
    peft_model = attach(base, config, name, revision)
    count = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    steps = total_steps(len(encoded), config)
    console.print(
        f"{mixture.name}: {len(encoded)} rows, {steps} steps of {config.batch_size * config.grad_accumulation}, "
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
            peft_model, encoded, config, folder=work, identity=identity, pad=tokenizer.pad_token_id, title=mixture.name,
            save_every=options.save_every, resume=options.resume, tracker=options.tracker, runs=Path("runs") / target.name,
        )  # fmt: skip
        cuts = sum(told["truncated"] for told in data.values())
        metrics: dict[str, Any] = {"version": 1, "task": mixture.name, "base": record, "truncated": cuts}
        tail = [entry["loss"] for entry in log[-10:]]
        training = {
            "task": mixture.name,
            "hyperparameters": config.to_dict(),
            "rows": len(encoded),
            "steps": len(log),
            "dtype": dtype_,
            "saved_as": options.save_dtype,
            "final_loss": sum(tail) / len(tail),
            "eos_token": tokenizer.eos_token,
            "loralloy": __version__,
        } | start
        if not mixture.single:
            training["tasks"] = data
        else:
            training |= {key: next(iter(data.values()))[key] for key in ("data", "template")}
        metrics["training"] = training | {
            "seconds": log[-1]["seconds"],
            "device": device_.type,
            "tokens": log[-1]["tokens"],
        }
        if options.evaluate:
            metrics |= _evaluate(peft_model, tokenizer, mixture, config, options)
        command = command or command_line(mixture, model, output, config, options.base_name)
        about = (record, training, metrics, command, options.licence, target.name)
        card = model_card(mixture.tasks[0], *about) if mixture.single else mixture_card(mixture, *about)
        output_files.write(
            target, peft_model, base=record, training=training, metrics=metrics, log=log, card=card,
            save_dtype=options.save_dtype, overwrite=options.overwrite,
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


def _evaluate(model: Any, tokenizer: Any, mixture: Mixture, config: TrainConfig, options: RunOptions) -> dict[str, Any]:
    by_task = {}
    for task in mixture.tasks:
        found = evaluate_adapter(model, tokenizer, task, config, options.eval_limit, options.eval_batch_size)
        if mixture.single:
            return found
        by_task[task.name] = found
        if "test" in found:
            own, best = (found["test"][key]["accuracy"] for key in ("adapter", "base_best_format"))
            said = f"accuracy {own:.3f} (base, best prompt {best:.3f})"
            console.print(f"{mixture.name}: {task.name} {said}, {len(by_task)} of {len(mixture.tasks)}", soft_wrap=True)
    return mixture.joined(by_task)


def command_line(mixture: Mixture, model: str, output: str | Path, config: TrainConfig, base_name: str | None) -> str:
    """The `loralloy train` command that makes this adapter again: only what differs from the defaults is named."""
    words = ["loralloy", "train", *(str(task.path or f"{task.name}.yaml") for task in mixture.tasks)]
    words += [] if mixture.single else ["--name", mixture.name]
    words += ["--model", model, "-o", str(output), *(["--base-name", base_name] if base_name else [])]
    return shlex.join([*words, *flags(config)])
