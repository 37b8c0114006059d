"""Which base model an adapter belongs to, and whether two adapters belong to the same one. Shapes alone prove nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeAlias

Verdict: TypeAlias = Literal["same", "different", "unknown"]


@dataclass(frozen=True)
class BaseRef:
    """Name, revision and tensor fingerprint of a base model; each may be unknown (None).

    The fingerprint is recorded by our training (see :func:`loralloy.live.base.base_fingerprint`); adapters trained
    elsewhere carry the name alone.
    """

    name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    def __str__(self) -> str:
        name = self.name or "an unnamed base model"
        revision = f"@{self.revision}" if self.revision else ""
        mark = f" (fingerprint {self.fingerprint.rsplit(':', 1)[-1][:12]})" if self.fingerprint else " (no fingerprint)"
        return name + revision + mark

    def to_dict(self) -> dict[str, str | None]:
        return {"name": self.name, "revision": self.revision, "fingerprint": self.fingerprint}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> BaseRef:
        return BaseRef(data.get("name"), data.get("revision"), data.get("fingerprint"))


def _last(name: str) -> str:
    return (PureWindowsPath(name).name if "\\" in name else PurePosixPath(name).name).lower()


def compare(a: BaseRef, b: BaseRef) -> tuple[Verdict, str]:
    """Whether two references mean the same base model, and why.

    Fingerprints decide where both are known. Else the names must be equal and the revisions not contradict; names that
    differ only by path, and a pinned revision against none, cannot be told apart from here.
    """
    if a.fingerprint and b.fingerprint:
        if a.fingerprint == b.fingerprint:
            return "same", "their base tensors have one fingerprint"
        return "different", "the fingerprints of their base tensors differ"
    if a.name is None or b.name is None:
        return "unknown", "one of them names no base model"
    if a.name.rstrip("/\\") == b.name.rstrip("/\\"):
        if a.revision == b.revision:
            return "same", "they name the same base model and revision"
        if a.revision and b.revision:
            return "different", f"they name revisions {a.revision!r} and {b.revision!r}"
        return "unknown", "one pins a revision and the other does not"
    if _last(a.name) == _last(b.name):
        return "unknown", "their base names differ only by path and not both carry a fingerprint"
    return "different", f"they name {a.name!r} and {b.name!r}"
