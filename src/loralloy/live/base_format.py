"""The base model's fairest prompt: an adapter has seen its format in training, the base has not, so it may choose one.

The choice is made on validation rows and used on test rows: the base's column is neither starved nor tuned on the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError
from ..stats import Accuracy, accuracy
from .scoring import correct, predict

if TYPE_CHECKING:
    from ..tasks.task import Example, Task


def _parts(task: Task, example: Example) -> tuple[str, str, str]:
    """(hint and separator, columns, separator and cue): the pieces whose sum is the prompt."""
    opening = task.hint + task.separator if task.hint else ""
    if not example.prompt.startswith(opening):
        opening = ""
    end = len(example.query) if example.prompt.startswith(example.query) else len(example.prompt)
    return opening, example.prompt[len(opening) : end], example.prompt[end:]


def _listed(example: Example) -> str:
    return f"Options: {', '.join(example.options)}." if example.options else ""


def as_trained(task: Task, example: Example, tokenizer: Any) -> str:
    return example.prompt


def options(task: Task, example: Example, tokenizer: Any) -> str:
    """The hint, then the options by name, then the columns and the cue."""
    hint, columns, cue = _parts(task, example)
    return f"{hint}{_listed(example)}\n{columns}{cue}" if example.options else example.prompt


def options_last(task: Task, example: Example, tokenizer: Any) -> str:
    """The options by name just before the cue, where a small model still remembers them."""
    hint, columns, cue = _parts(task, example)
    return f"{hint}{columns}\n{_listed(example)}{cue}" if example.options else example.prompt


def no_hint(task: Task, example: Example, tokenizer: Any) -> str:
    _, columns, cue = _parts(task, example)
    return columns + cue


def chat(task: Task, example: Example, tokenizer: Any) -> str:
    """The chat template: question and options from the user; the assistant's turn opens with the cue."""
    hint, columns, cue = _parts(task, example)
    listed = _listed(example) + "\n" if example.options else ""
    messages = [{"role": "user", "content": hint + listed + columns}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + (
        cue.strip() or "Answer:"
    )


FORMATS: dict[str, Callable[[Any, Any, Any], str]] = {
    "as_trained": as_trained,
    "options": options,
    "options_last": options_last,
    "no_hint": no_hint,
    "chat": chat,
}


@dataclass(frozen=True)
class BaseFormat:
    """The chosen format's name, and every format's validation accuracy."""

    name: str
    validation: dict[str, Accuracy] = field(default_factory=dict)

    def render(self, task: Task, example: Example, tokenizer: Any) -> str:
        """The prompt of one example in this format."""
        return FORMATS[self.name](task, example, tokenizer)


def best_base_format(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    formats: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> BaseFormat:
    """The format in which the base is most often right on `examples` (validation rows); the first listed of equals.

    `model` must act as the base: the caller disables an adapter on it. `chat` is tried only when the tokenizer has a
    chat template. progress(n) counts prompts over all formats.
    Raises LoralloyError without examples or for an unknown format.
    """
    if not examples:
        raise LoralloyError(
            "no validation rows to choose the base's prompt format on; raise splits.validation in the task"
        )
    names = list(formats) if formats is not None else usable_formats(tokenizer)
    for name in names:
        if name not in FORMATS:
            raise LoralloyError(f"prompt format {name!r} is unknown; known: {', '.join(FORMATS)}")
    gold = [example.answer for example in examples]
    rows = [example.options for example in examples]
    found, tried = {}, {}
    for name in names:
        prompts = tuple(FORMATS[name](task, example, tokenizer) for example in examples)
        if prompts not in tried:  # without options or a hint several formats are the same text
            answers = predict(model, tokenizer, prompts, rows, batch_size=batch_size, progress=progress)
            tried[prompts] = accuracy(correct(answers, gold))
        elif progress:
            progress(len(prompts))
        found[name] = tried[prompts]
    best = max(found, key=lambda name: (found[name].value, -names.index(name)))
    return BaseFormat(best, found)


def usable_formats(tokenizer: Any) -> list[str]:
    """The formats that can be rendered with this tokenizer."""
    return [name for name in FORMATS if name != "chat" or getattr(tokenizer, "chat_template", None)]
