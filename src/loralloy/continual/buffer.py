"""The memory buffer: a few rows of each class of each domain seen, all that the learner may look at of the past."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import atomic_folder
from ..errors import LoralloyError

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
SELECTIONS = ("random", "herding", "reservoir")
_FILE, _FEATURES = "buffer.json", "features.safetensors"


@dataclass(frozen=True)
class BufferRow:
    """One row kept: its id and class, the experience it came with, and what the workshop stored of it (plain JSON)."""

    id: str
    domain: str
    label: str
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def stratum(self) -> str:
        return f"{self.domain}/{self.label}"


@dataclass
class _Stratum:
    """One class of one domain: its rows, the first to stay last, and how many it has been offered."""

    domain: str
    label: str
    rows: list[BufferRow] = field(default_factory=list)
    offered: int = 0


class MemoryBuffer:
    """At most `per_class` rows of each class of each domain, and at most `total` in all.

    selection: how rows of a class are chosen.
        "random": those whose seeded hash is smallest: a uniform draw that does not depend on the order of the rows.
        "herding": greedily, so that the mean of the chosen rows' features stays nearest to the class mean (Welling 2009;
            iCaRL, Rebuffi et al. 2017, algorithm 4); needs features, and a domain's rows in one call.
        "reservoir": each row offered stays with equal probability, whenever it comes (Vitter 1985, algorithm R).
    total: where the strata hold more together, the largest give up a row each (the least wanted one) until they fit, so
        that all are equal to within one, but for those that never had so many. A total below the number of strata leaves
        some without a row.

    Raises LoralloyError for settings out of range.
    """

    def __init__(self, per_class: int = 1, total: int | None = None, selection: str = "random", seed: int = 0) -> None:
        if per_class < 1 or (total is not None and total < 1):
            raise LoralloyError(
                f"a buffer of {per_class} rows a class and {total} in all holds nothing; give at least 1"
            )
        if selection not in SELECTIONS:
            raise LoralloyError(f"buffer selection {selection!r} is not known; choose one of {', '.join(SELECTIONS)}")
        self.per_class, self.total, self.selection, self.seed = per_class, total, selection, seed
        self._strata: dict[tuple[str, str], _Stratum] = {}
        self._features: dict[tuple[str, str], Tensor] = {}

    def __len__(self) -> int:
        return sum(len(stratum.rows) for stratum in self._strata.values())

    @property
    def rows(self) -> list[BufferRow]:
        """All rows: domains and classes in the order they came, the most wanted of each class first."""
        return [row for stratum in self._strata.values() for row in stratum.rows]

    @property
    def strata(self) -> dict[str, int]:
        """``{"domain/label": rows}``, those without a row too."""
        return {f"{s.domain}/{s.label}": len(s.rows) for s in self._strata.values()}

    @property
    def order_free(self) -> bool:
        """Whether the rows kept do not depend on the order of the domains."""
        return self.total is None

    def features(self) -> Tensor | None:
        """The kept rows' features [len, d] in the order of `rows`; None where they were not given."""
        import torch

        if not self._features or any((row.domain, row.id) not in self._features for row in self.rows):
            return None
        return torch.stack([self._features[row.domain, row.id] for row in self.rows])

    def add(
        self,
        experience: str,
        ids: Sequence[str],
        labels: Sequence[str],
        features: Tensor | None = None,
        data: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Offer the rows of a domain; what stays is decided by `selection`, `per_class` and `total`.

        features [n, d]: needed by herding, kept with the rows where given. data: what to store of each row.
        Raises LoralloyError for lists of unlike length, an id that is there already, and herding without features or with
        more rows of a class that it has chosen from.
        """
        n = len(ids)
        if len(labels) != n or (features is not None and len(features) != n) or (data is not None and len(data) != n):
            raise LoralloyError(f"experience {experience!r}: ids, labels, features and data must be of one length")
        if self.selection == "herding" and features is None:
            raise LoralloyError("a herding buffer chooses by features; pass them, or use selection: random")
        held = {row.id for row in self.rows if row.domain == experience}
        if len(set(ids)) < n or held & set(ids):
            raise LoralloyError(f"experience {experience!r}: a row is offered to the buffer twice; ids must be unique")
        by_label: dict[str, list[int]] = {}
        for i, label in enumerate(labels):
            by_label.setdefault(label, []).append(i)
        # by name, so that the order of rows changes nothing
        for label in sorted(by_label) if self.selection != "reservoir" else by_label:
            stratum = self._strata.setdefault((experience, label), _Stratum(experience, label))
            offered = [
                (BufferRow(ids[i], experience, label, dict(data[i]) if data is not None else {}), i)
                for i in by_label[label]
            ]
            chosen = self._choose(stratum, offered, features)
            stratum.offered += len(offered)
            stratum.rows = [row for row, _ in chosen]
            for row, at in chosen:
                if at is not None and features is not None:
                    self._features[experience, row.id] = features[at].detach().float().cpu().clone()
        self._fit()

    def _choose(
        self, stratum: _Stratum, offered: list[tuple[BufferRow, int]], features: Tensor | None
    ) -> list[tuple[BufferRow, int | None]]:
        """The rows that stay, the most wanted first, with the index of those that are new."""
        old: list[tuple[BufferRow, int | None]] = [(row, None) for row in stratum.rows]
        if self.selection == "random":
            return sorted([*old, *offered], key=lambda item: self._hash(item[0].stratum, item[0].id))[: self.per_class]
        if self.selection == "herding":
            if stratum.offered:
                raise LoralloyError(
                    f"experience {stratum.domain!r}: herding has chosen from class {stratum.label!r} already; offer a "
                    "domain's rows in one call, or use selection: reservoir"
                )
            assert features is not None
            order = herd(features[[i for _, i in offered]], self.per_class)
            return [offered[k] for k in order]
        kept = old
        for n, (row, i) in enumerate(offered, start=stratum.offered + 1):
            if n <= self.per_class and len(kept) == n - 1:  # all so far are here
                kept.append((row, i))
                continue
            place = int(self._hash(f"{stratum.domain}/{stratum.label}", f"#{n}")[:15], 16) % n
            if place < len(kept):  # a stratum cut by `total` has fewer places, each as likely as before
                kept[place] = row, i
        return kept

    def _hash(self, *parts: str) -> str:
        text = "\x1f".join([str(self.seed), *parts])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _fit(self) -> None:
        """Evict from the largest strata until `total` holds; of equals the one whose seeded hash is largest."""
        if self.total is not None:
            for _ in range(len(self) - self.total):
                largest = max(
                    self._strata.values(), key=lambda s: (len(s.rows), self._hash("evict", f"{s.domain}/{s.label}"))
                )
                if self.selection == "reservoir":  # places hold no order of preference: a draw of its own each time
                    size = len(largest.rows)
                    drawn = self._hash("evict", largest.rows[0].stratum, f"#{largest.offered}", f"{size}")
                    del largest.rows[int(drawn[:15], 16) % size]
                else:
                    largest.rows.pop()
        kept = {(row.domain, row.id) for row in self.rows}
        self._features = {key: value for key, value in self._features.items() if key in kept}

    # -- on disk -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        strata = [
            {
                "domain": s.domain, "label": s.label, "offered": s.offered,
                "rows": [{"id": row.id, **({"data": dict(row.data)} if row.data else {})} for row in s.rows],
            }
            for s in self._strata.values()
        ]  # fmt: skip
        settings = {"per_class": self.per_class, "total": self.total, "selection": self.selection, "seed": self.seed}
        return {"version": VERSION, **settings, "strata": strata}

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write ``buffer.json`` (rows and what the next `add` needs) and, where features are kept, ``features.safetensors``."""
        from safetensors.torch import save_file

        features = self.features()
        with atomic_folder(folder, overwrite) as new:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
            (new / _FILE).write_text(text, encoding="utf-8")
            if features is not None:
                save_file({"features": features.contiguous()}, new / _FEATURES)

    @staticmethod
    def restore(folder: str | os.PathLike[str]) -> MemoryBuffer:
        """The buffer that was saved: it goes on exactly as that one would have. Raises LoralloyError for what is none."""
        path = Path(folder) / _FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.get("version") != VERSION:
                raise LoralloyError(
                    f"{path}: version {data.get('version')!r}, expected {VERSION}; make the buffer anew"
                )
            buffer = MemoryBuffer(data["per_class"], data["total"], data["selection"], data["seed"])
            for entry in data["strata"]:
                domain, label = entry["domain"], entry["label"]
                rows = [BufferRow(row["id"], domain, label, row.get("data", {})) for row in entry["rows"]]
                buffer._strata[domain, label] = _Stratum(domain, label, rows, entry["offered"])
        except FileNotFoundError:
            raise LoralloyError(f"{path}: no such memory buffer") from None
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise LoralloyError(f"{path}: not a memory buffer ({error!r}); remove its folder to make it anew") from None
        where = Path(folder) / _FEATURES
        if where.is_file():
            from safetensors.torch import load_file

            features = load_file(where)["features"]
            for row, feature in zip(buffer.rows, features, strict=True):
                buffer._features[row.domain, row.id] = feature
        return buffer


def herd(features: Tensor, count: int) -> list[int]:
    """Indices of `count` rows (all, where there are fewer), so that each prefix's mean is greedily nearest to the mean.

    Features [n, d] are scaled to length 1 first, as iCaRL does (Rebuffi et al. 2017, algorithm 4); of equals the first.
    """
    import torch

    x = torch.nn.functional.normalize(features.double(), dim=1)
    mean, total = x.mean(0), torch.zeros_like(x[0])
    chosen: list[int] = []
    free = torch.ones(len(x), dtype=torch.bool)
    for k in range(1, min(count, len(x)) + 1):
        distance = (mean - (total + x) / k).norm(dim=1).masked_fill(~free, torch.inf)
        best = int(distance.argmin())
        chosen.append(best)
        free[best] = False
        total = total + x[best]
    return chosen
