"""Adapter: module name -> LoraFactors, read lazily from PEFT's folder format and saved atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import hub
from .adapter_config import AdapterConfig
from .atomic import atomic_folder
from .base_ref import BaseRef
from .errors import LoralloyError
from .factors import LoraFactors
from .formats import front_matter, layout
from .stored import StoredFactors, StoredTensors, check_finite
from .tensor_file import identity

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


class Adapter(Mapping[str, LoraFactors]):
    """A LoRA adapter: a read-only mapping from module name (as in the base model) to :class:`LoraFactors`.

    Attributes:
        name: what weights and messages call it.
        config: the PEFT configuration's part that matters here.
        base: which base model it is of.
        extra: names of fully saved tensors (modules_to_save, saved embeddings); read with :meth:`extra_tensor`.
        provenance: what the safetensors header records (training, parents, rule, error); may be empty.
        licence: from the model card, or None.
        path: the folder it came from, or None.
        freed_from: the content hash that it had before it was freed of directions (see :mod:`loralloy.recipe.freed`), or None.
        own_names: module -> what the adapter's files call it, where that is something else (see :mod:`loralloy.live.names`).
    """

    own_names: Mapping[str, str] = MappingProxyType({})
    freed_from: str | None = None

    def __init__(
        self,
        name: str,
        factors: Mapping[str, LoraFactors],
        config: AdapterConfig,
        base: BaseRef,
        extra: Mapping[str, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
        licence: str | None = None,
        path: Path | None = None,
    ) -> None:
        if not factors and not extra:
            raise LoralloyError(f"adapter {name!r}: it has no LoRA module; the file is empty, fetch or save it again")
        self.name, self.config, self.base, self.path, self.licence = name, config, base, path, licence
        self._factors, self._extra = factors, dict(extra or {}) if not isinstance(extra, StoredTensors) else extra
        self.provenance: dict[str, Any] = dict(provenance or {})
        self._hash: str | None = None

    # -- a mapping -----------------------------------------------------------------------------------------------------

    def __getitem__(self, module: str) -> LoraFactors:
        try:
            return self._factors[module]
        except LoralloyError as error:
            raise error.within(f"adapter {self.name!r}") from None

    def unchecked(self, module: str) -> LoraFactors:
        """One module without a look for NaN and infinity: for those who look at all that they make of it."""
        return self._factors.read(module) if isinstance(self._factors, StoredFactors) else self[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __contains__(self, module: object) -> bool:
        return module in self._factors

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {len(self)} modules, rank {self.max_rank}, of {self.base})"

    @property
    def extra(self) -> list[str]:
        return list(self._extra)

    def extra_tensor(self, name: str) -> Tensor:
        """A fully saved tensor, by its name in the base model. Raises LoralloyError if it holds NaN or infinity."""
        tensor = self._extra[name]
        check_finite(tensor, f"adapter {self.name!r}: tensor {name!r}")
        return tensor

    def outline(self, module: str) -> LoraFactors:
        """Shapes, dtypes, scaling and kind of one module on the meta device: nothing is read where the adapter is on disk."""
        if isinstance(self._factors, StoredFactors):
            return self._factors.outline(module)
        return self._factors[module].to(device="meta")

    def outline_extra(self, name: str) -> Tensor:
        """Shape and dtype of one fully saved tensor, on the meta device."""
        return self._extra[name].to(device="meta")

    def rank(self, module: str) -> int:
        """Rank of one module, without reading it."""
        return self.outline(module).rank

    @property
    def max_rank(self) -> int:
        return max((self.rank(m) for m in self), default=0)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype it is stored in (of its first module)."""
        return self[next(iter(self))].A.dtype if len(self) else next(iter(self._extra.values())).dtype

    @property
    def content_hash(self) -> str:
        """sha256 over module names, scalings and factor bytes: equal exactly when the adapters compute the same thing.

        Computed once; of the bytes as they are, whether they are finite or not.
        """
        # not a cached_property: before Python 3.12 its lock is held for all adapters, and two could not be hashed at once
        if self._hash is None:
            self._hash = self._digest()
        return self._hash

    def _digest(self) -> str:
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            lazy = self._factors if isinstance(self._factors, StoredFactors) else None
            stored = lazy.opened(stack) if lazy else None
            for module in sorted(self):
                f = self.unchecked(module) if stored is None else self.outline(module)
                # 12 digits: folding rsLoRA into alpha = scaling * r, on saving, may cost the last bit
                digest.update(
                    f"{module}|{f.kind}|{f.scaling:.12g}|{f.A.dtype}|{list(f.A.shape)}|{list(f.B.shape)}".encode()
                )
                for side, tensor in (("A", f.A), ("B", f.B)):
                    if lazy is None or stored is None:
                        digest.update(_bytes(tensor))
                        continue
                    for block in stored.blocks(lazy.key(module, side)):
                        digest.update(block)
            for name in sorted(self._extra):
                tensor = self._extra[name]
                digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode())
                digest.update(_bytes(tensor))
        return "sha256:" + digest.hexdigest()

    def validate(self) -> Adapter:
        """Read every tensor once, so that a damaged one is found now. Returns itself."""
        for module in self:
            self[module]
        for name in self._extra:
            self.extra_tensor(name)
        return self

    # -- disk ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def load(ref: str | os.PathLike[str], name: str | None = None) -> Adapter:
        """Open an adapter folder (or hub id ``org/name@rev``); tensors are read when asked for.

        Raises LoralloyError, naming adapter, module, field and the way out, for everything that could not be composed
        right: another PEFT type, DoRA, lora_bias, target_parameters, inits that changed the base, a .bin file, a torn
        file, factors that do not fit, and (on reading) NaN or infinity.
        """
        allow = ["*.json", "*.safetensors", "README.md"]
        folder = hub.resolve(ref, "adapter", allow)
        # a hub's cache folder is called by its commit; the id says more
        # (abspath, not resolve: a link is called by its own name)
        name = name or Path(os.path.abspath(folder) if os.path.isdir(ref) else hub.parse_ref(ref)[0]).name
        try:
            return _load(folder, name)
        except LoralloyError as error:
            named = str(error).startswith(f"adapter {name!r}:")
            raise (error if named else error.within(f"adapter {name!r}")) from None

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False, dtype: torch.dtype | None = None) -> None:
        """Write what PEFT, transformers and vLLM load: adapter_config.json, adapter_model.safetensors, README.md.

        Atomic: the target is the old folder or the new, never a part (see :mod:`loralloy.atomic`).

        Args:
            folder: the target.
            overwrite: replace an existing target.
            dtype: cast to; None keeps each tensor's dtype.

        Raises LoralloyError if the target exists, or if the cast overflows.
        """
        from .saving import write_adapter

        with atomic_folder(folder, overwrite) as temporary:
            write_adapter(self, temporary, dtype)


