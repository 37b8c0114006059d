"""Where labelled images come from: the emoji file, PACS, Office-Home, or folders of the same layout."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import progress
from ..errors import LoralloyError
from .image_set import ImageSet, from_arrays

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
PACS = ("art_painting", "cartoon", "photo", "sketch")
OFFICE_HOME = ("Art", "Clipart", "Product", "Real World")


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
