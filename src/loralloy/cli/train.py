"""`loralloy train`: one adapter from a task file or several, or a bank of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LoralloyError

if TYPE_CHECKING:
    from ..training import RunOptions, TrainConfig
    from ..training.bank import BankRun

HYPER, RUN, EVAL = "Hyperparameters", "Running", "Evaluation and output"


def train(
    tasks: Annotated[
        list[Path],
        typer.Argument(help="Task files (YAML), or folders of them.", metavar="TASK...", show_default=False),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Base model: a folder, or a hub id org/name@revision.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write the adapter (--bank: the adapters) to.")
    ],
    bank: Annotated[
        bool, typer.Option("--bank", help="One adapter a task into OUTPUT; run again to go on.", rich_help_panel=RUN)
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(help="With --bank: how many at once; default by cores and GPU.", rich_help_panel=RUN)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="One adapter on the rows of all tasks, so called.", rich_help_panel=RUN)
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank r.", rich_help_panel=HYPER)] = 8,
    alpha: Annotated[
        float, typer.Option(help="PEFT's lora_alpha; the scaling is alpha / rank.", rich_help_panel=HYPER)
    ] = 16,
    dropout: Annotated[float, typer.Option(help="Dropout before the adapter.", rich_help_panel=HYPER)] = 0.05,
    target_modules: Annotated[
        str, typer.Option(help="Modules to adapt, by comma, or all-linear.", rich_help_panel=HYPER)
    ] = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.", rich_help_panel=HYPER)] = 3e-4,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.", rich_help_panel=HYPER)] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of steps (< 1) or steps (>= 1).", rich_help_panel=HYPER)] = 0.06,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows.", rich_help_panel=HYPER)] = 3,
    batch_size: Annotated[int, typer.Option(help="Examples of one forward.", rich_help_panel=HYPER)] = 16,
    grad_accumulation: Annotated[int, typer.Option(help="Forwards of one step.", rich_help_panel=HYPER)] = 1,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.", rich_help_panel=HYPER)] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are clipped to this norm.", rich_help_panel=HYPER)
    ] = 1.0,
    max_length: Annotated[
        int, typer.Option(help="Tokens of prompt and answer; longer text loses its start.", rich_help_panel=HYPER)
    ] = 512,
    loss: Annotated[str, typer.Option(help="answer, or full_text (the paper's).", rich_help_panel=HYPER)] = "answer",
    limit: Annotated[
        int | None, typer.Option(help="Use only the first N training rows (of each task).", rich_help_panel=HYPER)
    ] = None,
    init_adapter: Annotated[
        str | None,
        typer.Option(help="Go on from this adapter folder (same rank, alpha, modules).", rich_help_panel=HYPER),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initialisation, order and dropout.", rich_help_panel=HYPER)] = 0,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Less memory for about a third more time.", rich_help_panel=HYPER)
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the base: auto, float32, bfloat16, float16.", rich_help_panel=RUN)
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=RUN)] = "auto",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=RUN)] = 100,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Go on from OUTPUT.training if it is there.", rich_help_panel=RUN),
    ] = True,
    tracker: Annotated[str, typer.Option(help="none, tensorboard or wandb.", rich_help_panel=RUN)] = "none",
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Score test rows at the end.", rich_help_panel=EVAL)
    ] = True,
    eval_limit: Annotated[
        int | None, typer.Option(help="Score at most N rows of each split.", rich_help_panel=EVAL)
    ] = None,
    eval_batch_size: Annotated[int, typer.Option(help="Prompts scored at once.", rich_help_panel=EVAL)] = 32,
    base_name: Annotated[
        str | None, typer.Option(help="Hub id to record when --model is a local copy.", rich_help_panel=EVAL)
    ] = None,
    save_dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.", rich_help_panel=EVAL)] = "fp16",
    licence: Annotated[str, typer.Option(help="Licence in the model card.", rich_help_panel=EVAL)] = "apache-2.0",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT.", rich_help_panel=EVAL)] = False,
) -> None:
    """Train a LoRA adapter on a task (--bank: one for each task, --name: one for all), and say how good it is.

    Example:

        loralloy train examples/tasks/sms_spam.yaml -m .assets/models/SmolLM2-135M-Instruct -o adapters/sms_spam

        loralloy train --bank examples/tasks -m .assets/models/SmolLM2-135M-Instruct -o adapters --jobs 8

        loralloy train examples/tasks --name multitask -m .assets/models/SmolLM2-135M-Instruct -o adapters/multitask

    Stopped by Ctrl-C or killed, it leaves OUTPUT as it was; OUTPUT.training beside it holds the checkpoints from which
    the same command goes on. A bank keeps the adapters that are finished.
    """
    from ..training import RunOptions, TrainConfig

    config = TrainConfig(
        rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, lr=lr, schedule=schedule, warmup=warmup,
        epochs=epochs, batch_size=batch_size, grad_accumulation=grad_accumulation, weight_decay=weight_decay,
        max_grad_norm=max_grad_norm, max_length=max_length, loss=loss, limit=limit, seed=seed,
        gradient_checkpointing=gradient_checkpointing, init_adapter=init_adapter,
    )  # fmt: skip
    options = RunOptions(
        dtype=dtype, device=device, base_name=base_name, save_dtype=save_dtype, save_every=save_every, resume=resume,
        overwrite=overwrite, tracker=tracker, evaluate=evaluate, eval_limit=eval_limit,
        eval_batch_size=eval_batch_size, licence=licence,
    )  # fmt: skip
    if bank:
        if name is not None:
            raise LoralloyError("--name is for one adapter on several tasks; --bank calls each adapter as its task")
        _bank(tasks, model, output, config, options, jobs)
        return
    if jobs is not None:
        raise LoralloyError("--jobs is for --bank, which trains several adapters; a single one is one process")
    _one(tasks, name, model, output, config, options)


def _one(
    tasks: list[Path], name: str | None, model: str, output: Path, config: TrainConfig, options: RunOptions
) -> None:
    from rich.text import Text

    from ..console import out
    from ..training import train as run

    metrics = run(tasks, model, output, name=name, config=config, **vars(options))
    trained = f"  {metrics['training']['steps']} steps in {metrics['training']['seconds']:.0f} s"
    out.print(Text.assemble((str(output), "bold"), trained), soft_wrap=True)
    if "test" in metrics:
        out.print(accuracy_table(metrics))
    elif metrics.get("mean"):
        out.print(tasks_table(metrics))


def _bank(
    tasks: list[Path], model: str, output: Path, config: TrainConfig, options: RunOptions, jobs: int | None
) -> None:
    from ..console import console, out
    from ..training import train_bank

    run = train_bank(tasks, model, output, config=config, options=options, jobs=jobs)
    if run.trained or run.kept:
        out.print(bank_table(run, output))
    for name, error in run.failed.items():
        console.rule(f"{name} failed", align="left")
        console.print(error, soft_wrap=True, markup=False)
    if run.failed:
        raise LoralloyError(
            f"{len(run.failed)} of {len(run.failed) + len(run.trained) + len(run.kept)} tasks failed: "
            f"{', '.join(run.failed)} (logs in {run.logs}); the same command trains them again and keeps the others"
        )


def tasks_table(metrics: dict) -> object:
    """Test accuracy by task of an adapter for several, as a rich table."""
    from rich.table import Table

    from ..training.mixture import SCORES

    table = Table("task", "rows", "test accuracy", "base", "base, best prompt", title=metrics["task"])
    for name, found in metrics["tasks"].items():
        if "test" in found:
            scores = [f"{found['test'][key]['accuracy']:.3f}" for key in SCORES]
            table.add_row(name, str(found["test"]["adapter"]["n"]), *scores)
    if "test" in metrics["mean"]:
        table.add_section()
        table.add_row("mean", "", *(f"{metrics['mean']['test'][key]:.3f}" for key in SCORES))
    return table


def bank_table(run: BankRun, output: Path) -> object:
    """A line an adapter as a rich table: steps, seconds, loss at the end, accuracies on test rows."""
    from rich.table import Table

    table = Table(
        "adapter",
        "steps",
        "seconds",
        "loss",
        "test accuracy",
        "base",
        "base, best prompt",
        "majority",
        *([""] if run.kept else []),
    )
    table.title = f"{output}: {len(run.trained) + len(run.kept)} adapters"
    for name, metrics in {**run.kept, **run.trained}.items():
        told, test = metrics["training"], metrics.get("test")
        scores = (
            [f"{test[key]['accuracy']:.3f}" for key in ("adapter", "base", "base_best_format")] if test else ["-"] * 3
        )
        majority = f"{test['majority']['share']:.3f}" if test else "-"
        was = ["there already" if name in run.kept else ""] if run.kept else []
        row = [name, str(told["steps"]), f"{told['seconds']:.0f}", f"{told['final_loss']:.3f}", *scores, majority, *was]
        table.add_row(*row)
    return table


def accuracy_table(metrics: dict) -> object:
    """The test figures as a rich table."""
    from rich.table import Table

    test = metrics["test"]
    table = Table("", "accuracy", "95 % interval", title=f"{metrics['task']}: {test['adapter']['n']} held-out rows")
    names = {
        "adapter": "adapter",
        "base": "base, same prompt",
        "base_best_format": f"base, best prompt ({metrics['base_format']['name']})",
    }
    for key, name in names.items():
        entry = test[key]
        table.add_row(name, f"{entry['accuracy']:.3f}", f"{entry['low']:.3f} to {entry['high']:.3f}")
    table.add_row(f"majority class ({test['majority']['label']})", f"{test['majority']['share']:.3f}", "")
    return table
