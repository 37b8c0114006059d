"""`train --bank`: one adapter a task into one folder, several processes at once on one device."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import CONFIG_FILE
from ..atomic import recover
from ..console import console
from ..errors import LoralloyError
from . import checkpoint
from .bank_display import Display
from .config import RunOptions, TrainConfig, flags
from .jobs import DONE, FAILED, Job, last_lines, run_jobs
from .lock import locked
from .loop import LOG_NAME, total_steps

if TYPE_CHECKING:
    from ..tasks.task import Task


@dataclass
class BankRun:
    """What became of each task: metrics (as in metrics.json) of those trained now and before, errors of the others."""

    trained: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    logs: Path | None = None
    """Folder of the logs by task; None once it is removed, when nothing failed."""


def train_bank(
    tasks: Iterable[str | Path],
    model: str,
    output: str | Path,
    *,
    config: TrainConfig | None = None,
    jobs: int | None = None,
    options: RunOptions | None = None,
    **hyperparameters: Any,
) -> BankRun:
    """Train an adapter of `model` for every task (files and folders of them) into ``output/<task's name>``.

    Each is a `loralloy train` of its own, `jobs` at a time (None: see :func:`default_jobs`), the longest first. A task
    that fails does not stop the others. Adapters that are there already are kept, so the same call resumes a stopped
    one; ``options.overwrite`` trains them anew. Logs by task are in ``<output>.training`` until nothing has failed.

    Raises LoralloyError before any work when there is no task, two have one name, another run trains this bank, or an
    adapter that is there was made with other settings; and at the end when the adapters are not of one base model.
    """
    from ..tasks.task import load_tasks

    if jobs is not None and jobs < 1:
        raise LoralloyError(f"--jobs is {jobs}; it must be at least 1")
    config = TrainConfig.of(config, hyperparameters)
    options = options or RunOptions()
    bank = Path(output).absolute()
    if (bank / CONFIG_FILE).is_file():
        raise LoralloyError(f"{bank} is an adapter; --bank writes a folder of adapters, so choose another output")
    found = load_tasks(list(tasks))
    with locked(bank):
        bank.mkdir(parents=True, exist_ok=True)
        run = BankRun(logs=checkpoint.folder_for(bank))
        left = []
        for task in found:
            target = bank / task.name
            recover(target)
            if target.exists() and not options.overwrite:
                run.kept[task.name] = _kept(target, task, model, config, options)
            else:
                left.append(task)
        todo = plan(left, model, Path(output), config, options, run)
        if todo or run.failed:
            _run(todo, jobs, options, run, model, bank)
        paths = [bank / name for name in (*run.kept, *run.trained)]
        if paths:
            from ..bank import Bank

            Bank.load(paths)
        if not run.failed and run.logs is not None:
            for log in run.logs.glob("*.log"):  # nothing else: a single adapter's checkpoints may lie there
                log.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                run.logs.rmdir()
            run.logs = None
    return run


def _kept(target: Path, task: Task, model: str, config: TrainConfig, options: RunOptions) -> dict[str, Any]:
    """The metrics of a finished adapter. Raises LoralloyError when it was made with other settings or of another base."""
    from ..hub import parse_ref

    try:
        metrics: dict[str, Any] = json.loads((target / "metrics.json").read_text(encoding="utf-8"))
        was, base = metrics["training"]["hyperparameters"], metrics["base"]["name"]
        rows, template = metrics["training"]["rows"], metrics["training"].get("template")
    except (OSError, ValueError, KeyError, TypeError):
        raise LoralloyError(
            f"{target} is there but was not written by `loralloy train`; move it away, or pass --overwrite"
        ) from None
    name, _ = parse_ref(options.base_name or model)
    have = len(task.examples("train", config.limit))
    now = config.to_dict() | {"base": name, "rows": have, "template": template and task.template_hash()}
    was = was | {"base": base, "rows": rows, "template": template}
    differ = [f"{k} (then {was.get(k)!r}, now {now[k]!r})" for k in now if was.get(k) != now[k]]
    if differ:
        raise LoralloyError(
            f"{target} was trained with other settings: {'; '.join(differ[:3])}. Repeat them, choose another output, or "
            "pass --overwrite to train all anew"
        )
    return metrics


def plan(
    tasks: Sequence[Task], model: str, output: Path, config: TrainConfig, options: RunOptions, run: BankRun
) -> list[Job]:
    """A job a task, the longest first: one that starts last would run alone at the end."""
    planned = []
    words = [*flags(config), *flags(options)]
    for task in tasks:
        try:
            examples = task.examples("train", config.limit)
        except LoralloyError as error:
            run.failed[task.name] = f"error: {error}"
            continue
        room = 4 * config.max_length  # about four characters a token
        length = sum(min(room, len(e.prompt) + len(e.answer)) for e in examples) * config.epochs
        target = output / task.name
        job = Job(
            task.name,
            [sys.executable, "-m", "loralloy", "train", str(task.path), "-m", model, "-o", str(target), *words],
            _log_of(run, task.name),
            _progress_of(target.absolute()),
            total_steps(max(1, len(examples)), config),
            target.absolute() / "metrics.json",
        )
        planned.append((length, job))
    return [job for _, job in sorted(planned, key=lambda pair: -pair[0])]


def _log_of(run: BankRun, name: str) -> Path:
    assert run.logs is not None
    return run.logs / f"{name}.log"


def _progress_of(target: Path) -> Any:
    """A function that reads (steps, loss) from the last line of a run's training log."""

    def look() -> tuple[int, float | None]:
        for folder in (checkpoint.folder_for(target), target):
            for line in reversed(last_lines(folder / LOG_NAME, 2).splitlines()):
                try:
                    entry = json.loads(line)
                    return int(entry["step"]), float(entry["loss"])
                except (ValueError, KeyError, TypeError):  # its last line is being written
                    continue
        return 0, None

    return look


