"""One set of classes in seven drawing styles: the same emoji by different artists, rendered from pinned npm packages.

    python -m loralloy.tasks.emoji --out .assets/emoji

Each style is a domain; the class of a picture is its emoji's category. The split is by the emoji's name, so a test emoji
is unseen in every style. The packages (`@iconify-json/*`, SVG in JSON, 10 MB in all) come through `npm pack` or from a
folder, are checked by sha512 and read as archives; nothing in them is run. One file comes out: ``emoji.npz`` (7 MB),
uint8 pictures on white, with names, classes, split, and each style's licence and author in ``metadata``.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..console import console, progress
from ..errors import LoralloyError

FILE = "emoji.npz"
SPLITS = ("train", "validation", "test")
SIZE = 64
TEST, VALIDATION = 0.35, 0.10  # shares of the names


@dataclass(frozen=True)
class Style:
    """A pinned npm package of one drawing style; `sha512` is base64, as npm's "integrity" has it."""

    name: str
    version: str
    sha512: str

    @property
    def pin(self) -> str:
        return f"@iconify-json/{self.name}@{self.version}"

    @property
    def file(self) -> str:
        return f"iconify-json-{self.name}-{self.version}.tgz"


STYLES = (
    Style("noto", "1.2.9", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    Style("twemoji", "1.2.5", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
    Style("openmoji", "1.2.29", "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ=="),
    Style("fluent-emoji-flat", "1.2.6",
          "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
    Style("fluent-emoji-high-contrast", "1.2.6",
          "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w=="),
    Style("emojione", "1.2.3", "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
    Style("emojione-monotone", "1.2.1",
          "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA=="),
)  # fmt: skip


def split_of(name: str) -> int:
    """Index in :data:`SPLITS` of an emoji, by its name alone."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return 2 if share < TEST else 1 if share < TEST + VALIDATION else 0


def fetch(style: Style, folder: Path) -> Path:
    """The package's tarball in `folder`: the one that lies there, or `npm pack`'s.

    Raises LoralloyError when there is neither npm nor the file, when npm fails, and when the file is not the pinned one.
    """
    path = folder / style.file
    if not path.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise LoralloyError(
                f"{style.pin} comes through npm, which is not installed; install it, or put {style.file} into {folder} "
                "(--packages)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", "--silent", "--pack-destination", str(folder), style.pin]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.is_file():
            said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
            raise LoralloyError(
                f"`npm pack {style.pin}` failed: {said or 'it left no ' + style.file}; check npm and the network, or put "
                f"{style.file} into {folder} (--packages)"
            )
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != style.sha512:
        raise LoralloyError(f"{path} is not the pinned file (its sha512 differs); remove it to fetch it again")
    return path


def read_package(path: Path, members: Sequence[str]) -> list[Any]:
    """JSON members of an npm tarball, in order. Raises LoralloyError for one that is not there."""
    with tarfile.open(path) as tar:
        found = []
        for member in members:
            try:
                file = tar.extractfile(f"package/{member}")
            except KeyError:
                file = None
            if file is None:
                raise LoralloyError(f"{path}: no member {member}; is it an @iconify-json package?")
            found.append(json.load(file))
    return found


def categories(metadata: dict[str, Any]) -> dict[str, str]:
    """emoji name -> category, by a package's metadata.json; flags and skin tones left out."""
    return {
        name: category
        for category, names in metadata["categories"].items()
        if category != "Flags"
        for name in names
        if "skin-tone" not in name
    }


def has(icons: dict[str, Any], name: str) -> bool:
    return name in icons["icons"] or name in icons.get("aliases", {})


def svg(icons: dict[str, Any], name: str) -> str:
    """An icon as a document of its own: its box, aliases followed, currentColor as black."""
    if name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{box}">{icon["body"].replace("currentColor", "#000")}</svg>'
    )


def render(document: str, size: int = SIZE) -> Any:
    """uint8 [size, size, 3] on white. Raises LoralloyError when resvg-py or pillow is not installed."""
    import numpy as np

    try:
        import resvg_py
        from PIL import Image
    except ImportError as error:
        raise LoralloyError(
            f"rendering emoji needs resvg-py and pillow ({error}): pip install 'loralloy[vision]'"
        ) from None
    png = bytes(
        resvg_py.svg_to_bytes(
            svg_string=document, width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
    )
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB").resize((size, size)))


def build(folder: Path, packages: Path | None = None, size: int = SIZE, overwrite: bool = False) -> Path:
    """Write ``folder/emoji.npz`` and return its path; an existing file is kept unless `overwrite`. Takes about 20 s.

    The arrays: each style's pictures [n, size, size, 3] uint8 under its name, `labels` [n] (index into `classes`),
    `names` [n], `split` [n] (index into train, validation, test), and `metadata`, JSON.
    Raises LoralloyError when a package cannot be had, or a renderer is missing.
    """
    import numpy as np

    target = folder / FILE
    if target.exists() and not overwrite:
        return target
    packages = packages if packages is not None else folder.absolute().parent / "npm"
    icons, about = {}, {}
    kinds: dict[str, str] = {}
    for style in STYLES:
        path = fetch(style, packages)
        icons[style.name], info = read_package(path, ["icons.json", "info.json"])
        if style.name == "twemoji":
            kinds = categories(read_package(path, ["metadata.json"])[0])
        author, licence = info["author"], info["license"]
        about[style.name] = {
            "title": info["name"],
            "package": f"@iconify-json/{style.name}",
            "version": style.version,
            "sha512": style.sha512,
            "licence": licence["title"],
            "spdx": licence["spdx"],
            "licence_url": licence.get("url"),
            "author": author["name"],
            "author_url": author.get("url"),
            "changes": f"rendered to {size} x {size} pixels on white",
        }
    names = sorted(name for name in kinds if all(has(icons[style.name], name) for style in STYLES))
    classes = sorted({kinds[name] for name in names})
    arrays: dict[str, Any] = {}
    with progress() as bar:
        step = bar.add_task("emoji", total=len(names) * len(STYLES))
        for style in STYLES:
            bar.update(step, description=style.name)
            pictures = np.empty((len(names), size, size, 3), np.uint8)
            for i, name in enumerate(names):
                pictures[i] = render(svg(icons[style.name], name), size)
                bar.advance(step)
            arrays[style.name] = pictures
    metadata = {"version": 1, "size": size, "splits": SPLITS, "classes": classes, "styles": about}
    memory = io.BytesIO()
    np.savez_compressed(
        memory,
        **arrays,
        labels=np.array([classes.index(kinds[name]) for name in names], np.uint8),
        names=np.array(names),
        split=np.array([split_of(name) for name in names], np.uint8),
        metadata=np.array(json.dumps(metadata)),
    )
    atomic_file(target, memory.getvalue())
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 for an error that is told in one line, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m loralloy.tasks.emoji", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--out", type=Path, default=Path(".assets/emoji"), help="folder of emoji.npz")
    parser.add_argument("--packages", type=Path, help="folder of the npm tarballs (`npm` beside --out)")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side")
    parser.add_argument("--overwrite", action="store_true", help="build an existing file again")
    options = parser.parse_args(argv)
    try:
        if options.size < 8:
            raise LoralloyError(f"--size is {options.size}; it must be at least 8 pixels")
        path = build(options.out, options.packages, options.size, options.overwrite)
    except LoralloyError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
