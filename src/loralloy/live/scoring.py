"""Answers from a language model: the log-likelihood of each option's text, or greedy free text.

Prompt and answer are tokenized separately and joined, here and in training, so that what is scored is what was learned.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError

if TYPE_CHECKING:
    from torch import Tensor

RowsHook = Callable[[list[int]], AbstractContextManager[Any]]
_TOKENS = 1024  # whose logits are float32 at once
_EXPAND = 4  # rows x options of one forward over the cache, as a multiple of batch_size: bounds the cache's memory


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt: BOS if this tokenizer uses one (and the text has none yet), then the text, never EOS."""
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and list(tokenizer("a")["input_ids"])[:1] == [bos]:
        ids = [bos, *ids]
    if not ids:
        raise LoralloyError("a prompt is empty, so there is nothing to answer")
    return ids


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of ``" " + answer``, without special tokens. Raises LoralloyError if there are none."""
    ids = list(tokenizer(" " + answer, add_special_tokens=False)["input_ids"])
    if not ids or not answer.strip():
        raise LoralloyError(f"the answer {answer!r} has no text to score")
    return ids


@contextlib.contextmanager
def _inference(model: Any) -> Iterator[None]:
    """No gradients and no dropout; the training flag is put back afterwards."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def pad_rows(rows: Sequence[Sequence[int]], pad: int, device: Any, left: bool) -> tuple[Tensor, Tensor]:
    """``(ids, mask)``, both int64 [rows, longest]."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span] = torch.tensor(row)
        mask[i, span] = 1
    return ids.to(device), mask.to(device)


def pad_id(tokenizer: Any) -> int:
    return int(next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0))


def check_room(model: Any, longest: int) -> None:
    """Raise LoralloyError for more tokens than the model has positions for: its answers would be noise, and say nothing."""
    room = getattr(model.config, "max_position_embeddings", None)
    if room and longest > room:
        raise LoralloyError(
            f"prompt and answer have {longest} tokens, the model takes {room}; shorten the text, or use a model with a longer "
            "context"
        )


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: every special token, since none is text, and what the model itself stops at."""
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = stops if isinstance(stops, list | tuple) else [stops]
    return {int(i) for i in (*tokenizer.all_special_ids, *stops) if i is not None}


