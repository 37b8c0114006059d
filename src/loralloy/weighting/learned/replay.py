"""Replay: a step of learning recorded once as a CUDA graph.

A step on a few rows is bound by the launching of many thousand small kernels, not by what they compute. Its rows are the same at
every step and its coefficients a small table, so it is recorded after three steps and replayed: one launch. What is computed
is what was recorded, kernel for kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import LoralloyError

if TYPE_CHECKING:
    from ...live.learnable import Learnable

_BEFORE = 2  # steps of one kind that run as they are: what a library makes at its first call must not be recorded
_NONE = (
    "no gradient flows from the loss to the coefficients; the objective must run the very model that is given, with "
    "gradients on"
)
_PAYS = 4  # recording costs about as much as this many steps


class Steps:
    """Losses of parts of the rows as functions of the table of coefficients, with their gradients; recorded where that pays.

    Args:
        live: what the table is set in.
        record: whether steps may be recorded: on a CUDA device, for an objective whose work does not wait for the device.
            Where a recording fails (a model that does wait), steps go on without.

    Attributes:
        replayed: how many losses came from a recording.
    """

    def __init__(self, live: Learnable, record: bool) -> None:
        self.live, self.record, self.replayed = live, record and live.device.type == "cuda", 0
        self._seen: dict[Hashable, int] = {}
        self._made: dict[Hashable, _Recording] = {}
        self._pool: Any = None

    def run(
        self,
        part: Callable[[], Tensor],
        table: Tensor,
        key: Hashable,
        gradient: bool,
        more: int = 0,
        inputs: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(loss, dloss/dtable or None) under a table [modules, n]; both are read before the next call.

        part: the loss under what is set; calls with one key compute the same thing. more: at least so many calls follow.
        inputs: the tensors that the loss reads, which a recording keeps for as long as it lasts.
        Raises LoralloyError where no gradient flows to the table.
        """
        count = self._seen[key] = self._seen.get(key, 0) + 1
        if self.record and key not in self._made and count > _BEFORE and more >= _PAYS:
            self._try(part, table, key, gradient, inputs)
        if key in self._made:
            self.replayed += 1
            return self._made[key].run(table)
        return _once(self.live, part, table, gradient)

    def close(self) -> None:
        """Let go of the recordings and of their memory."""
        self._made.clear()
        self._pool = None

    def _try(self, part: Callable[[], Tensor], table: Tensor, key: Hashable, gradient: bool, inputs: Any) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            self._made[key] = _Recording(self.live, part, table, gradient, self._pool, inputs)
        except RuntimeError:  # what waits for the device, or lacks memory, says so; nothing has been computed
            self.record = False
            self.close()  # all or none: what is recorded is fed before each replay, and memory may be what was missing


class _Recording:
    """One loss, and its gradient, as a graph over a table of its own."""

    def __init__(
        self, live: Learnable, part: Callable[[], Tensor], table: Tensor, gradient: bool, pool: Any, inputs: Any
    ) -> None:
        self.table, self.inputs = table.detach().clone(), inputs
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(live.device)
        torch.cuda.empty_cache()  # steps so far have left memory that a recording cannot use
        stream = torch.cuda.Stream(live.device)
        with torch.cuda.stream(stream):  # not torch.cuda.graph: after an error it leaves its stream the current one
            self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self.out = _once(live, part, self.table, gradient)
            finally:
                self.graph.capture_end()

    def run(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        self.table.copy_(table)
        self.graph.replay()
        return self.out


def _once(live: Learnable, part: Callable[[], Tensor], table: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    if not gradient:
        with torch.no_grad(), live.at(table.detach()):
            return part().float(), None
    leaf = table.detach().requires_grad_()
    with live.at(leaf):
        loss = part()
        if not loss.requires_grad:
            raise LoralloyError(_NONE)
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        if grad is None:
            raise LoralloyError(_NONE)
    return loss.detach(), grad
