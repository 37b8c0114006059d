"""How good an adapter is: its accuracies on held-out rows of its task, beside the base's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..console import progress
from .config import TrainConfig
from .data import fit_prompt

if TYPE_CHECKING:
    from ..tasks.task import Example, Task


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