def _batches(prompts: list[list[int]], size: int) -> Iterator[list[int]]:
    """Indices in batches of about one length, the longest first, so that running out of memory shows at once."""
    if size < 1:
        raise LoralloyError(f"batch_size is {size}; it must be at least 1")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def score_options(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    rows_hook: RowsHook | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Log-likelihood of each option after each prompt: for every prompt a float32 CPU tensor [its options].

    The sum over the option's tokens of log p(token | before), nats, as lm-evaluation-harness' `acc` (not normalised by
    length). The prompt runs once, left padded with explicit positions; an option's first token is scored from the
    prompt's last logits, and only options of several tokens run again, over the prompt's expanded KV cache.

    rows_hook(indices) is entered around every forward with the prompts' indices in row order, so that each row may have
    its own adapter weights; around an expanded forward the indices repeat (row-major, once for every option run).
    progress(n) is called after each batch with the number of prompts done in it.
    Raises LoralloyError when a prompt has no options, an option has no text, or a score is not a number.
    """
    import torch

    if len(prompts) != len(options):
        raise LoralloyError(f"{len(prompts)} prompts but {len(options)} lists of options; give one list a prompt")
    hook: RowsHook = rows_hook or (lambda indices: contextlib.nullcontext())
    known: dict[str, list[int]] = {}
    for i, row in enumerate(options):
        if not row:
            raise LoralloyError(f"prompt {i} has no options to score; use generate() for free text")
        for text in row:
            if text not in known:
                known[text] = encode_answer(tokenizer, text)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    pairs = zip(prompt_ids, options, strict=True)
    check_room(model, max((len(ids) + max(len(known[text]) for text in row) for ids, row in pairs), default=0))
    device, pad = model.get_input_embeddings().weight.device, pad_id(tokenizer)
    results: list[Tensor] = [torch.empty(0)] * len(prompts)

    with _inference(model):
        for batch in _batches(prompt_ids, batch_size):
            tokens = [[known[text] for text in options[i]] for i in batch]
            # (row in the batch, option, ids) of what one token cannot decide
            longer = [(r, o, ids) for r, row in enumerate(tokens) for o, ids in enumerate(row) if len(ids) > 1]
            ids, mask = pad_rows([prompt_ids[i] for i in batch], pad, device, left=True)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with hook(batch):
                output = model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=bool(longer), logits_to_keep=1
                )
            logp = output.logits[:, -1].float().log_softmax(-1)
            width = max(len(row) for row in tokens)
            first = torch.tensor([[ids[0] for ids in row] + [0] * (width - len(row)) for row in tokens], device=device)
            scores = logp.gather(1, first)  # [batch, most options]
            chunk = max(1, _EXPAND * batch_size)
            for start in range(0, len(longer), chunk):
                part = longer[start : start + chunk]
                last = start + chunk >= len(longer)
                cache = output.past_key_values if last else copy.deepcopy(output.past_key_values)
                rest = _score_rest(model, cache, mask, part, batch, hook, pad)
                where = torch.tensor([[r, o] for r, o, _ in part], device=device)
                scores[where[:, 0], where[:, 1]] += rest
            host = scores.cpu()
            if host.isnan().any():  # argmax of NaN would quietly answer with the first option
                raise LoralloyError(
                    "the model's scores are not numbers; load it in float32, or check the adapter's weights"
                )
            for i, row_scores, sizes in zip(batch, host, tokens, strict=True):
                results[i] = row_scores[: len(sizes)].clone()
            if progress:
                progress(len(batch))
    return results


def _score_rest(
    model: Any,
    cache: Any,
    mask: Tensor,
    part: list[tuple[int, int, list[int]]],
    batch: list[int],
    hook: RowsHook,
    pad: int,
) -> Tensor:
    """Log-likelihood [pairs] of the tokens after the first, over the prompts' cache, which is expanded in place."""
    import torch

    rows = torch.tensor([r for r, _, _ in part], device=mask.device)
    cache.batch_select_indices(rows)
    ids, own = pad_rows([ids[:-1] for _, _, ids in part], pad, mask.device, left=False)
    targets, _ = pad_rows([ids[1:] for _, _, ids in part], 0, mask.device, left=False)
    before = mask[rows]
    positions = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=mask.device)
    with hook([batch[r] for r, _, _ in part]):
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat([before, own], 1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
    kept, scores = own.bool(), torch.zeros(own.shape, device=mask.device)
    # only where there is a token, and some at a time: float32 copies of all logits would be most of a batch's memory
    parts = zip(logits[kept].split(_TOKENS), targets[kept].split(_TOKENS), strict=True)
    scores[kept] = torch.cat([-torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in parts])
    return scores.sum(1)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    rows_hook: RowsHook | None = None,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy free-text answers, in input order: stripped text up to EOS (or any special token), the end of the line or
    `max_new_tokens`.

    rows_hook and progress as in :func:`score_options`.
    """
    import torch

    hook: RowsHook = rows_hook or (lambda indices: contextlib.nullcontext())
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_room(model, max(map(len, prompt_ids), default=0) + max_new_tokens)
    device, pad, ends = model.get_input_embeddings().weight.device, pad_id(tokenizer), _ends(model, tokenizer)
    results = [""] * len(prompts)
    with _inference(model):
        for batch in _batches(prompt_ids, batch_size):
            ids, mask = pad_rows([prompt_ids[i] for i in batch], pad, device, left=True)
            positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
            written: list[list[int]] = [[] for _ in batch]
            open_rows = set(range(len(batch)))
            for _ in range(max_new_tokens):
                with hook(batch):
                    output = model(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                    )
                cache, chosen = output.past_key_values, output.logits[:, -1].argmax(-1)
                for r, token in enumerate(chosen.tolist()):
                    if r not in open_rows:
                        continue
                    if token in ends:
                        open_rows.discard(r)
                        continue
                    written[r].append(token)
                    if "\n" in tokenizer.decode([token]):
                        open_rows.discard(r)
                if not open_rows:
                    break
                ids, positions = chosen[:, None], positions[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(len(batch), 1)], 1)
            for i, tokens in zip(batch, written, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                results[i] = text.split("\n")[0].strip()
            if progress:
                progress(len(batch))
    return results


def predict(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    rows_hook: RowsHook | None = None,
    progress: Callable[[int], None] | None = None,
    max_new_tokens: int = 32,
) -> list[str]:
    """One answer a prompt: the likeliest of its options (the first of equals), or greedy text where it has none."""
    answers = [""] * len(prompts)
    closed = [i for i, row in enumerate(options) if row]
    free = [i for i, row in enumerate(options) if not row]

    def among(chosen: list[int]) -> RowsHook | None:
        # the inner call counts its own rows from 0; the hook must see the caller's
        return (lambda indices: rows_hook([chosen[i] for i in indices])) if rows_hook else None

    if closed:
        scores = score_options(
            model, tokenizer, [prompts[i] for i in closed], [options[i] for i in closed],
            batch_size=batch_size, rows_hook=among(closed), progress=progress,
        )  # fmt: skip
        for i, row in zip(closed, scores, strict=True):
            answers[i] = options[i][int(row.argmax())]
    if free:
        texts = generate(
            model, tokenizer, [prompts[i] for i in free], max_new_tokens, among(free),
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        for i, text in zip(free, texts, strict=True):
            answers[i] = text
    return answers


def correct(predicted: Sequence[str], gold: Sequence[str]) -> list[bool]:
    """Exact match once case and white space are evened out (free text is forgiven its case)."""
    return [
        " ".join(p.split()).casefold() == " ".join(g.split()).casefold() for p, g in zip(predicted, gold, strict=True)
    ]
