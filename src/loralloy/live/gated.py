"""Gates: coefficients that change with the input, token by token or row by row, inside a running model.

For a module with adapters i = 1..n and a gate's coefficients c,

    outputs mixed:     y = W0 x + sum_i c_i(x) s_i B_i A_i x                  (mixture of experts, Arrow)
    factors averaged:  y = W0 x + (sum_i c_i B_i) (sum_i c_i A_i) x           (SMEAR; one c a row, s_i within the factors)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import LoralloyError

if TYPE_CHECKING:
    from .composed import LiveModel


@dataclass
class Pass:
    """What a gate knows of one forward pass of the model.

    Attributes:
        allowed: [b or 1, n] bool, the adapters that each row may use; None for all.
        pooled: [b, l] bool, the tokens that stand for a row's query (no padding; in training not the answer); None for all.
        continues: the pass goes on from a cache, so the prompt was in an earlier one.
        kept: what the gate wants to find again in this pass, by any key of its own.
    """

    allowed: Tensor | None = None
    pooled: Tensor | None = None
    continues: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)
    prompt: Pass | None = None
    rows: Tensor | None = None

    def recall(self, key: str) -> Tensor:
        """What was kept under `key` in the prompt's pass [b, ...], for the rows of this one, which goes on from it."""
        if self.prompt is None or key not in self.prompt.kept:
            raise LoralloyError(
                "the pass goes on from a prompt that this gate has not seen; run the prompt under the same gate"
            )
        kept = self.prompt.kept[key]
        return kept if self.rows is None else kept[self.rows.to(kept.device)]


class Gate(Protocol):
    """Coefficients of the adapters for an input of a module.

    `names` are the adapters, in the order of the coefficients; `averages` says that factors are averaged, not outputs.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def averages(self) -> bool: ...

    def __call__(self, module: str, x: Tensor, now: Pass) -> Tensor:
        """x [b, l, in], the module's input -> coefficients [b, l, n], or [b, 1, n] for all tokens of a row.

        An adapter that `now.allowed` leaves out has coefficient 0, and the rest are normalised over what is allowed.
        """
        ...


def normalised(scores: Tensor, allowed: Tensor | None = None, top_k: int | None = None) -> Tensor:
    """Softmax of scores [b, l, n] over the `top_k` largest of the allowed ([b or 1, n] bool); the rest are 0.

    A row that allows nothing is all 0. Fewer than `top_k` allowed: over those.
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None, :], -torch.inf)
    if top_k is not None and top_k < scores.shape[-1]:
        kept = scores.topk(top_k, -1)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, kept.indices, kept.values)
    nothing = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


