"""Job: a recipe with its adapters opened and every weight worked out; what a merge, a plan or a locked copy is made of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__, layerwise
from ..adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from ..atomic import atomic_folder, check_replaceable
from ..bank import Bank
from ..errors import LoralloyError
from ..weights import Weights
from .freed import FREED_FILE, freed_adapter, packed, read

if TYPE_CHECKING:
    from ..merging import Merged, Plan
    from ..merging.rule import Plugin, Rule
    from .recipe import Recipe

RECIPE_FILE = "recipe.yaml"
_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md", RECIPE_FILE, FREED_FILE)  # all that a merge writes
_NOTHING = 1e-12


@dataclass(frozen=True)
class Job:
    """One merge, ready to run.

    Attributes:
        recipe: what it came from.
        bank: the adapters, opened.
        given: the weights as meant.
        weights: the same with 0 for modules that the recipe leaves out: what is merged.
        left_out: those modules.
        rule, before, after: with their parameters bound.
        space: the recipe's, or the rule's first.
        freed: adapter -> module, by its name in the adapter's files -> the directions [in, k] that it is freed of; `bank` has it
            so already.
        opened: the adapters as they are in their files, where that is not `bank`.
    """

    recipe: Recipe
    bank: Bank
    given: Weights
    weights: Weights
    left_out: tuple[str, ...]
    rule: Rule
    before: Plugin | None
    after: Plugin | None
    space: str
    freed: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    opened: Bank | None = None

    @property
    def rank(self) -> Any:
        """A number, "max" or "full"; None where `energy` decides."""
        if self.recipe.rank is None and self.recipe.energy is None:
            return self.rule.default_rank
        return self.recipe.rank

    def arguments(self) -> dict[str, Any]:
        """What ``plan`` and ``merge`` take by keyword, beside the bank and the weights."""
        import torch

        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, None: None}
        return {
            "rule": self.rule, "space": self.space, "rank": self.rank, "dtype": dtypes[self.recipe.dtype],
            "energy": self.recipe.energy, "before": self.before, "after": self.after, "device": self.recipe.device,
            "measure": self.recipe.measure,
        }  # fmt: skip

    def plan(self) -> Plan:
        """What the merge will do: groups of modules, ranks, the output's size. Nothing is read but the files' headers."""
        from ..merging import make_plan

        return make_plan(self.bank, self.weights, **self.arguments())

    def notes(self) -> list[str]:
        """What a reader would not expect."""
        from ..merging.plan import takes_part

        said = [
            f"adapter {name} is freed of the directions in {entry.freed.path}"
            for entry, name in zip(self.recipe.adapters, self.bank.names, strict=True)
            if entry.freed is not None
        ]
        silent = [n for n in self.weights.names if not takes_part(self.bank[n], self.weights)]
        if self.space != "factors" and len(silent) < len(self.weights.names):  # the plan says what it means there
            said += [f"adapter {name} has weight 0: it takes no part" for name in silent]
        unnamed = [name for name in self.bank.names if name not in self.weights.names]
        said += [f"adapter {name} has no weight in {self.recipe.weights}: it takes no part" for name in unnamed]
        if (other := self.given.learned_for_other(str(self.rule), self.space)) is not None:
            said.append(other)
        if self.left_out:
            said.append(f"{len(self.left_out)} of {len(self.bank.modules)} modules are left out (`modules`)")
        return said

    def resolved(self) -> Recipe:
        """The recipe with nothing left to chance: hashes, every parameter's value, space and rank; a weights file inlined."""
        entries = []
        for n, (entry, name) in enumerate(zip(self.recipe.adapters, self.bank.names, strict=True)):
            if name not in self.given.names:
                continue
            kept = (self.opened or self.bank)[name]
            data = entry.model_dump(exclude_none=True) | {"name": name, "hash": kept.content_hash}
            if entry.freed is not None:
                data["freed"] = {"path": entry.freed.path, "hash": read(self.recipe.freed_file(n))[1]}
            elif name in self.freed:
                data["freed"] = {"path": FREED_FILE}  # where `to_yaml` is told that it is
            if self.recipe.weights is not None:
                value = self.given.to_dict()["weights"][name]
                data["weight"] = dict(value) if isinstance(value, Mapping) else float(value)
            entries.append(data)
        parts = {"rule": self.rule, "before": self.before, "after": self.after}
        return self.recipe.replace(
            adapters=entries,
            weights=None,
            normalise=None if self.recipe.weights is not None else self.recipe.normalise or None,
            space=self.space,
            rank=self.rank,
            **{field: {"name": p.name, **p.values} for field, p in parts.items() if p is not None},
        )

    def to_yaml(self, folder: Path, out: Path | None = None, freed: tuple[Path, str] | None = None) -> str:
        """The resolved recipe as the text of a file in `folder`; it names an output only where `out` is given.

        freed: where the directions of all adapters are now, and that file's hash.
        """
        recipe = self.resolved().replace(out=os.path.abspath(out) if out is not None else None)
        if freed is not None:
            where = {"path": os.path.abspath(freed[0]), "hash": freed[1]}
            entries = [e.model_dump(exclude_none=True) for e in recipe.adapters]
            recipe = recipe.replace(adapters=[e | ({"freed": where} if "freed" in e else {}) for e in entries])
        head = (
            f"# Written by loralloy {__version__}. `loralloy merge THIS_FILE -o FOLDER` merges the same adapters again, and\n"
            "# refuses if one of them has changed (--update-lock takes it as it is).\n"
        )
        return head + recipe.to_yaml(os.path.abspath(folder))

    def merge(
        self,
        out: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        on_module: Callable[[str], None] | None = None,
    ) -> Merged:
        """Merge; with `out`, stream to that folder and put the resolved recipe beside the adapter as ``recipe.yaml``.

        Raises LoralloyError for what :func:`loralloy.merging.merge` and :func:`check_out` do.
        """
        from ..merging import merge

        more = self.arguments() | {"on_module": on_module}
        if out is None:
            return merge(self.bank, self.weights, **more)
        target = Path(out).absolute()
        check_out(target, overwrite)
        self._directions()  # what one file cannot hold is said before any work
        with atomic_folder(target, overwrite) as folder:
            merged = merge(self.bank, self.weights, name=target.name, out=folder / "made", **more)
            self._finish(folder, target)
        return replace(merged, adapter=Adapter.load(target))

    def write(self, adapter: Adapter, out: str | os.PathLike[str], overwrite: bool = False) -> Adapter:
        """Write what this job has merged in memory, the resolved recipe beside it. Raises as :func:`check_out` does."""
        target = Path(out).absolute()
        check_out(target, overwrite)
        with atomic_folder(target, overwrite) as folder:
            adapter.save(folder / "made")
            self._finish(folder, target)
        return Adapter.load(target)

    def _finish(self, folder: Path, target: Path) -> None:
        """The adapter out of the folder `made`, and the recipe, with the directions that it needs, as of a file in `target`."""
        for file in sorted((folder / "made").iterdir()):
            os.replace(file, folder / file.name)
        shutil.rmtree(folder / "made")
        where = None
        if self.freed:
            content, digest = packed(self._directions())
            (folder / FREED_FILE).write_bytes(content)
            where = (target / FREED_FILE, digest)
        # Without `out`: a copy of this file elsewhere would name the folder that it was copied to.
        (folder / RECIPE_FILE).write_text(self.to_yaml(target, freed=where), encoding="utf-8")

    def _directions(self) -> dict[str, Tensor]:
        """Of all adapters, in one file. Raises LoralloyError where two are freed of different ones at one module."""
        found: dict[str, Tensor] = {}
        for name, directions in self.freed.items():
            for module, q in directions.items():
                if module in found and not torch.equal(found[module], q):
                    raise LoralloyError(
                        f"adapter {name!r} is freed of other directions at {module!r} than one before it; give both one file"
                    )
                found[module] = q
        return found


