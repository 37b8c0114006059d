"""The workshop of text: a causal language model and task files; adapters through :func:`loralloy.training.train`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base_ref import BaseRef
from ..console import progress
from ..errors import LoralloyError
from ..live.scoring import correct, encode_prompt, predict
from ..tasks.task import Example, Task
from ..training.config import SAVE_DTYPES, TrainConfig
from ..training.data import fit_prompt
from .fields import EvaluateEntry, check_options
from .workshop import Answering, Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from ..weighting.learned.objective import Objective
    from .buffer import BufferRow
    from .experience import DomainStream, Experience

_ANSWER_ROOM = 16  # tokens that a prompt leaves to the answer, as in the evaluation of `loralloy train`


class TextWorkshop:
    """See :class:`.workshop.Workshop`. Domains are tasks; a task of free text, or of a row's own options, has one class.

    Args:
        stream: of kind "text"; its `train` holds fields of :class:`loralloy.training.TrainConfig` (all but the seed and
            init_adapter) and `save_dtype`.
        model, tokenizer: as :func:`loralloy.live.base.load_base` gives them.

    Raises LoralloyError for an unknown training option, and for tasks without rows.
    """

    def __init__(self, stream: DomainStream, model: Any, tokenizer: Any) -> None:
        from ..hub import parse_ref
        from ..live.base import base_fingerprint

        self.stream, self.model, self.tokenizer = stream, model, tokenizer
        self.experiences: Mapping[str, Experience] = {e.name: e for e in stream.experiences}
        self.base = BaseRef(*parse_ref(stream.fields.model), base_fingerprint(model))
        given = dict(stream.fields.train)
        self.save_dtype = given.pop("save_dtype", "fp16")
        if not isinstance(self.save_dtype, str) or self.save_dtype not in SAVE_DTYPES:
            raise LoralloyError(f"`train.save_dtype` is {self.save_dtype!r}; use {', '.join(SAVE_DTYPES)}")
        for name in ("seed", "init_adapter"):
            if name in given:
                raise LoralloyError(f"`train.{name}` is the stream's own to set: remove it (`seeds` lists the seeds)")
        check_options(given, TrainConfig)
        self.config = TrainConfig.of(None, given)
        self._tests: dict[str, tuple[list[Example], list[str]]] = {}

    @staticmethod
    def from_stream(stream: DomainStream) -> TextWorkshop:
        """With the stream's model loaded; the tasks' rows are read first, so that what is wrong with them is said early."""
        from ..console import console
        from ..live.base import load_base, pick_device

        for experience in stream.experiences:
            _test_rows(experience, stream.fields.evaluate)
        dtype, device = stream.fields.dtype, stream.fields.device
        if dtype == "auto" and pick_device(device).type == "cpu":
            dtype = "float32"  # results must not depend on which dtype was faster in a timing
        with console.status("loading the base model"):
            model, tokenizer = load_base(stream.fields.model, dtype, device)
        return TextWorkshop(stream, model, tokenizer)

    def identity(self, what: str) -> dict[str, Any]:
        options = self.config.to_dict()
        del options["seed"], options["init_adapter"]
        dtype = str(self.model.dtype).removeprefix("torch.")
        found = {
            "kind": "text",
            "base": self.base.fingerprint,
            "train": options,
            "saved": self.save_dtype,
            "dtype": dtype,
        }
        if what == "evaluate":
            evaluate = self.stream.fields.evaluate
            found |= {"split": evaluate.split, "limit": evaluate.limit}
        return found

    def fingerprint(self, experience: Experience) -> str:
        task = _task(experience)
        digest = hashlib.sha256(task.template_hash().encode())
        for split, rows in task.rows().items():
            told = [[row.texts, row.answer, row.options, row.references] for row in rows]
            digest.update(json.dumps([split, task.labels, told]).encode())
        return digest.hexdigest()

    def leads(self) -> bool:
        return False

    def remembers(self) -> bool:
        return False

    def begin(self, seed: int, lead: Path | None) -> None:
        pass

    def train(self, experiences: Sequence[Experience], out: Path, seed: int, init: Path | None = None) -> Path:
        from ..training import train

        fields = self.stream.fields
        config = dataclasses.replace(self.config, seed=seed, init_adapter=None if init is None else str(init))
        tasks = [_task(experience) for experience in experiences]
        train(
            tasks if len(tasks) > 1 else tasks[0], fields.model, out, name=out.name if len(tasks) > 1 else None,
            config=config, dtype=str(self.model.dtype).removeprefix("torch."), device=fields.device,
            save_dtype=self.save_dtype, evaluate=False,
        )  # fmt: skip
        return out

    def labels(self, experience: Experience, split: str) -> tuple[list[str], list[str]]:
        task = _task(experience)
        examples = task.examples(split, self.config.limit if split == "train" else None)  # type: ignore[arg-type]
        return [e.id for e in examples], [e.answer if task.labels else "" for e in examples]

    def rows(self, experience: Experience, ids: Sequence[str]) -> list[dict[str, Any]]:
        known = {e.id: e for e in _task(experience).examples("train")}
        return [
            {
                "prompt": self._prompt(known[i], _task(experience)),
                "answer": known[i].answer,
                "options": list(known[i].options),
            }
            for i in ids
        ]

    def features(self, experience: Experience, ids: Sequence[str]) -> Tensor:
        """The mean over a prompt's tokens of the last hidden states."""
        import torch

        prompts = [row["prompt"] for row in self.rows(experience, ids)]
        found, size = [], self.stream.fields.evaluate.batch_size
        with torch.no_grad(), progress() as bar:
            job = bar.add_task(f"{experience.name}: features", total=len(prompts))
            for start in range(0, len(prompts), size):
                batch, mask = self._batch(prompts[start : start + size])
                hidden = self.model(**batch, output_hidden_states=True, logits_to_keep=1).hidden_states[-1].float()
                found.append(((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu())
                bar.advance(job, len(hidden))
        return torch.cat(found)

    def objective(self, rows: Sequence[BufferRow], kind: str = "answer") -> Objective:
        from ..weighting.learned.objective import TextObjective

        examples = []
        for row in rows:
            prompt, options = row.data["prompt"], tuple(row.data["options"])
            # entropy must not see the label, not even to balance by it
            answer = options[0] if kind == "entropy" and options else row.data["answer"]
            examples.append(Example(row.id, row.domain, prompt, prompt, prompt, answer, options))
        return TextObjective(self.model, self.tokenizer, examples, kind=kind)  # type: ignore[arg-type,return-value]

    def inputs(self, rows: Sequence[BufferRow]) -> list[dict[str, Any]]:
        size = self.stream.fields.evaluate.batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [self._batch([row.data["prompt"] for row in part])[0] for part in parts]

    def check_balance(self) -> None:
        from ..weighting.balance import text_directions

        labels = _classes(tuple(_task(experience).labels or ()) for experience in self.experiences.values())
        text_directions(self.model, self.tokenizer, labels)

    def answering(self, rows: Sequence[BufferRow]) -> Answering:
        from ..weighting.balance import text_directions
        from ..weighting.levels import text_answers

        labels = _classes(tuple(row.data["options"]) for row in rows)
        prompts, size = [row.data["prompt"] for row in rows], self.stream.fields.evaluate.batch_size
        run = text_answers(self.model, self.tokenizer, prompts, [labels] * len(prompts), size)
        return Answering(run, text_directions(self.model, self.tokenizer, labels), -1)

    def after_merge(self, rows: Sequence[BufferRow], step: Path | None = None) -> None:
        pass

    def evaluate(self, experience: Experience) -> Evaluation:
        fields = self.stream.fields.evaluate
        if experience.name not in self._tests:
            examples = _test_rows(experience, fields)
            self._tests[experience.name] = examples, [self._prompt(e, _task(experience)) for e in examples]
        examples, prompts = self._tests[experience.name]
        with progress() as bar:
            job = bar.add_task(f"{experience.name}: evaluating", total=len(prompts))
            found = predict(
                self.model, self.tokenizer, prompts, [e.options for e in examples], batch_size=fields.batch_size,
                progress=lambda n: bar.update(job, advance=n),
            )  # fmt: skip
        return Evaluation(tuple(correct(found, [e.answer for e in examples])))

    def _prompt(self, example: Example, task: Task) -> str:
        return fit_prompt(self.tokenizer, example, task.hint, self.config.max_length - _ANSWER_ROOM)[0]

    def _batch(self, prompts: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
        """Right-padded inputs of the model, and their mask [rows, longest]."""
        import torch

        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        width, device = max(map(len, ids)), self.model.get_input_embeddings().weight.device
        pad = torch.full((len(ids), width), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, tokens in enumerate(ids):
            pad[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        mask = mask.to(device)
        return {"input_ids": pad.to(device), "attention_mask": mask, "use_cache": False}, mask


def _classes(found: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The one set of classes that all have."""
    sets = set(found)
    if len(sets) != 1 or not (labels := next(iter(sets))):
        raise LoralloyError(
            f"`balance` evens out answers to one set of classes, and there are {len(sets) or 'no'} sets of options or free "
            "text; leave it out of this stream"
        )
    return labels


def _test_rows(experience: Experience, fields: EvaluateEntry) -> list[Example]:
    examples = _task(experience).examples(fields.split, fields.limit)
    if not examples:
        raise LoralloyError(f"task {experience.name!r} has no {fields.split} rows; raise its `splits.{fields.split}`")
    return examples


def _task(experience: Experience) -> Task:
    assert experience.task is not None  # the stream's fields have seen to it
    return experience.task
