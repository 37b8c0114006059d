"""References to adapters and models: a folder on disk, or a hub id with a pinned revision (`org/name@rev`)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import LoralloyError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def parse_ref(ref: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Split ``org/name@rev`` into (``org/name``, ``rev``); a folder or a bare id has revision None."""
    text = os.fspath(ref)
    if not os.path.exists(text) and "@" in text:
        name, _, revision = text.rpartition("@")
        if _HUB_ID.match(name) and revision:
            return name, revision
    return text, None


def resolve(ref: str | os.PathLike[str], what: str, allow: list[str] | None = None) -> Path:
    """The local folder of a reference; downloads a pinned hub revision (respects HF_HUB_OFFLINE).

    Args:
        ref: a folder, or ``org/name@rev``.
        what: "adapter" or "model", for the message.
        allow: file patterns to download.

    Raises LoralloyError when the folder is missing, the hub id has no revision, or the hub cannot be reached.
    """
    name, revision = parse_ref(ref)
    if name and Path(name).is_dir():
        return Path(name)
    if not _HUB_ID.match(name) or name.startswith("."):
        raise LoralloyError(f"{what} folder {name!r} does not exist; give a folder, or a hub id as org/name@revision")
    if revision is None:
        raise LoralloyError(
            f"there is no folder {name!r}, and as a hub id it names no revision; pin one as {name}@<commit or tag>, "
            "so that the same command gives the same result next year"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise LoralloyError(f"{what} {name}@{revision}: downloading needs `pip install huggingface_hub`") from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=allow))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise LoralloyError(
            f"{what} {name}@{revision} is neither in the local hub cache nor downloadable ({type(error).__name__}: "
            f"{reason}); check the id and the network, or pass a local folder"
        ) from None