class Gated:
    """A live model under a gate, batch by batch.

    >>> gated = Gated(live, gate, allowed)                               # doctest: +SKIP
    >>> answers = predict(model, tokenizer, prompts, options, rows_hook=gated.rows)     # doctest: +SKIP

    Args:
        live: the model and its bank; what `compose` has set does not act under a gate.
        gate: over the same adapters, in the same order.
        allowed: bool, [n] for all rows or [examples, n] by example: leave-own-task-out withholds an adapter this way.

    Raises LoralloyError when the gate is of other adapters, an example allows none, or the bank adapts an embedding or a
    convolution, which has no input that a gate could read.
    """

    def __init__(self, live: LiveModel, gate: Gate, allowed: Tensor | None = None) -> None:
        if list(gate.names) != list(live.names):
            raise LoralloyError(
                f"the gate is of the adapters {', '.join(gate.names)}, but the bank holds {', '.join(live.names)}; make the "
                "gate for this bank"
            )
        for name, part in live.parts.items():
            if part.kind != "linear":
                raise LoralloyError(f"module {name!r} is an {part.kind}; gates are for linear modules, so leave it out")
        if allowed is not None:
            allowed = allowed.to(live.device, torch.bool).reshape(-1, allowed.shape[-1])
            if allowed.shape[1] != len(live.names):
                raise LoralloyError(f"allowed has {allowed.shape[1]} columns for {len(live.names)} adapters")
            if not bool(allowed.any(1).all()):
                raise LoralloyError("a row allows no adapter at all; answer it with the plain base instead")
        self.live, self.gate, self.allowed = live, gate, allowed
        self._now = Pass()
        self._prompt: Pass | None = None
        self._row_of: dict[int, int] = {}

    @contextlib.contextmanager
    def rows(self, index: Sequence[int] | None = None, pooled: Tensor | None = None) -> Iterator[nn.Module]:
        """Inside the block the model runs under the gate; row b of the batch is example ``index[b]``.

        An index ties a pass over a cache to its prompt's, so examples may be expanded (`predict` does both). Without one,
        rows are the examples in order. pooled: [b, l] bool, which tokens a gate over the whole row may read; by default
        those of the attention mask.
        """
        allowed = self.allowed
        if allowed is not None and index is not None and len(allowed) > 1:
            allowed = allowed[torch.tensor(list(index), device=allowed.device)]

        def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._now = self._begin(args, kwargs, list(index) if index is not None else None, allowed, pooled)

        parts = self.live.parts.values()
        before = [part.gated for part in parts]
        handle = self.live.model.register_forward_pre_hook(begin, with_kwargs=True)
        self._now = Pass(allowed, pooled)  # for a module that is run by itself
        for part in parts:
            part.gated = self
        try:
            yield self.live.model
        finally:
            handle.remove()
            for part, gated in zip(parts, before, strict=True):
                part.gated = gated

    def _begin(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: list[int] | None,
        allowed: Tensor | None,
        pooled: Tensor | None,
    ) -> Pass:
        """The pass that the model's arguments describe."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is None:
            return Pass(allowed, pooled)
        b, length = ids.shape[:2]
        if index is not None and len(index) != b:
            raise LoralloyError(
                f"the gate is set for {len(index)} rows but the batch has {b}; give each row its number"
            )
        if allowed is not None and len(allowed) not in (1, b):
            raise LoralloyError(
                f"allowed has {len(allowed)} rows but the batch has {b}; give one a row, or one for all"
            )
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return Pass(allowed, pooled, True, prompt=self._prompt, rows=self._rows_of(index, b, ids.device))
        mask = kwargs.get("attention_mask")
        if pooled is None and isinstance(mask, Tensor) and mask.ndim == 2:
            pooled = mask[:, -length:].bool()
        self._prompt = Pass(allowed, pooled)
        self._row_of = {key: row for row, key in enumerate(range(b) if index is None else index)}
        return self._prompt

    def _rows_of(self, index: list[int] | None, b: int, device: Any) -> Tensor:
        """The row in the prompt's pass of each row of one that goes on from it."""
        try:
            rows = [self._row_of[key] for key in (range(b) if index is None else index)]
        except KeyError as error:
            raise LoralloyError(
                f"example {error.args[0]} goes on from a prompt that this gate has not seen; run the prompt under the gate"
            ) from None
        return torch.tensor(rows, device=device)

    def output(self, part: Any, x: Tensor) -> Tensor:
        """What the adapters add to a module's output for its input x [b, l, in]."""
        flat = x[:, None] if x.ndim == 2 else x
        c = self.gate(part.name, flat, self._now)
        a, b = part.A, part.B
        flat = flat.to(a.dtype)
        if not self.gate.averages:
            out = (flat @ a.T * c[..., part.owner].to(a.dtype)) @ b.T
        else:
            if c.shape[1] != 1:
                raise LoralloyError("a gate that averages factors needs one coefficient a row, not one a token")
            stack_a, stack_b = part.stacked(len(self.live.names))  # [n, r, in], [n, r, out]
            w = c[:, 0].to(a.dtype)
            row_a = (w @ stack_a.flatten(1)).reshape(-1, *stack_a.shape[1:])
            row_b = (w @ stack_b.flatten(1)).reshape(-1, *stack_b.shape[1:])
            out = flat @ row_a.mT @ row_b
        return out[:, 0] if x.ndim == 2 else out
