"""The KV cache of a running batch whose rows join and leave.

One cache for all rows, aligned on the right: every row's next token goes to the same column, and shorter rows have padding
on their left, which the attention mask hides. Rotary and learned positions are given by row, so a row's numbers are those
it would have alone. Why this layout:

- a decoding step is the model's own forward on plain [rows, heads, columns, d] keys: any attention implementation, any
  model whose cache is keys and values, no kernel of our own (paged attention needs one);
- between joins and leaves nothing is moved: a step writes one column into spare room, where a cache that concatenates
  copies everything;
- joining and leaving cost one copy of the cache, and happen once a request, not once a token.

What it costs: padding. A row of 10 tokens beside one of 2,000 takes 2,000 columns until the long one leaves; the columns of
rows that left are given back with the next join or leave.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import LoralloyError

ROOM = 64  # columns added at a time


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [rows, heads, columns, d], views of a storage with spare columns on the right."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.is_initialized = True
            self._place(key_states, value_states, 0 if key_states.shape[-2] > 1 else ROOM)
            return self.keys, self.values
        n, new = self.keys.shape[-2], key_states.shape[-2]
        if n + new > self._keys.shape[-2]:
            self._place(self.keys, self.values, ROOM + new)
        self._keys[:, :, n : n + new] = key_states
        self._values[:, :, n : n + new] = value_states
        self.keys, self.values = self._keys[:, :, : n + new], self._values[:, :, : n + new]
        return self.keys, self.values

    def _place(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Copy into a storage with `room` columns to spare."""
        columns = keys.shape[-2]
        made = []
        for t in (keys, values):
            storage = t.new_empty(*t.shape[:-2], columns + room, t.shape[-1])
            storage[:, :, :columns] = t
            made.append(storage)
        self._keys, self._values = made
        self.keys, self.values = self._keys[:, :, :columns], self._values[:, :, :columns]

    def keep(self, rows: Tensor, start: int) -> None:
        self._place(self.keys[rows, :, start:], self.values[rows, :, start:], ROOM)

    def join(self, other: RoomyLayer) -> None:
        rows, columns = self.keys.shape[0] + other.keys.shape[0], max(self.keys.shape[-2], other.keys.shape[-2])
        made = []
        for mine, its in ((self.keys, other.keys), (self.values, other.values)):
            # the room to the right is not touched: until it is used, its pages take no memory
            storage = mine.new_empty(rows, mine.shape[1], columns + ROOM, mine.shape[3])
            for t, part in ((mine, storage[: len(mine)]), (its, storage[len(mine) :])):
                start = columns - t.shape[-2]
                # zeros: padding is masked, but what memory held before may be NaN, and 0 * NaN is NaN
                part[:, :, :start] = 0
                part[:, :, start:columns] = t
            made.append(storage)
        self._keys, self._values = made
        self.keys, self.values = self._keys[:, :, :columns], self._values[:, :, :columns]


class RowCache:
    """The cache and the attention mask of some rows.

    Attributes:
        cache: what the model is given as past_key_values.
        mask: [rows, columns] int64, 1 where a row has a token.
    """

    def __init__(self, mask: Tensor) -> None:
        self.cache = Cache(layer_class_to_replicate=RoomyLayer)
        self.mask = mask

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def columns(self) -> int:
        return self.mask.shape[1]

    @property
    def layers(self) -> list[RoomyLayer]:
        return cast(list[RoomyLayer], self.cache.layers)

    @property
    def nbytes(self) -> int:
        """Of the keys and values, without spare columns."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)

    def grow(self) -> Tensor:
        """The mask with one more column, for each row's next token."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self.mask

    def keep(self, rows: list[int]) -> None:
        """Drop the other rows, and the columns that no row uses any more."""
        at = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[at]
        start = int((mask != 0).any(0).int().argmax())
        self.mask = mask[:, start:]
        for layer in self.layers:
            layer.keep(at, start)

    def join(self, other: RowCache) -> None:
        """Take the other's rows in, after one's own."""
        width = max(self.columns, other.columns)
        self.mask = torch.cat([torch.nn.functional.pad(m, (width - m.shape[1], 0)) for m in (self.mask, other.mask)])
        for mine, its in zip(self.layers, other.layers, strict=True):
            mine.join(its)


def check_cache(model: Any) -> None:
    """Raise LoralloyError for a model whose state is not keys and values alone (Mamba, linear attention)."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    rows = RowCache(torch.ones_like(ids))
    try:
        with torch.no_grad():
            made = model(input_ids=ids, attention_mask=rows.mask, past_key_values=rows.cache, use_cache=True)
        sound = getattr(made, "past_key_values", None) is rows.cache and rows.cache.get_seq_length() == 2
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise LoralloyError(
            f"the model does not run with a KV cache of whole layers, so it cannot be served: {error}"
        ) from None
    if not sound or not all(layer.is_initialized for layer in rows.layers):
        raise LoralloyError(
            f"{type(model).__name__} keeps a state that is not keys and values, which rows cannot join and leave; it cannot "
            "be served"
        )
