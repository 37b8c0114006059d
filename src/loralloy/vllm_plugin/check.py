"""What the plugin makes of a name, told without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import LoralloyError
from .composer import Composer, described
from .resolver import open_bank
from .settings import Settings
from .store import Store


def look(
    settings: Settings, names: Sequence[str], rank: int, dtype: str = "auto", cached: bool = False, merge: bool = False
) -> list[dict[str, Any]]:
    """One record a name: what vLLM would load, or ``error_message``.

    Args:
        settings: the bank and the cache.
        rank: vLLM's --max-lora-rank.
        dtype: of vLLM's adapters: float32, bfloat16, float16; auto for the bank's own.
        cached: look into the cache.
        merge: merge what is not there.

    Raises LoralloyError for a bank, a dtype or a cache that cannot be used.
    """
    import torch

    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise LoralloyError(f"--dtype {dtype!r} is not known; choose {', '.join(known)}")
    bank = open_bank(settings)
    store = Store(settings.cache, settings.max_bytes) if cached else None
    try:
        composer = Composer(bank, store, rank, known[dtype])  # type: ignore[arg-type]
        return [_one(composer, name, merge) for name in names]
    finally:
        if store is not None:
            store.close()


def _one(composer: Composer, name: str, merge: bool) -> dict[str, Any]:
    try:
        made = composer.read(name)
        if (alone := composer.alone(made)) is not None:
            return {"name": name, "served": "as it is in the bank"} | described(alone)
        plan = composer.plan(made)
        said: dict[str, Any] = {
            "name": name,
            "composition": str(made),
            "rule": str(plan.rule),
            "space": plan.space,
            "rank": plan.top,
            "cut": any(g.cut for g in plan.groups),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "mib": round(plan.bytes_out / (1 << 20), 1),
            "key": composer.key(plan),
        }
        if composer.store is None:
            return said
        if merge:
            done = described(composer.compose(name))
            return said | {"served": "merged now" if done["merged"] else "from the cache", "error": done["error"]}
        return said | {"served": "from the cache" if composer.store.has(said["key"]) else "merged when asked for"}
    except LoralloyError as error:
        return {"name": name, "error_message": str(error)}
