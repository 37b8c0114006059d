"""A base model's folder: which tensor lies in which safetensors file, and which one a module of the model is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hub
from ..base_ref import BaseRef
from ..errors import LoralloyError
from ..formats import front_matter
from ..tensor_file import DTYPES, Spec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md", "LICENSE*", "NOTICE*"]
# What stands beside a module's bias where its weight is packed: GPTQ and AWQ, compressed-tensors, HQQ, bitsandbytes.
_PACKED = ("qweight", "weight_packed", "W_q", "weight_scale", "weight.absmax", "weight_blocks")


class Checkpoint:
    """The tensors of a model folder, opened from their headers and read when asked for.

    Attributes:
        folder: where it is; ref: what it was called by, with the revision of a hub id.
        config: config.json.
        shards: file name -> names of its tensors, in the file's order.
        files: tensor name -> file name.
        index: model.safetensors.index.json, or None for a single file.
        licence: from its card, or None.
    """

    def __init__(self, folder: Path, ref: BaseRef) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder, self.ref = folder, ref
        self.config: dict[str, Any] = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if not self.config:
            raise LoralloyError(f"{folder} has no config.json, so it is no transformers model; pass the base's folder")
        self.index: dict[str, Any] | None = None
        if (folder / SINGLE).is_file():
            names = [SINGLE]
        elif (folder / INDEX).is_file():
            self.index = read_json(folder / INDEX)
            names = sorted(set(self.index.get("weight_map", {}).values()))
        else:
            pickled = [*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth")]
            why = f"only {pickled[0].name}, a pickle, which can run code when opened" if pickled else f"no {SINGLE}"
            raise LoralloyError(
                f"{folder} holds {why}; load the model where you trust it and save it with save_pretrained, as safetensors"
            )
        self._handles: dict[str, Any] = {}
        self.shards: dict[str, list[str]] = {}
        self.files: dict[str, str] = {}
        for name in names:
            try:
                self._handles[name] = safe_open(str(folder / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise LoralloyError(
                    f"{folder / name} cannot be read ({error}); the base is incomplete or damaged, fetch it again"
                ) from None
            self.shards[name] = list(self._handles[name].keys())
            self.files |= dict.fromkeys(self.shards[name], name)
        card = folder / "README.md"
        said = front_matter(card.read_text(encoding="utf-8", errors="replace")).get("license") if card.is_file() else 0
        self.licence = str(said) if said else None

    @staticmethod
    def open(ref: str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint of a folder or of ``org/name@revision``. Raises LoralloyError with the way to get it."""
        name, revision = hub.parse_ref(ref)
        return Checkpoint(hub.resolve(os.path.expanduser(ref), "model", _FILES), BaseRef(name, revision))

    def metadata(self, file: str) -> dict[str, str]:
        return dict(self._handles[file].metadata() or {})

    def spec(self, name: str) -> Spec:
        """(dtype, shape) from the header. Raises LoralloyError for a dtype that torch does not hold."""
        part = self._handles[self.files[name]].get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise LoralloyError(
                f"tensor {name!r} of {self.folder} is {part.get_dtype()}, which cannot be written; give the base unquantised"
            )
        return DTYPES[part.get_dtype()], tuple(part.get_shape())

    def tensor(self, name: str) -> Tensor:
        """The tensor itself, mapped from the file: pages are read as they are used."""
        return self._handles[self.files[name]].get_tensor(name)

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or [""])[0])

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    # -- names ---------------------------------------------------------------------------------------------------------

    def names(self, wanted: Iterable[str]) -> dict[str, str]:
        """Names in the model -> names in the files, for every one that is found.

        A checkpoint may have one leading part more than the model or one less: a head's model holds `bert.encoder`, where
        the bare model's file says `encoder` (transformers' base_model_prefix). One such change is made for all names alike,
        the first that finds the most; a name that it does not fit keeps its own.
        """
        asked = list(wanted)
        starts = dict.fromkeys(_starts(asked))
        ends = dict.fromkeys(_starts(self.files))
        best: dict[str, str] = {}
        for forms in (
            [{n: n for n in asked}],
            [{n: n.removeprefix(f"{start}.") for n in asked} for start in starts],
            [{n: n if n in self.files else f"{start}.{n}" for n in asked} for start in ends],
        ):
            tried = [{n: to for n, to in form.items() if to in self.files} for form in forms]
            most = max(tried, key=len, default={})
            rivals = [form for form in tried if len(form) == len(most) > len(best) and form != most]
            if rivals:
                name = next(n for n in most if rivals[0].get(n) != most[n])
                raise LoralloyError(
                    f"module {name.removesuffix('.weight')!r} could be {most[name]!r} or {rivals[0].get(name)!r} of "
                    f"{self.folder}; the adapter's module names lack the part that tells them apart"
                )
            if len(most) > len(best):
                best = most
            if len(best) == len(asked):
                break
        return best

    def packed(self, name: str) -> str | None:
        """The name of a packed form of weight `name`, which is not there itself."""
        module = name.removesuffix(".weight")
        forms = [f"{module}.{suffix}" for suffix in _PACKED]
        found = {n: n for n in self.files if n.endswith(_PACKED)}
        for form in forms:
            for n in found:
                if n == form or n.endswith(f".{form}") or form.endswith(f".{n}"):
                    return n
        return None

    # -- what it is ----------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """The base's fingerprint (:func:`loralloy.live.base.base_fingerprint`), from the files, without loading the model.

        Raises LoralloyError when a parameter of the model has no tensor of its name here, or a quantised one.
        """
        from ..live.base import base_fingerprint

        return base_fingerprint(_Parameters(self, self._parameters()))

    def _parameters(self) -> dict[str, str]:
        """Parameter of the causal language model -> tensor; by the model's own names where transformers can tell them."""
        try:
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.from_pretrained(str(self.folder))
            with torch.device("meta"):
                wanted = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
        except Exception:  # not installed, or a model that it does not know: the files' own names, then
            return {name: name for name in self.files}
        found = self.names(wanted)
        missing = next((name for name in wanted if name not in found), None)
        if missing:
            raise LoralloyError(f"{self.folder} has no tensor for the model's parameter {missing!r}")
        return found


class _Parameters:
    """Looks like a model to `base_fingerprint`: parameters by name, mapped from the files."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self._checkpoint, self._names = checkpoint, names

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, stored in self._names.items():
            yield name, self._checkpoint.tensor(stored)


def _starts(names: Iterable[str]) -> Iterator[str]:
    """Leading parts that some name has, of one and of two words: `model`, `language_model.model`."""
    for name in names:
        words = name.split(".")
        for length in (1, 2):
            if len(words) > length + 1:
                yield ".".join(words[:length])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises LoralloyError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoralloyError(f"{path}: not valid JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(data, dict):
        raise LoralloyError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
