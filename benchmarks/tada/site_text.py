"""The language half in one process: a causal language model, tasks' rows, trainings and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from plan import HERE, LEARNED_ROWS, Half, Job
from texts import as_task, inputs

from loralloy.errors import LoralloyError
from loralloy.live.base import load_base
from loralloy.live.scoring import correct, predict
from loralloy.tasks.task import Example, Task
from loralloy.training import train
from loralloy.training.config import TrainConfig
from loralloy.training.data import fit_prompt
from loralloy.training.loop import total_steps
from loralloy.weighting.general_texts import GENERAL
from loralloy.weighting.probed import text_batches

EXAMPLES = HERE.parents[1] / "examples"
_ROOM = 16  # tokens that a prompt leaves to the answer, as in `loralloy train`
_PROBED = 192  # tokens of a calibration text


class TextSite:
    read_at = -1  # the last token: prompts are padded on the left

    def __init__(self, half: Half, out: Path, device: str = "auto") -> None:
        self.half, self.out, self.device = half, out, device
        self.path = str((HERE / half.fields["model"]).resolve())
        self.model, self.tokenizer = load_base(self.path, half.fields["dtype"], device)
        self._tasks: dict[str, Task] = {}
        self._rows: dict[tuple[str, str], tuple[list[Example], list[str]]] = {}

    def task(self, kind: str, name: str) -> Task:
        path = self.half.fields["tasks" if kind == "task" else "domains"][name]
        if path not in self._tasks:
            self._tasks[path] = Task.load(EXAMPLES / path)
        return self._tasks[path]

    def begin(self, seed: int) -> None:
        """Nothing is drawn by the seed but adapters and samples."""

    def train(self, job: Job, out: Path) -> None:
        f = self.half.fields
        if job.kind == "domain":
            texts = inputs(self.task("domain", job.of), self.half.few or f["limit"])
            file = self.out / "texts" / f"{job.of}.jsonl"
            task = as_task(f"text_{job.of}", texts, file.with_stem(f"{job.of}-s{job.seed}-r{job.rank}"))
        else:
            task = self.task(job.kind, job.of)
        rows = min(len(task.rows()["train"]), f["limit"])
        config = TrainConfig(
            rank=job.rank, alpha=f["alpha"] * job.rank / self.half.rank, dropout=0.0, lr=f["lr"], batch_size=f["batch_size"],
            max_length=f["max_length"], loss="full_text" if job.kind == "domain" else "answer", seed=job.seed,
            limit=f["limit"],
        )  # fmt: skip
        epochs = f["steps"] / total_steps(rows, TrainConfig.of(config, {"epochs": 1.0}))
        dtype = str(self.model.dtype).removeprefix("torch.")
        train(
            task, self.path, out, config=TrainConfig.of(config, {"epochs": epochs}), dtype=dtype, device=self.device,
            evaluate=False, save_every=10**6,
        )  # fmt: skip

    def answers(self, domain: str, split: str) -> list[bool]:
        """Which rows of a domain's split are answered right under what is set in the model."""
        examples, prompts = self.rows(domain, split)
        found = predict(
            self.model, self.tokenizer, prompts, [e.options for e in examples],
            batch_size=self.half.fields["evaluate"]["batch_size"],
        )  # fmt: skip
        return correct(found, [e.answer for e in examples])

    def rows(self, domain: str, split: str) -> tuple[list[Example], list[str]]:
        if (domain, split) not in self._rows:
            task = self.task("domain", domain)
            examples = task.examples(split, self.half.few)  # type: ignore[arg-type]
            self._rows[domain, split] = examples, [self._prompt(e, task) for e in examples]
        return self._rows[domain, split]

    def _prompt(self, example: Example, task: Task) -> str:
        return fit_prompt(self.tokenizer, example, task.hint, self.half.fields["max_length"] - _ROOM)[0]

    def unlabelled(self, kind: str, name: str, count: int, seed: int) -> list[dict[str, Any]]:
        """Batches of training inputs, the first `count` of the seed's order: a smaller sample is part of a larger one."""
        texts = inputs(self.task(kind, name))
        chosen = [texts[i] for i in drawn(len(texts), count, seed)]
        return list(text_batches(self.tokenizer, chosen, 32, _PROBED, self.model.device))

    def general(self) -> list[dict[str, Any]]:
        return list(text_batches(self.tokenizer, GENERAL, 32, _PROBED, self.model.device))

    def unlabelled_answers(self, domain: str, count: int, seed: int) -> Callable[[], torch.Tensor]:
        """Log-probabilities [count, options] of the answers to the inputs that `unlabelled` gives, asked as the task asks."""
        from loralloy.weighting.levels import text_answers

        task = self.task("domain", domain)
        rows = {" ".join(e.raw.split()): e for e in reversed(task.examples("train"))}  # of equal texts the first
        texts = inputs(task)
        chosen = [rows[texts[i]] for i in drawn(len(texts), count, seed)]
        prompts = [self._prompt(e, task) for e in chosen]
        return text_answers(self.model, self.tokenizer, prompts, [e.options for e in chosen], 64)

    def directions(self, domain: str) -> torch.Tensor:
        """[labels, hidden], what raises each label at the last token. Raises LoralloyError for a task without labels."""
        from loralloy.weighting.balance import text_directions

        task = self.task("domain", domain)
        if not task.labels:
            raise LoralloyError(
                f"the rows of task {task.name!r} have options of their own: there is no shift that all share"
            )
        return text_directions(self.model, self.tokenizer, task.labels)

    def objective(self, domain: str, kind: str, seed: int) -> Any:
        """Of learned coefficients: labelled training rows of the domain, or unlabelled prompts, as many as are calibrated on."""
        from dataclasses import replace

        from loralloy.weighting.learned.objective import TextObjective

        task = self.task("domain", domain)
        every = task.examples("train")
        order = [every[i] for i in drawn(len(every), len(every), seed)]
        if kind == "entropy":
            chosen = order[: self.half.calibration]
        elif task.labels:
            chosen = [e for label in task.labels for e in [e for e in order if e.answer == label][:LEARNED_ROWS]]
        else:
            chosen = order[: 4 * LEARNED_ROWS]
        shown = [
            # entropy must not see the label, not even to balance by it
            replace(e, prompt=self._prompt(e, task), answer=e.options[0] if kind == "entropy" else e.answer)
            for e in chosen
        ]
        return TextObjective(self.model, self.tokenizer, shown, kind="entropy" if kind == "entropy" else "answer")


def drawn(n: int, count: int, seed: int) -> list[int]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 + seed)).tolist()
    return order[:count]


def sample(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    return [items[i] for i in drawn(len(items), count, seed)]
