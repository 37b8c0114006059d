"""What a model calls its modules, where an adapter calls them as another version of transformers does.

transformers renames modules now and then: DINOv2's ``attention.attention.query`` of 5.17 is ``attention.q_proj`` in 5.23. It
keeps a list of the renamings, by which it loads older checkpoints; adapters go by the same list here. What it does beyond
renaming (fusing or splitting weights) is not a change of names, and such adapters stay refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..bank import Bank
from ..errors import LoralloyError
from ..factors import LoraFactors
from .base import base_fingerprint

# where in the model (a prefix of names), the renamings in transformers' order, and its other changes of weights there
_Place: TypeAlias = "tuple[str, list[Any], list[Any]]"


class RenamedAdapter(Adapter):
    """A view of an adapter under other names of its modules. Nothing is read or copied for it.

    Scalings, ranks and provenance are the adapter's, and so is the content hash: it says which files these are, whatever
    their modules are called here. (Saved and loaded again, it is of other files and has another.)

    Args:
        adapter: what it is a view of.
        own: name here -> the adapter's own, for every module.
    """

    def __init__(self, adapter: Adapter, own: Mapping[str, str]) -> None:
        inside = adapter.own if isinstance(adapter, RenamedAdapter) else {}
        self.of: Adapter = adapter.of if isinstance(adapter, RenamedAdapter) else adapter
        self.own: dict[str, str] = {here: inside.get(name, name) for here, name in own.items()}
        # what would name modules as they are not called here; saving writes targets, ranks and alphas by full name
        config = replace(
            adapter.config, target_modules=None, layers_to_transform=None, rank_pattern={}, alpha_pattern={}
        )
        super().__init__(
            adapter.name, _Under(self.of, self.own), config, adapter.base, adapter._extra, adapter.provenance,
            adapter.licence, adapter.path,
        )  # fmt: skip
        self.own_names = {here: name for here, name in self.own.items() if here != name}

    def __getitem__(self, module: str) -> LoraFactors:
        return self.of[self.own[module]]

    def unchecked(self, module: str) -> LoraFactors:
        return self.of.unchecked(self.own[module])

    def outline(self, module: str) -> LoraFactors:
        return self.of.outline(self.own[module])

    @property
    def content_hash(self) -> str:
        return self.of.content_hash


class _Under(Mapping[str, LoraFactors]):
    """Factors by other names."""

    def __init__(self, factors: Mapping[str, LoraFactors], own: Mapping[str, str]) -> None:
        self._factors, self._own = factors, own

    def __getitem__(self, module: str) -> LoraFactors:
        return self._factors[self._own[module]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def __contains__(self, module: object) -> bool:
        return module in self._own


@dataclass
class _Look:
    """An adapter's modules by transformers' renamings: name in the model -> its own, and why that does not do."""

    own: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    renamed: int = 0
    """How many of the names that the model does not have were found in it under another."""
    problem: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.renamed) and not self.missing and not self.problem


class ModelNames:
    """A model's modules by name, and adapters by these names.

    Where all names of an adapter are the model's, nothing is done. Else the adapter is taken to be of another version of
    transformers, and all its names go through the renamings, as those of a checkpoint do. Unless each then is a module of the
    model, and no two are the same, the adapter is given back as it is. An adapter of a newer version than the one that is
    installed cannot be renamed: the older one has no list of what came after it.

    Attributes:
        modules: all of the model's, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules = model, dict(model.named_modules())
        self._looks: dict[tuple[str, ...], _Look] = {}

    def bank(self, bank: Bank) -> Bank:
        """The bank by the model's names: itself where every adapter stays what it is.

        Raises LoralloyError where adapters that named a module differently turn out to have different shapes there.
        """
        made = [self.adapter(adapter) for adapter in bank.values()]
        same = all(new is old for new, old in zip(made, bank.values(), strict=True))
        return bank if same else Bank(made, bank.assume_same_base)

    def adapter(self, adapter: Adapter) -> Adapter:
        """The adapter by the model's names (a :class:`RenamedAdapter`), or itself."""
        if self._has_all(adapter):
            return adapter
        look = self._look(adapter)
        return RenamedAdapter(adapter, look.own) if look.fits else adapter

    def factors(self, factors: Mapping[str, LoraFactors]) -> Mapping[str, LoraFactors]:
        """The same of plain factors by module."""
        if isinstance(factors, Adapter):
            return self.adapter(factors)
        if self._has_all(factors):
            return factors
        look = self._look(factors)
        return _Under(factors, look.own) if look.fits else factors

    def unknown(self, factors: Iterable[str], module: str, owner: str) -> LoralloyError:
        """The error for a module that the model does not have; `owner`: whose, as in "adapter 'a'"."""
        look = self._look(factors)
        said = f"{owner} has module {module!r}, which the model does not; it is not of this base model"
        if not look.renamed:
            return LoralloyError(said)
        return LoralloyError(
            f"{said}, or of another version of transformers: by transformers' own renamings {look.renamed} of its modules are "
            f"the model's, but {look.problem or f'{look.missing[0]!r} is not'}; use the version that it was trained with"
        )

    def _has_all(self, names: Iterable[str]) -> bool:
        return all(map(self.modules.__contains__, names))

    def _look(self, names: Iterable[str]) -> _Look:
        names = tuple(names)
        if names not in self._looks:
            self._looks[names] = self._looked(names)
        return self._looks[names]

    def _looked(self, names: tuple[str, ...]) -> _Look:
        look, found = _Look(), dict.fromkeys(names, "")
        places = _places(self.model)  # fresh: some renamings remember what they have seen
        for name in sorted(names):  # as a checkpoint's are: those renamings rely on the order
            here, changed = _renamed(name, places)
            if changed:
                look.problem = look.problem or f"{name!r} is fused, split or turned around there"
            elif here in self.modules:
                found[name] = here
                look.renamed += here != name and name not in self.modules
            elif name in self.modules:
                found[name] = name
            else:
                look.missing.append(name)
        for name, here in found.items():
            if here and here in look.own:
                look.problem = look.problem or f"{look.own[here]!r} and {name!r} would both be {here!r}"
            look.own.setdefault(here, name)
        return look


