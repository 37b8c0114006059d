"""Objectives: what coefficients are judged by, on a few examples, under whatever composition the model carries."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from ...errors import LoralloyError
from ...live.scoring import check_room, encode_answer, encode_prompt, pad_id, pad_rows

if TYPE_CHECKING:
    from torch import Tensor

    from ...tasks.task import Example

Kind: TypeAlias = Literal["answer", "entropy"]
_KEPT = 16  # sets of rows whose tensors are kept


class Objective(Protocol):
    """A loss over numbered examples, differentiable through the model's composition.

    Attributes:
        model: what it runs; a :class:`loralloy.live.learnable.Learnable` sets the composition in it.
        size: how many examples there are.
        strata: of each example, what it is one of ("tweets/positive"): losses average over these, and hold-outs are even.

    An objective may have `losses(rows, step) -> [len(rows)]`, the loss of each; then a run works through many rows in parts,
    and where it has `lengths`, a number an example, in parts of about one length: a part is padded to its longest.
    With `choices`, among how many answers each example chooses (0: its answer is free text), `losses` must be -log p of the right
    one, and `LearnConfig.label_noise` applies to them: by itself where a stratum has few.
    And `feed(rows, step)`, called before each: it says that the work never waits for the device and takes what changes from
    step to step from tensors that `feed` fills, so that a step may be recorded (see :mod:`.replay`). It returns all tensors
    that the loss of these rows reads, for a recording to keep.
    """

    @property
    def model(self) -> Any: ...

    @property
    def size(self) -> int: ...

    @property
    def strata(self) -> Sequence[str]: ...

    def loss(self, rows: Sequence[int], step: int = 0) -> Tensor:
        """The loss over these examples, a number: the mean within each stratum, averaged over the strata.

        `step` seeds augmentation.
        """
        ...


def shares(strata: Sequence[str], rows: Sequence[int]) -> list[float]:
    """How much of the loss each row is: strata weigh alike, and so do the rows of one; they sum to 1."""
    sizes = Counter(strata[i] for i in rows)
    return [1.0 / (len(sizes) * sizes[strata[i]]) for i in rows]


def _strata(examples: Sequence[Example]) -> list[str]:
    """Task and answer; the task alone for free text and where most examples have options of their own: no answer is a class."""
    sets: dict[str, list[frozenset[str]]] = {}
    for e in examples:
        sets.setdefault(e.task, []).extend([frozenset(e.options)] if e.options else [])
    classes = {task for task, some in sets.items() if 2 * len(set(some)) <= len(some)}
    return [f"{e.task}/{e.answer}" if e.options and e.task in classes else e.task for e in examples]


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter of the model asks for a gradient and nothing drops out inside the block; both are put back after it."""
    asked = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
        for m in training:
            m.training = True


@dataclass(frozen=True)
class _Rest:
    """Options of several tokens: all but the last token of each [pairs, width], what follows each token, and whose they are."""

    rows: Tensor
    where: Tensor
    ids: Tensor
    there: Tensor
    targets: Tensor


@dataclass(frozen=True)
class _Batch:
    """Rows as tensors: prompts [rows, width]; by option [rows, most options] the first token, whether it exists, its tokens;
    and of each row its share of the loss."""

    ids: Tensor
    mask: Tensor
    first: Tensor
    there: Tensor
    tokens: Tensor
    gold: Tensor
    free: Tensor
    share: Tensor
    rest: _Rest | None


