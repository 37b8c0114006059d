"""Labelled images of one domain, and where they come from: the emoji file, PACS, Office-Home, or folders of the same layout."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import progress
from ..errors import LoralloyError

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "validation", "test")
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
PACS = ("art_painting", "cartoon", "photo", "sketch")
OFFICE_HOME = ("Art", "Clipart", "Product", "Real World")


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


# -- the emoji file ----------------------------------------------------------------------------------------------------


def load_emoji(path: str | os.PathLike[str]) -> dict[str, ImageSet]:
    """The seven styles of ``emoji.npz`` (or of the folder that holds it), by name; see :mod:`loralloy.tasks.emoji`.

    Raises LoralloyError when the file is missing or is not one.
    """
    import numpy as np
    import torch

    file = Path(path) / "emoji.npz" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise LoralloyError(f"{file} is not there; `python -m loralloy.tasks.emoji --out {file.parent}` makes it")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            metadata = json.loads(str(arrays["metadata"]))
            names = arrays["names"].tolist()
            labels, split = (torch.from_numpy(arrays[k].astype(np.int64)) for k in ("labels", "split"))
            pictures = {k: torch.from_numpy(arrays[k]).permute(0, 3, 1, 2).contiguous() for k in metadata["styles"]}
    except (OSError, ValueError, KeyError) as error:
        raise LoralloyError(
            f"{file} is no emoji file ({error}); `python -m loralloy.tasks.emoji --overwrite` makes it again"
        ) from None
    return {
        style: from_arrays(
            style, images, labels, split, metadata["classes"], [f"{style}/{n}" for n in names],
            metadata["styles"][style]["spdx"],
        )
        for style, images in pictures.items()
    }  # fmt: skip


# -- folders -----------------------------------------------------------------------------------------------------------


def load_folders(
    root: str | os.PathLike[str],
    domains: Sequence[str] | None = None,
    *,
    size: int = 224,
    test: float = 0.2,
    validation: float = 0.0,
    seed: int = 0,
) -> dict[str, ImageSet]:
    """The domains of a tree ``root/domain/class/image``, by the folders' names; pictures are read when asked for.

    domains: these, in this order, whose folders may differ in case, spaces, dashes and underscores (all folders by default).
    size: pixels a side that pictures are resized to (bicubic, not cropped). Within each class the images whose names'
    seeded hashes are smallest are the `test` share, the next the `validation` share (80/20 by default).

    Raises LoralloyError when a domain is missing or has no image, when domains differ in their classes, and when a class is
    too small to train on and test.
    """
    top = Path(root).expanduser()
    if not top.is_dir():
        raise LoralloyError(f"{top} is no folder; give the one that holds domain/class/image")
    folders = _domain_folders(top, domains)
    classes: tuple[str, ...] = ()
    found: dict[str, ImageSet] = {}
    for name, folder in folders.items():
        own = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
        if not own:
            raise LoralloyError(f"domain {name!r}: {folder} has no class folders; the layout is domain/class/image")
        classes = classes or own
        if own != classes:
            odd = sorted(set(own) ^ set(classes))[0]
            first = next(iter(folders))
            where, missing = (name, first) if odd in own else (first, name)
            raise LoralloyError(
                f"{top}: domain {where!r} has class {odd!r} and {missing!r} has not; all domains must have the same classes"
            )
        found[name] = _read_domain(name, folder, classes, size, test, validation, seed)
    return found


def load_pacs(root: str | os.PathLike[str], *, size: int = 224, **options: Any) -> dict[str, ImageSet]:
    """PACS (Li et al. 2017): art_painting, cartoon, photo, sketch; seven classes. The folder, or one above (``kfold``).

    Raises as :func:`load_folders`, whose options these are.
    """
    return load_folders(root, PACS, size=size, **options)


def load_office_home(root: str | os.PathLike[str], *, size: int = 224, **options: Any) -> dict[str, ImageSet]:
    """Office-Home (Venkateswara et al. 2017): Art, Clipart, Product, Real World; 65 classes. The folder, or one above.

    Raises as :func:`load_folders`, whose options these are.
    """
    return load_folders(root, OFFICE_HOME, size=size, **options)


def load_images(path: str | os.PathLike[str], layout: str = "emoji", size: int = 112) -> dict[str, ImageSet]:
    """The domains at `path`, by layout "emoji", "pacs", "office_home" or "folders". Raises LoralloyError for another one.

    size: of pictures read from folders; the emoji file has its own, and the classifier resizes.
    """
    if layout == "emoji":
        return load_emoji(path)
    loaders: dict[str, Callable[..., dict[str, ImageSet]]] = {
        "pacs": load_pacs,
        "office_home": load_office_home,
        "folders": load_folders,
    }
    if layout not in loaders:
        raise LoralloyError(f"image layout {layout!r} is unknown; use emoji, {', '.join(loaders)}")
    return loaders[layout](path, size=size)


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def _domain_folders(top: Path, domains: Sequence[str] | None) -> dict[str, Path]:
    """The domains' folders in `top`, or where they are not there, in the one folder of `top` that has them."""
    if domains is None:
        found = {p.name: p for p in sorted(top.iterdir()) if p.is_dir() and not p.name.startswith(".")}
        if not found:
            raise LoralloyError(f"{top} has no folders; the layout is domain/class/image")
        return found
    for place in (top, *sorted(p for p in top.iterdir() if p.is_dir())):
        have = {_plain(p.name): p for p in place.iterdir() if p.is_dir()}
        if all(_plain(name) in have for name in domains):
            return {name: have[_plain(name)] for name in domains}
    have = {_plain(p.name): p for p in top.iterdir() if p.is_dir()}
    missing = next(name for name in domains if _plain(name) not in have)
    raise LoralloyError(
        f"{top} has no domain {missing!r}; it must hold the folders {', '.join(domains)}, each with a folder a class"
    )