def named_for(model: nn.Module, bank: Bank) -> Bank:
    """The bank with its modules called as the model calls them; the bank itself where nothing is to be, or can be, renamed.

    For adapters that were trained with another version of transformers (see :class:`ModelNames`). Everything that puts a bank
    into a model does this by itself, and what it returns goes by the bank's own names.
    """
    return ModelNames(model).bank(bank)


def saved_fingerprint(model: Any) -> str | None:
    """The base's fingerprint under the names of the files that transformers saves it in, which are those of older versions;
    None where these are the model's own, or cannot be told."""
    places = _places(model, legacy=False) if isinstance(model, nn.Module) else []
    try:
        back: list[_Place] = [
            (at, [t.reverse_transform() for t in reversed(renamings)], []) for at, renamings, _ in places
        ]
        parameters = [(_renamed(name, back, "")[0], p) for name, p in model.named_parameters()]
    except (AttributeError, ValueError):  # a model without parameters of that kind, a renaming that has no way back
        return None
    if all(old == new for (old, _), (new, _) in zip(parameters, model.named_parameters(), strict=True)):
        return None
    try:
        return base_fingerprint(_Named(parameters))
    except LoralloyError:  # quantised: it has the fingerprint that its files had
        return None


class _Named:
    """Looks like a model to `base_fingerprint`: parameters by given names."""

    def __init__(self, parameters: list[tuple[str, Tensor]]) -> None:
        self._parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._parameters)


def _places(model: nn.Module, legacy: bool = True) -> list[_Place]:
    """What transformers does to the names of a checkpoint of this model, for each outermost model of its own in it."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    places: list[_Place] = []
    for name, module in model.named_modules():
        prefix = name + "." if name else ""
        if not isinstance(module, PreTrainedModel) or any(prefix.startswith(at) for at, _, _ in places):
            continue
        changes = get_model_conversion_mapping(module, add_legacy=legacy)
        renamings = [c for c in changes if isinstance(c, WeightRenaming)]
        places.append((prefix, renamings, [c for c in changes if not isinstance(c, WeightRenaming)]))
    return places


def _renamed(name: str, places: Iterable[_Place], ending: str = ".weight") -> tuple[str, bool]:
    """A module's name after the renamings, and whether anything but its name changes."""
    for prefix, renamings, others in places:
        if not name.startswith(prefix):
            continue
        key = name.removeprefix(prefix) + ending
        for renaming in renamings:
            key = renaming.rename_source_key(key)[0]
        changed = any(other.rename_source_key(key)[1] is not None for other in others)
        return (prefix + key.removesuffix(ending) if key.endswith(ending) else name), changed
    return name, False