class TextObjective:
    """A language model's loss on rendered examples.

    kind "answer": for an example with options, the cross-entropy of their summed log-likelihoods, which is what
    evaluation decides by; without options, the mean negative log-likelihood of the answer's tokens. kind "entropy": the
    entropy of the options' softmax, nats; it looks at no label (AdaMerging; Yang et al., ICLR 2024, section 3.2).

    Prompts run once, padded on the left; options of several tokens run once more, all together, over the prompts' cache. The
    scores are those of :func:`loralloy.live.scoring.score_options`.

    Args:
        model, tokenizer: of transformers.
        examples: rendered rows.
        kind: see above.
        normalise: divide each option's log-likelihood by its number of tokens.

    Raises LoralloyError for no examples, an answer that is not among its options, an answer or option without text, entropy
    without options, and a text longer than the model takes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Example],
        *,
        kind: Kind = "answer",
        normalise: bool = False,
    ) -> None:
        if kind not in get_args(Kind):
            raise LoralloyError(f"kind {kind!r} is not known; choose {', '.join(get_args(Kind))}")
        if not examples:
            raise LoralloyError("there are no examples to learn from; give at least one")
        self.model, self.kind, self.normalise = model, kind, normalise
        self.size, self.examples = len(examples), list(examples)
        self.strata = [e.task for e in examples] if kind == "entropy" else _strata(examples)
        self.choices = [0 if kind == "entropy" else len(e.options) for e in examples]
        self._pad = pad_id(tokenizer)
        self._batches: dict[tuple[int, ...], _Batch] = {}
        known: dict[str, list[int]] = {}
        self._prompts = [encode_prompt(tokenizer, e.prompt) for e in examples]
        self.lengths = [len(p) for p in self._prompts]
        self._options: list[list[list[int]]] = []
        self._gold: list[int] = []
        for e in examples:
            if kind == "entropy" and len(e.options) < 2:
                raise LoralloyError(
                    f"example {e.id!r} has no options, so it has no entropy over them; use kind 'answer'"
                )
            if kind == "answer" and e.options and e.answer not in e.options:
                raise LoralloyError(
                    f"example {e.id!r}: the answer {e.answer!r} is not one of its options {list(e.options)}"
                )
            texts = e.options or (e.answer,)
            self._options.append([known.setdefault(t, encode_answer(tokenizer, t)) for t in texts])
            self._gold.append(texts.index(e.answer) if kind == "answer" else 0)
        check_room(model, max(len(p) + max(map(len, o)) for p, o in zip(self._prompts, self._options, strict=True)))

    def scores(self, rows: Sequence[int]) -> list[Tensor]:
        """The log-likelihood of each option, summed over its tokens, nats: for every row a float32 tensor [its options]."""
        with frozen(self.model):
            scores = self._scores(self._batch(rows))
        return [s[: len(self._options[i])] for s, i in zip(scores, rows, strict=True)]

    def losses(self, rows: Sequence[int], step: int = 0) -> Tensor:
        """The loss of each row, [rows], float32."""
        batch = self._batch(rows)
        with frozen(self.model):
            scores = self._scores(batch)
        free = -scores[:, 0] / batch.tokens[:, 0]
        if self.normalise:
            scores = scores / batch.tokens
        logp = scores.log_softmax(1)
        if self.kind == "entropy":
            return -(logp.exp() * logp.masked_fill(~batch.there, 0.0)).sum(1)
        return free.where(batch.free, -logp.gather(1, batch.gold[:, None])[:, 0])

    def loss(self, rows: Sequence[int], step: int = 0) -> Tensor:
        """The mean within each stratum, averaged over the strata."""
        return self.losses(rows, step) @ self._batch(rows).share

    def feed(self, rows: Sequence[int], step: int) -> Any:
        """The rows as tensors; nothing changes from step to step."""
        return self._batch(rows)

    def _batch(self, rows: Sequence[int]) -> _Batch:
        """The rows as tensors; the last few sets of rows are kept, since most runs take all rows at every step."""
        key = tuple(rows)
        if key not in self._batches:
            while len(self._batches) >= _KEPT:
                self._batches.pop(next(iter(self._batches)))
            self._batches[key] = self._encode(rows)
        return self._batches[key]

    def _encode(self, rows: Sequence[int]) -> _Batch:
        import torch

        device = self.model.get_input_embeddings().weight.device
        options = [self._options[i] for i in rows]
        width = max(map(len, options))
        ids, mask = pad_rows([self._prompts[i] for i in rows], self._pad, device, left=True)

        def table(of: Callable[[list[int]], int], fill: int) -> Tensor:
            return torch.tensor([[of(o) for o in row] + [fill] * (width - len(row)) for row in options], device=device)

        longer = [(r, o, ids) for r, row in enumerate(options) for o, ids in enumerate(row) if len(ids) > 1]
        rest = None
        if longer:
            own, there = pad_rows([ids[:-1] for _, _, ids in longer], self._pad, device, left=False)
            targets, _ = pad_rows([ids[1:] for _, _, ids in longer], 0, device, left=False)
            of_row = torch.tensor([r for r, _, _ in longer], device=device)
            rest = _Rest(
                of_row, torch.tensor([r * width + o for r, o, _ in longer], device=device), own, there, targets
            )
        return _Batch(
            ids,
            mask,
            table(lambda o: o[0], 0),
            table(lambda o: 1, 0).bool(),
            table(len, 1),
            torch.tensor([self._gold[i] for i in rows], device=device),
            torch.tensor([not self.examples[i].options for i in rows], device=device),
            torch.tensor(shares(self.strata, rows), device=device),
            rest,
        )

    def _scores(self, batch: _Batch) -> Tensor:
        """[rows, most options]; -inf where a row has fewer."""
        import torch

        output = self.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=(batch.mask.cumsum(1) - 1).clamp(min=0),
            use_cache=batch.rest is not None,
            logits_to_keep=1,
        )
        logp = output.logits[:, -1].float().log_softmax(-1)
        scores = logp.gather(1, batch.first).masked_fill(~batch.there, -torch.inf)
        if batch.rest is None:
            return scores
        rest, cache = batch.rest, output.past_key_values
        cache.batch_select_indices(rest.rows)
        before = batch.mask[rest.rows]
        logits = self.model(
            input_ids=rest.ids,
            attention_mask=torch.cat([before, rest.there], 1),
            position_ids=before.sum(1, keepdim=True) + torch.arange(rest.ids.shape[1], device=before.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        logp = logits.float().log_softmax(-1).gather(2, rest.targets[..., None])[..., 0]
        return scores.flatten().index_add(0, rest.where, (logp * rest.there).sum(1)).view(scores.shape)