def _read_domain(
    name: str, folder: Path, classes: Sequence[str], size: int, test: float, validation: float, seed: int
) -> ImageSet:
    import torch

    files: list[Path] = []
    labels: list[int] = []
    split: list[int] = []
    for label, kind in enumerate(classes):
        own = [p for p in sorted((folder / kind).iterdir()) if p.suffix.lower() in ENDINGS]
        tests, validations = round(test * len(own)), round(validation * len(own))
        if len(own) < 2 or tests < 1 or len(own) - tests - validations < 1:
            raise LoralloyError(
                f"domain {name!r}: class {kind!r} has {len(own)} image(s), too few to train on and to test ({folder / kind})"
            )
        order = sorted(range(len(own)), key=lambda i: hashlib.sha256(f"{seed}|{kind}/{own[i].name}".encode()).digest())
        where = {row: 2 if rank < tests else 1 if rank < tests + validations else 0 for rank, row in enumerate(order)}
        files += own
        labels += [label] * len(own)
        split += [where[i] for i in range(len(own))]
    ids = [f"{name}/{p.parent.name}/{p.name}" for p in files]

    def digest() -> str:
        total = hashlib.sha256(str(size).encode())
        for path in files:
            total.update(hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()

    return ImageSet(
        name, tuple(classes), tuple(ids), torch.tensor(labels), torch.tensor(split, dtype=torch.uint8),
        partial(_read_files, files, size, name), digest,
    )  # fmt: skip


def _read_files(files: Sequence[Path], size: int, name: str, rows: Sequence[int]) -> Tensor:
    """uint8 [k, 3, size, size] of these files, by a few threads (decoding lets go of the interpreter)."""
    import torch

    found = torch.empty((len(rows), 3, size, size), dtype=torch.uint8)
    with ThreadPoolExecutor(8) as pool, progress() as bar:
        step = bar.add_task(f"reading {name}", total=len(rows), visible=len(rows) > 500)
        for i, pixels in enumerate(pool.map(lambda row: _read_file(files[row], size), rows)):
            found[i] = pixels
            bar.advance(step)
    return found


def _read_file(path: Path, size: int) -> Tensor:
    import numpy as np
    import torch

    try:
        from PIL import Image
    except ImportError:
        raise LoralloyError("reading images needs pillow: pip install 'loralloy[vision]'") from None
    try:
        with Image.open(path) as picture:
            pixels = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except OSError as error:
        raise LoralloyError(f"{path} cannot be read as an image ({error}); fetch it again, or take it out") from None
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
