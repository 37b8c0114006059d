"""A merge whose answers are evened out over the buffer's inputs, in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from cells import Cell

from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.continual.buffer import BufferRow
from loralloy.live.learnable import Learnable
from loralloy.weighting.balance import balance
from loralloy.weights import Weights

if TYPE_CHECKING:
    from work import Site


@contextlib.contextmanager
def evened(site: Site, cell: Cell, adapter: Adapter, rows: Sequence[BufferRow]) -> Iterator[dict[str, Any]]:
    """`adapter` with its answers evened out, inside the site's model; yields what there is to say of it.

    Nothing else may be in the model. Adapters are stored as the stream's are, in 16 bits.
    """
    answering = site.workshop(cell.head).answering(rows)
    done = balance(site.main.model, adapter, answering.run, answering.directions, at=answering.at)
    inside = Learnable(site.main.model, Bank([done.adapter]), "linear", "delta", base=site.main.base)
    try:
        with torch.no_grad(), inside.at(Weights({done.adapter.name: 1.0})):
            yield {"shift": [done.before, done.after], "module": done.module}
    finally:
        inside.remove()