def default_jobs(device: str = "auto", model: str = "") -> int:
    """Processes at once: on a GPU one a core, as far as its memory goes; on a CPU one, which uses all cores.

    A job is taken to need 3 GiB and three times the model's weights, at least 4 GiB; where that is too little, jobs that run
    out of memory wait until fewer run.
    """
    import torch

    from ..live.base import pick_device

    chosen = pick_device(device)
    if chosen.type != "cuda":
        return 1
    weights = sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    each = max(4.0, 3.0 + 3 * weights / 2**30)
    memory = torch.cuda.get_device_properties(chosen).total_memory / 2**30
    return max(1, min(_cores(), int(memory / each)))


def _cores() -> int:
    """The processors that this process may use; a container's quota counts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such control group, or "max"
        return cores


def _run(todo: list[Job], jobs: int | None, options: RunOptions, run: BankRun, model: str, bank: Path) -> None:
    assert run.logs is not None
    slots = min(jobs or default_jobs(options.device, model), max(1, len(todo)))
    environment = dict(os.environ)
    # a process that trains on a GPU is one busy thread; more threads of many processes only push each other aside
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // slots)))
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    console.print(
        f"{bank.name}: {len(todo)} adapters to train, {slots} at a time, {len(run.kept)} there already; logs in {run.logs}",
        soft_wrap=True,
    )
    for name, error in run.failed.items():
        console.print(f"{name} cannot be trained: {error.removeprefix('error: ')}", soft_wrap=True, markup=False)
    try:
        with Display(todo) as display:
            run_jobs(todo, slots, environment=environment, show=display.show)
    except KeyboardInterrupt:
        finished = len(run.kept) + sum(job.state == DONE for job in todo)
        console.print(
            f"stopped; {finished} adapters are in {bank}, and the same command goes on with the others", soft_wrap=True
        )
        raise
    for job in todo:
        if job.state == FAILED:
            run.failed[job.name] = job.error
        else:
            run.trained[job.name] = json.loads((bank / job.name / "metrics.json").read_text(encoding="utf-8"))
