"""What the adapters and cells of an output folder were made with: files go by their settings' names, so the rest is held here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralloy.atomic import atomic_file
from loralloy.errors import LoralloyError
from loralloy.evaluation.suite.locks import lock

if TYPE_CHECKING:
    from work import Site


def check(site: Site) -> None:
    """Write the stamps of a bench's adapters and cells, or compare them with those that lie there.

    Raises LoralloyError when the folder was made from another base or other data, hyperparameters or orders.
    """
    shop, bench = site.main, site.bench
    data = {f"data of {name}": shop.fingerprint(experience) for name, experience in shop.experiences.items()}
    judged = {"evaluation": shop.identity("evaluate"), "orders": site.stream.orders, "validation": bench.validation,
              "few": bench.toy_steps}  # fmt: skip
    with lock(site.out / "locks" / "stamp"):
        _compare(site.out / "adapters" / f"{bench.share}.json", data | {"training": shop.identity("train")})
        _compare(site.out / "cells" / f"{bench.name}.json", data | judged)


def check_adapters(site: Site, made_of: dict[str, str]) -> None:
    """Write what the cells of a bench are made of (job -> hash of its adapter), or compare it with what lies there.

    Adapters may be trained again, on another machine even, where the same training gives the same adapter.
    Raises LoralloyError where cells of a bench would be of different adapters under one name.
    """
    path = site.out / "cells" / f"{site.bench.name}.adapters.json"
    with lock(site.out / "locks" / "stamp"):
        _compare(path, made_of)


def _compare(path: Path, told: dict[str, Any]) -> None:
    """Benches may share adapters and not have the same domains: what only one of them has is added."""
    told = json.loads(json.dumps(told))
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if odd := [name for name in told if name in known and known[name] != told[name]]:
        some = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        raise LoralloyError(f"{path.parent} was made with another {some} ({path.name}); give another --out")
    if known | told != known:
        atomic_file(path, json.dumps(known | told, indent=1) + "\n")