def _bytes(tensor: Tensor) -> Any:
    """The tensor's memory, for hashing; copied only from another device."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()


def _load(folder: Path, name: str) -> Adapter:
    from safetensors import SafetensorError, safe_open

    file = next((folder / f for f in (WEIGHTS_FILE, DIFFUSERS_FILE) if (folder / f).is_file()), None)
    config_path = folder / CONFIG_FILE
    config = AdapterConfig.read(config_path) if config_path.is_file() else None
    if file is None:
        pickles = [*folder.glob("adapter_model*.bin"), *folder.glob("adapter_model*.pt")]
        if pickles:
            raise LoralloyError(
                f"{pickles[0]} is a pickle, which can run code when opened; load it with PEFT where you trust it and save "
                "it again with safe_serialization=True"
            )
        raise LoralloyError(f"{folder} holds no {WEIGHTS_FILE}; this is not an adapter folder")
    if config is None and file.name == WEIGHTS_FILE:
        raise LoralloyError(f"{folder} holds no {CONFIG_FILE}, without which alpha and the base model are not known")
    try:
        number = identity(file)  # before it is mapped: a mapped file keeps its number, so no other can have it later
        handle = safe_open(str(file), framework="pt")
        keys, header = list(handle.keys()), handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LoralloyError(f"{file} cannot be read ({error}); the file is torn or damaged, fetch it again") from None
    where = layout(keys)
    if config is None and where.extra:
        stray = next(iter(where.extra.values()))
        raise LoralloyError(f"tensor {stray!r} is not a LoRA factor (LoKr, LoHa?); only plain LoRA can be read")
    alphas = {module: float(handle.get_tensor(key)) for module, key in where.alphas.items()}
    factors = StoredFactors(handle, where, config, alphas, file, number)
    for module in factors:
        factors.outline(module)
    recorded = _header(header, file)
    recorded_base = BaseRef.from_dict(recorded.get("base") or {})
    if config is None:
        alpha = header.get("lora_adapter_metadata")
        config = _diffusers_config(json.loads(alpha) if alpha else {}, factors)
    base = BaseRef(
        config.base_name or recorded_base.name,
        config.base_revision or recorded_base.revision,
        recorded_base.fingerprint,
    )
    card = folder / "README.md"
    licence = (
        front_matter(card.read_text(encoding="utf-8", errors="replace")).get("license") if card.is_file() else None
    )
    extra = StoredTensors(handle, where.extra)
    return Adapter(name, factors, config, base, extra, recorded, str(licence) if licence else None, folder)


def _header(header: Mapping[str, str], file: Path) -> dict[str, Any]:
    if "loralloy" not in header:
        return {}
    try:
        data = json.loads(header["loralloy"])
    except json.JSONDecodeError:
        raise LoralloyError(f"{file}: its header entry 'loralloy' is not JSON; the file is damaged") from None
    version = data.get("version") if isinstance(data, dict) else None
    if version != 1:
        raise LoralloyError(f"{file}: its header entry 'loralloy' has version {version!r}, not 1; update loralloy")
    return data


def _diffusers_config(metadata: Mapping[str, Any], factors: StoredFactors) -> AdapterConfig:
    """A configuration for a file without one: alpha from the file's own records, else alpha = r (diffusers' default)."""
    ranks = {factors.outline(m).rank for m in factors}
    alphas = {float(v) for k, v in metadata.items() if k.endswith("lora_alpha") and isinstance(v, int | float)}
    if len(alphas) > 1 or (alphas and len(ranks) > 1):
        raise LoralloyError("its lora_adapter_metadata names several alphas or ranks; save it in PEFT's format")
    rank = max(ranks, default=1)
    alpha = alphas.pop() if alphas else float(rank)
    if not math.isfinite(alpha):
        raise LoralloyError("its lora_adapter_metadata has no finite lora_alpha")
    if len(ranks) == 1:
        factors._config = AdapterConfig(rank, alpha)
    return AdapterConfig(rank, alpha)