def check_out(target: Path, overwrite: bool) -> None:
    """Raise LoralloyError if `target` exists and may not be replaced: without `overwrite` anything, with it what is no
    adapter folder or holds more than a merge writes."""
    check_replaceable(target, overwrite, _FILES, (CONFIG_FILE, WEIGHTS_FILE))


def prepare(recipe: Recipe, update_lock: bool = False) -> Job:
    """See :meth:`Recipe.prepare`."""
    bank = recipe.bank()
    if not update_lock:
        _check_lock(recipe, bank)
    freed = _freed(recipe, bank, update_lock)
    opened = bank if freed else None
    if freed:
        bank = Bank([freed_adapter(a, freed[n]) if n in freed else a for n, a in bank.items()], bank.assume_same_base)
    rule, before, after = recipe.parts()
    space = rule.check_space(recipe.space) if recipe.space is not None else rule.spaces[0]
    given = _weights(recipe, bank)
    left_out: tuple[str, ...] = ()
    if recipe.modules is not None:
        try:
            kept = set(layerwise.select(bank.modules, recipe.modules.include, recipe.modules.exclude))
        except layerwise.SpecError as error:
            raise recipe.wrong(_modules_at(recipe, error.at), error) from None
        left_out = tuple(m for m in bank.modules if m not in kept)
    weights = _without(given, bank, left_out)
    return Job(recipe, bank, given, weights, left_out, rule, before, after, space, freed, opened)


