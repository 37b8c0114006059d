"""Adapters freed of input directions before they are merged, and the file beside a recipe that holds the directions.

With Q [in, k] orthonormal, dW -> dW (I - Q Q^T) by A -> A - (A Q) Q^T: the same rank, the same B. Where the directions come from
is for others to say (:mod:`loralloy.weighting.common`); a recipe repeats what was done with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import LoralloyError
from ..factors import LoraFactors, widest

FREED_FILE = "freed.safetensors"


def without(factors: LoraFactors, q: Tensor) -> LoraFactors:
    """The factors of dW (I - Q Q^T), q [in, k]: the same B, rank and dtype; what is no linear module stays as it is.

    Raises LoralloyError for directions of another width.
    """
    if factors.kind != "linear" or not q.shape[1]:
        return factors
    if q.shape[0] != factors.shape[1]:
        raise LoralloyError(
            f"common directions are of {q.shape[0]} inputs and the module has {factors.shape[1]}; probe this model with these "
            "adapters"
        )
    wide = widest(factors.A.device)
    q, a = q.to(factors.A.device, wide), factors.A.to(wide)
    return replace(factors, A=(a - (a @ q) @ q.mT).to(factors.A.dtype))


def freed_adapter(adapter: Adapter, directions: Mapping[str, Tensor]) -> Adapter:
    """The adapter without what it answers to directions (module -> [in, k]); other modules stay as they are."""
    factors = {m: without(adapter[m], directions[m]) if m in directions else adapter[m] for m in adapter}
    extra = {name: adapter.extra_tensor(name) for name in adapter.extra}
    made = Adapter(adapter.name, factors, adapter.config, adapter.base, extra, adapter.provenance, adapter.licence)
    made.freed_from = adapter.freed_from or adapter.content_hash
    return made


def packed(directions: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """Directions as the bytes of a safetensors file, the same for the same directions, and their hash as ``sha256:HEX``."""
    from safetensors.torch import save

    content: bytes = save({name: directions[name].contiguous() for name in sorted(directions)})
    return content, f"sha256:{hashlib.sha256(content).hexdigest()}"


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The directions of a file and its hash. Raises LoralloyError for a file that is not there or holds something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        found: dict[str, Tensor] = load(content)
    except (OSError, SafetensorError) as error:
        raise LoralloyError(f"{path} cannot be read as a safetensors file of directions: {error}") from None
    if odd := [
        n for n, q in found.items() if q.ndim != 2 or not q.is_floating_point() or not bool(torch.isfinite(q).all())
    ]:
        raise LoralloyError(f"{path}: {odd[0]!r} holds no directions, a finite matrix [inputs, directions]")
    return found, f"sha256:{hashlib.sha256(content).hexdigest()}"
