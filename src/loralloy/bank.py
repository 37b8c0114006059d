"""Bank: named adapters of one base model, checked for compatibility before anything is composed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .adapter import CONFIG_FILE, DIFFUSERS_FILE, WEIGHTS_FILE, Adapter
from .base_ref import BaseRef, compare
from .errors import LoralloyError
from .factors import LoraFactors
from .weights import Weights


class Bank(Mapping[str, Adapter]):
    """A read-only mapping name -> :class:`Adapter`; all are of one base model.

    Args:
        adapters: at least one, with distinct names.
        assume_same_base: skip the check of base models (not of shapes) where it cannot be told or says no.

    Raises LoralloyError when names repeat, base models differ or cannot be told to be the same, or one module has two
    shapes.
    """

    def __init__(self, adapters: Iterable[Adapter], assume_same_base: bool = False) -> None:
        self._adapters: dict[str, Adapter] = {}
        for adapter in adapters:
            if adapter.name in self._adapters:
                other = self._adapters[adapter.name]
                raise LoralloyError(
                    f"two adapters are called {adapter.name!r} ({other.path} and {adapter.path}); rename one of the folders"
                )
            self._adapters[adapter.name] = adapter
        if not self._adapters:
            raise LoralloyError("the bank is empty; give at least one adapter")
        self.assume_same_base = assume_same_base
        self.base = self._common_base()
        self._check_shapes()

    @staticmethod
    def load(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], assume_same_base: bool = False) -> Bank:
        """Every adapter in a folder, or a list of adapter folders and hub ids (``org/name@rev``)."""
        refs = adapters_in(source) if isinstance(source, str | os.PathLike) else source
        return Bank([Adapter.load(ref) for ref in refs], assume_same_base)

    # -- a mapping -----------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise LoralloyError(f"there is no adapter {name!r} in this bank; it has {', '.join(self._adapters)}")
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    @property
    def modules(self) -> list[str]:
        """Every module that any adapter has, in order of first appearance."""
        return list(dict.fromkeys(module for adapter in self.values() for module in adapter))

    def factors(self, module: str) -> dict[str, LoraFactors]:
        """The factors of one module, by adapter; adapters without it are absent."""
        return {name: adapter[module] for name, adapter in self.items() if module in adapter}

    def select(self, names: Iterable[str]) -> Bank:
        """The bank of only these adapters."""
        return Bank([self[name] for name in names], self.assume_same_base)

    def check_weights(self, weights: Weights) -> None:
        """Raises LoralloyError when weights name an adapter or a module that the bank does not have."""
        for name, value in weights.coefficients.items():
            adapter = self[name]
            if isinstance(value, Mapping):
                for module in value:
                    if module != "*" and module not in adapter:
                        raise LoralloyError(
                            f"weights of adapter {name!r} name module {module!r}, which it does not have"
                        )

    def fit_weights(self, weights: Weights) -> Weights:
        """The weights by the names that modules have here; adapters that go by other names than their files' take both.

        Raises LoralloyError as :meth:`check_weights` does.
        """
        weights = fit_names(weights, self)
        self.check_weights(weights)
        return weights

    def own_weights(self, weights: Weights) -> Weights:
        """The weights by the names that modules have in each adapter's own files: what to save, or to merge without a model."""
        of = {name: self[name].own_names for name in weights.names if weights.per_module}
        own = {name: names for name, names in of.items() if names}
        return weights.by_names(own) if own else weights

    # -- one base model ------------------------------------------------------------------------------------------------

    def _common_base(self) -> BaseRef:
        adapters = list(self.values())
        # The reference is the one that says most: fingerprint, then revision, then name.
        best = max(adapters, key=lambda a: (bool(a.base.fingerprint), bool(a.base.revision), bool(a.base.name)))
        if self.assume_same_base:
            return best.base
        # "Same" is passed on: a name may tie an adapter to one whose fingerprint ties it to a third. None may differ.
        tied, left = {best.base: best}, [a for a in adapters if a is not best]
        while left:
            loose = []
            for adapter in left:
                verdicts = [(*compare(base, adapter.base), other) for base, other in tied.items()]
                for verdict, why, other in verdicts:
                    if verdict == "different":
                        raise LoralloyError(
                            f"adapters {other.name!r} ({other.base}) and {adapter.name!r} ({adapter.base}) are of different base "
                            f"models: {why}; compose them apart, or pass --assume-same-base if you know better"
                        )
                if any(verdict == "same" for verdict, _, _ in verdicts):
                    tied.setdefault(adapter.base, adapter)
                else:
                    loose.append(adapter)
            if len(loose) == len(left):
                _, why = compare(best.base, loose[0].base)
                raise LoralloyError(
                    f"it cannot be told whether adapters {best.name!r} ({best.base}) and {loose[0].name!r} ({loose[0].base}) "
                    f"are of one base model: {why}; pass --assume-same-base if you know that they are"
                )
            left = loose
        return best.base

    def _check_shapes(self) -> None:
        seen: dict[str, tuple[str, LoraFactors]] = {}
        for name, adapter in self.items():
            for module in adapter:
                outline = adapter.outline(module)
                other, first = seen.setdefault(module, (name, outline))
                if (first.kind, first.shape, first.A.shape[1:]) != (outline.kind, outline.shape, outline.A.shape[1:]):
                    hint = (
                        "; a resized vocabulary: retrain or resize so that both have the same tokens"
                        if "embedding" in (first.kind, outline.kind) or "embed" in module or "lm_head" in module
                        else ""
                    )
                    raise LoralloyError(
                        f"module {module!r} is {first.kind} {list(first.shape)} in adapter {other!r} but {outline.kind} "
                        f"{list(outline.shape)} in {name!r}; they are not of one base model{hint}"
                    )


def fit_names(weights: Weights, adapters: Mapping[str, Adapter]) -> Weights:
    """Weights whose modules are called as in the adapters' files by the names that they have in the adapters."""
    new = {
        name: {own: here for here, own in adapters[name].own_names.items()}
        for name, value in weights.coefficients.items()
        if isinstance(value, Mapping) and name in adapters and adapters[name].own_names
        and not all(module == "*" or module in adapters[name] for module in value)
    }  # fmt: skip
    return weights.by_names(new) if new else weights


def adapters_in(ref: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """What a reference stands for: a folder that is no adapter itself, for the adapter folders in it, by name; anything else
    (an adapter folder, a hub id) for itself.

    A folder with any file of an adapter's counts, so that a damaged one is found and named. Raises LoralloyError for a
    folder without an adapter.
    """
    folder = Path(ref)
    if not folder.is_dir() or _is_adapter(folder):
        return [ref]
    found = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and _is_adapter(p))
    if not found:
        raise LoralloyError(
            f"{folder} is not an adapter folder and holds none; expected {CONFIG_FILE} and {WEIGHTS_FILE}, in it or in its "
            "subfolders"
        )
    return [*found]


def _is_adapter(folder: Path) -> bool:
    return folder.is_dir() and any(
        (folder / f).is_file() for f in (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin", DIFFUSERS_FILE)
    )