def _check_lock(recipe: Recipe, bank: Bank) -> None:
    for n, (entry, name) in enumerate(zip(recipe.adapters, bank.names, strict=True)):
        if entry.hash is not None and entry.hash != bank[name].content_hash:
            raise recipe.wrong(
                ("adapters", n, "hash"),
                f"adapter {name!r} is not the one that this recipe was locked to: its content is now "
                f"{bank[name].content_hash[:19]}..., not {entry.hash[:19]}...; bring the old one back, or pass --update-lock",
            )


def _freed(recipe: Recipe, bank: Bank, update_lock: bool) -> dict[str, dict[str, Tensor]]:
    """The directions that adapters are freed of, of their own modules alone."""
    found = {}
    for n, (entry, name) in enumerate(zip(recipe.adapters, bank.names, strict=True)):
        if entry.freed is None:
            continue
        try:
            directions, digest = read(recipe.freed_file(n))
            own = {m: q for m, q in directions.items() if m in bank[name]}
            if not own:
                raise LoralloyError(f"{entry.freed.path} has directions of none of the modules of adapter {name!r}")
            if wrong := [m for m, q in own.items() if q.shape[0] != bank[name].outline(m).shape[1]]:
                raise LoralloyError(
                    f"{entry.freed.path} has directions of another width than module {wrong[0]!r} of {name!r}"
                )
        except LoralloyError as error:
            raise recipe.wrong(("adapters", n, "freed"), error) from None
        if entry.freed.hash not in (None, digest) and not update_lock:
            raise recipe.wrong(
                ("adapters", n, "freed"),
                f"{entry.freed.path} is not the file that this recipe was locked to; bring it back, or pass --update-lock",
            )
        found[name] = own
    return found


def _weights(recipe: Recipe, bank: Bank) -> Weights:
    """The weights of the recipe for every module of its adapters, normalised where it says so."""
    if recipe.weights is not None:
        try:
            weights = Weights.load(recipe.folder / Path(recipe.weights).expanduser())
            bank.check_weights(weights)
        except LoralloyError as error:
            raise recipe.wrong(("weights",), error) from None
    elif all(entry.weight is None for entry in recipe.adapters):
        weights = Weights.uniform(bank.names)
    else:
        found = {}
        for n, (entry, name) in enumerate(zip(recipe.adapters, bank.names, strict=True)):
            try:
                found[name] = layerwise.coefficients(entry.weight, bank[name], bank.modules)
            except layerwise.SpecError as error:
                raise recipe.wrong(("adapters", n, "weight", *error.at), error) from None
        weights = Weights(found)
    if not recipe.normalise:
        return weights
    try:
        return _normalised(weights, bank)
    except LoralloyError as error:
        raise recipe.wrong(("normalise",), error) from None


def _normalised(weights: Weights, bank: Bank) -> Weights:
    """Divided by their sum; where one is by module, each module's by the sum over the adapters that have it."""
    if not weights.per_module:
        return weights.normalised()
    sums: dict[str, float] = {}
    for name in weights.names:
        for m in bank[name]:
            sums[m] = sums.get(m, 0.0) + weights.of(name, m)
    for module, total in sums.items():
        sizes = [abs(weights.of(name, module)) for name in weights.names if module in bank[name]]
        if abs(total) <= _NOTHING * sum(sizes) and any(sizes):
            raise LoralloyError(f"the weights of module {module!r} sum to 0, so they cannot be normalised")
    return replace(
        weights,
        coefficients={n: {m: weights.of(n, m) / (sums[m] or 1.0) for m in bank[n]} for n in weights.names},
    )


def _without(weights: Weights, bank: Bank, left_out: tuple[str, ...]) -> Weights:
    """The weights with 0 at some modules."""
    if not left_out:
        return weights
    coefficients = {}
    for name, value in weights.coefficients.items():
        rest = value if isinstance(value, Mapping) else {"*": value}
        coefficients[name] = {**rest, **{m: 0.0 for m in left_out if m in bank[name]}}
    return replace(weights, coefficients=coefficients)


def _modules_at(recipe: Recipe, at: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where a pattern stands: `modules: [a, b]` and `modules: a` are short for `modules: {include: ...}`."""
    short = not isinstance(recipe._document.data["modules"], dict)
    return ("modules", *(at[1:] if short else at))
