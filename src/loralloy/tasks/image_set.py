"""The labelled images of one domain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import LoralloyError

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ImageSet:
    """The images of one domain.

    name: the domain. classes: names of the labels. ids: one a row, unique among all domains ("noto/red-heart").
    labels: [n] int64, index into `classes`. split: [n] uint8, index into :data:`SPLITS`.
    load: row numbers -> uint8 [k, 3, h, w]; digest: the content hash of all the images.
    Raises LoralloyError when the parts do not fit.
    """

    name: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    labels: Tensor = field(repr=False)
    split: Tensor = field(repr=False)
    load: Callable[[Sequence[int]], Tensor] = field(repr=False)
    digest: Callable[[], str] = field(repr=False)
    licence: str = ""

    def __post_init__(self) -> None:
        n = len(self.ids)
        if not n or len(self.labels) != n or len(self.split) != n:
            raise LoralloyError(
                f"domain {self.name!r}: {n} ids, {len(self.labels)} labels and {len(self.split)} splits; give one of each a row"
            )
        if len(set(self.ids)) < n:
            raise LoralloyError(f"domain {self.name!r}: two images have one id; ids must be unique")
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= len(self.classes):
            raise LoralloyError(f"domain {self.name!r}: a label is out of range; there are {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        parts = ", ".join(f"{len(self.rows(split))} {split}" for split in SPLITS)
        return f"ImageSet({self.name!r}, {len(self.classes)} classes, {parts})"

    def rows(self, split: str) -> list[int]:
        """Row numbers of a split, in order. Raises LoralloyError for an unknown split."""
        if split not in SPLITS:
            raise LoralloyError(f"there is no split {split!r}; use one of {', '.join(SPLITS)}")
        return (self.split == SPLITS.index(split)).nonzero().flatten().tolist()

    def find(self, ids: Sequence[str]) -> list[int]:
        """Row numbers of these ids. Raises LoralloyError for one that is not there."""
        try:
            return [self._index[i] for i in ids]
        except KeyError as error:
            raise LoralloyError(
                f"domain {self.name!r} has no image {error.args[0]!r}; the data has changed since"
            ) from None

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over classes, ids, labels, splits and the images' content."""
        plain = [self.classes, self.ids, self.labels.tolist(), self.split.tolist(), self.digest()]
        return "sha256:" + hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def from_arrays(
    name: str,
    images: Tensor,
    labels: Tensor,
    split: Tensor,
    classes: Sequence[str],
    ids: Sequence[str] | None = None,
    licence: str = "",
) -> ImageSet:
    """An ImageSet of images in memory, uint8 [n, 3, h, w]. Raises LoralloyError for another dtype or shape."""
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise LoralloyError(f"domain {name!r}: images are {images.dtype} {list(images.shape)}; give uint8 [n, 3, h, w]")
    names = tuple(ids) if ids is not None else tuple(f"{name}/{i}" for i in range(len(images)))
    if len(names) != len(images):
        raise LoralloyError(f"domain {name!r}: {len(images)} images but {len(names)} ids; give one an image")

    def digest() -> str:
        return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()

    def load(rows: Sequence[int]) -> Tensor:
        return images[torch.as_tensor(list(rows), dtype=torch.long)]

    return ImageSet(name, tuple(classes), names, labels.long(), split.to(torch.uint8), load, digest, licence)
