"""Examples to token ids, and token ids to batches whose order is a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError
from ..live.scoring import encode_answer, encode_prompt

if TYPE_CHECKING:
    from ..tasks.task import Example

IGNORED = -100  # cross_entropy's ignore_index
_POOL = 32  # batches sorted by length together: large enough to save padding, small enough to keep batches mixed


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + answer + eos; the last `answer` of them are the answer's."""

    ids: tuple[int, ...]
    answer: int


def fit_prompt(tokenizer: Any, example: Example, hint: str, room: int) -> tuple[str, bool]:
    """The prompt in at most `room` tokens, and whether it was cut: the start of the columns' text goes first.

    The hint and the cue stay, because the adapter answers to them. Raises LoralloyError if they alone do not fit.
    """
    if len(encode_prompt(tokenizer, example.prompt)) <= room:
        return example.prompt, False
    # one column: its text stands in the prompt behind its prefix; several: all between hint and cue counts as text
    start = example.prompt.rfind(example.raw)
    end = start + len(example.raw)
    if start < 0:
        start = len(hint) + 1 if hint and example.prompt.startswith(hint) else 0
        end = len(example.query) if example.prompt.startswith(example.query) else len(example.prompt)
    head, text, tail = example.prompt[:start], example.prompt[start:end], example.prompt[end:]
    low, high = 0, len(text)  # the fewest characters to drop; tokens shrink with text, near enough for a bisection
    while low < high:
        middle = (low + high) // 2
        if len(encode_prompt(tokenizer, head + text[middle:] + tail)) <= room:
            high = middle
        else:
            low = middle + 1
    cut = head + text[low:] + tail
    if not text[low:].strip() or len(encode_prompt(tokenizer, cut)) > room:
        raise LoralloyError(
            f"{example.id}: hint and cue leave no room for the text in {room} tokens; raise --max-length"
        )
    return cut, True


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], hint: str, max_length: int
) -> tuple[list[Encoded], int]:
    """``(encoded, how many prompts were cut)``. The answer is never cut.

    Raises LoralloyError when there is nothing to train on or an answer does not fit.
    """
    if not examples:
        raise LoralloyError("the task has no training rows left; lower splits.test or splits.validation, or add data")
    if tokenizer.eos_token_id is None:
        raise LoralloyError("the tokenizer has no eos token, so the adapter could not learn where an answer ends")
    encoded, cuts = [], 0
    for example in examples:
        answer = [*encode_answer(tokenizer, example.answer), tokenizer.eos_token_id]
        if len(answer) >= max_length:
            raise LoralloyError(f"{example.id}: the answer alone has {len(answer)} tokens; raise --max-length")
        prompt, cut = fit_prompt(tokenizer, example, hint, max_length - len(answer))
        cuts += cut
        encoded.append(Encoded((*encode_prompt(tokenizer, prompt), *answer), len(answer)))
    return encoded, cuts


def fingerprint(encoded: Sequence[Encoded]) -> str:
    """sha256 of the token ids: what a resumed run must have in common with the one it goes on with."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(repr((row.ids, row.answer)).encode())
    return digest.hexdigest()


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every index once, in shuffled batches of about one length; depends on (seed, epoch) alone."""
    import torch

    generator = torch.Generator().manual_seed(mix(seed, epoch))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = _POOL * batch_size
    batches = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda i: lengths[i])
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbours give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def collate(rows: Sequence[Encoded], pad: int, loss: str, device: Any) -> tuple[dict[str, Any], Any, int]:
    """``(inputs of the model, labels [rows, kept], number of tokens in the loss)``, right padded.

    Right padded, because under a causal mask a left-padded row's pad positions attend to nothing, and the backward of
    fused attention kernels on a GPU can make NaN of such rows (seen on an H100 with torch 2.11, bfloat16).
    ``logits_to_keep`` spares the vocabulary projection of what comes before the first answer: the logits are
    [rows, kept + 1, vocabulary], and all but the last column predict the labels.
    """
    import torch

    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    first = width
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        learned = row.answer if loss == "answer" else len(tokens) - 1  # nothing predicts the first token
        labels[i, len(tokens) - learned : len(tokens)] = tokens[len(tokens) - learned :]
        first = min(first, len(tokens) - learned)
    labels = labels[:, first:]
    count = int((labels != IGNORED).sum())
    inputs = {
        "input_ids": ids.to(device, non_blocking=True),
        "attention_mask": mask.to(device, non_blocking=True),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(device, non_blocking=True),
        "logits_to_keep": width - first + 1,
    }
    return inputs, labels.to(device, non_blocking=True), count
