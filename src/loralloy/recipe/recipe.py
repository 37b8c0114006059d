"""Recipe: which adapters, how much of each, and how they combine, as one YAML file (``version: 1``)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import PrivateAttr, ValidationError

from .. import hub, layerwise
from ..adapter import Adapter
from ..bank import Bank
from ..base_ref import BaseRef, compare
from ..errors import LoralloyError
from .document import At, Document, Problem
from .freed import read
from .schema import Fields, PartEntry, named, or_list, problem, suggest

if TYPE_CHECKING:
    from ..merging.rule import Part, Plugin, Rule
    from .job import Job

VERSION = 1


class Recipe(Fields):
    """A recipe file. Relative paths are relative to it (to the working folder for a recipe that was made in code)."""

    _document: Document = PrivateAttr()

    # -- reading -------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe; no adapter is opened yet.

        Raises LoralloyError for everything that is wrong in it, each with line:column, the field, what is allowed, and the
        closest name for one that is misspelt.
        """
        return cls._checked(Document.read(Path(path)))

    @classmethod
    def from_dict(cls, data: Any, path: str | os.PathLike[str] | None = None) -> Recipe:
        """A recipe from what a recipe file holds; `path` is what errors name and what relative paths are relative to."""
        return cls._checked(Document(data, Path(path) if path is not None else None))

    def replace(self, **fields: Any) -> Recipe:
        """The recipe with other top-level fields, as they would stand in the file; None removes one."""
        return self._checked(self._document.changed(fields))

    @classmethod
    def _checked(cls, document: Document) -> Recipe:
        data = document.data
        if not isinstance(data, dict):
            raise document.wrong((), f"a recipe is a mapping (`version: 1`, `adapters: ...`), not {named(data)}")
        version = data.get("version")
        if version is None:
            raise document.wrong((), f"no `version`; add `version: {VERSION}` as the first line")
        if type(version) is not int or version != VERSION:
            newer = isinstance(version, int) and version > VERSION
            way = (
                f"it is newer than this loralloy, which reads version {VERSION}; upgrade loralloy"
                if newer
                else f"{named(version)} is no version of recipes; write `version: {VERSION}`"
            )
            raise document.wrong(("version",), way)
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise document.error([problem(item) for item in error.errors()]) from None
        recipe._document = document
        if problems := list(recipe._problems()):
            raise document.error(problems)
        return recipe

    def _problems(self) -> Iterator[Problem]:
        """What the fields' types do not tell: weights, names of rules and parameters, fields that exclude each other."""
        weighted = [e.weight is not None for e in self.adapters]
        if any(weighted) and self.weights is not None:
            n = weighted.index(True)
            yield Problem(
                ("weights",), f"adapters[{n}] has a `weight` too; keep the file or the adapters' weights", True
            )
        elif any(weighted) and not all(weighted):
            n = weighted.index(False)
            yield Problem(
                ("adapters", n),
                "this adapter has no `weight`, and others have; give it one (or none to any: all equal)",
            )
        for n, entry in enumerate(self.adapters):
            if entry.weight is not None:
                try:
                    layerwise.parse(entry.weight)
                except layerwise.SpecError as error:
                    unknown = str(error).startswith("unknown field")
                    yield Problem(("adapters", n, "weight", *error.at), str(error), unknown)
        if self.rank is not None and self.energy is not None:
            yield Problem(
                ("energy",), "`rank` is given too; keep one of them: a number fixes the rank, energy finds it", True
            )
        from ..merging import PLUGINS, RULES
        from ..merging.rule import SPACES

        for field, part in (("rule", self.rule), ("before", self.before), ("after", self.after)):
            if part is not None:
                known: Mapping[str, Part] = (
                    RULES if field == "rule" else {name: p for name, p in PLUGINS.items() if p.when == field}
                )
                yield from _part_problems(field, part, known, {**RULES, **PLUGINS})
        if self.space is not None:
            rule = RULES.get(self.rule.name)
            if self.space not in SPACES:
                allowed = "; ".join(f"{name} ({what})" for name, what in SPACES.items())
                yield Problem(
                    ("space",), f"{self.space!r} is not known{suggest(self.space, list(SPACES))}; give {allowed}"
                )
            elif rule is not None and self.space not in rule.spaces:
                yield Problem(
                    ("space",), f"rule {rule.name} is not defined on {self.space}; give {or_list(list(rule.spaces))}"
                )

    # -- what it stands for --------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """The recipe file, or None for a recipe that was made in code."""
        return self._document.path

    @property
    def folder(self) -> Path:
        """What relative paths are relative to."""
        return self.path.parent if self.path else Path()

    @property
    def out_path(self) -> Path | None:
        """The output folder that the recipe names."""
        return Path(os.path.normpath(self.folder / Path(self.out).expanduser())) if self.out else None

    def wrong(self, at: At, error: Exception | str) -> LoralloyError:
        """An error placed at a field; as it is for a recipe that was made in code."""
        if self.path is None:
            return error if isinstance(error, LoralloyError) else LoralloyError(str(error))
        return self._document.wrong(at, str(error))

    def source(self, n: int) -> tuple[str, bool]:
        """Where the n-th adapter is: a folder (True) or org/name@revision (False)."""
        text = self.adapters[n].path
        local = self.folder / Path(text).expanduser()
        if not local.is_dir() and hub.parse_ref(text)[1] is not None:
            return text, False
        return os.path.normpath(local) if self.path else text, True

    def freed_file(self, n: int) -> Path:
        """The file of directions that the n-th adapter is freed of."""
        entry = self.adapters[n].freed
        assert entry is not None
        return self.folder / Path(entry.path).expanduser()

    def bank(self) -> Bank:
        """Open the adapters, and check that they are of one base model (and of `base`).

        Raises LoralloyError, placed at the adapter, for what :meth:`Adapter.load` and :class:`Bank` refuse.
        """
        opened: dict[str, Adapter] = {}
        for n, entry in enumerate(self.adapters):
            at: At = ("adapters", n, "path") if entry.path != self._document.data["adapters"][n] else ("adapters", n)
            try:
                adapter = Adapter.load(self.source(n)[0], entry.name)
            except LoralloyError as error:
                raise self.wrong(at, error) from None
            if self.path and adapter.name in opened:
                raise self.wrong(at, f"another adapter is called {adapter.name!r} too; give one of them a `name`")
            opened[f"{adapter.name}\0{n}" if adapter.name in opened else adapter.name] = adapter
        try:
            bank = Bank(opened.values(), self.assume_same_base)
        except LoralloyError as error:
            raise self.wrong(("adapters",), error) from None
        if self.base is not None and not self.assume_same_base:
            name, revision = hub.parse_ref(self.base)
            verdict, why = compare(BaseRef(name, revision), bank.base)
            if verdict == "different":
                raise self.wrong(("base",), f"the adapters are of {bank.base}: {why}; correct it, or leave it out")
        return bank

    def parts(self) -> tuple[Rule, Plugin | None, Plugin | None]:
        """The rule, and the plug-ins before and after it, with their parameters bound."""
        from ..merging import get_plugin, get_rule

        before = get_plugin(self.before.name)(**self.before.parameters) if self.before else None
        after = get_plugin(self.after.name)(**self.after.parameters) if self.after else None
        return get_rule(self.rule.name)(**self.rule.parameters), before, after

    def prepare(self, update_lock: bool = False) -> Job:
        """Open the adapters and work out every weight: all that a merge needs.

        Raises LoralloyError for what :meth:`bank` does, for weights that do not fit the adapters' modules, and for an adapter
        that is not the one the recipe was locked to (unless `update_lock`).
        """
        from .job import prepare

        return prepare(self, update_lock)

    def lock(self, bank: Bank | None = None) -> Recipe:
        """The recipe with every adapter's content hash: it merges these adapters again, or refuses."""
        bank = bank or self.bank()
        entries = []
        for n, (entry, name) in enumerate(zip(self.adapters, bank.names, strict=True)):
            data = entry.model_dump(exclude_none=True) | {"name": name, "hash": bank[name].content_hash}
            if entry.freed is not None:
                data["freed"] = {"path": entry.freed.path, "hash": read(self.freed_file(n))[1]}
            entries.append(data)
        return self.replace(adapters=entries)

    # -- writing -------------------------------------------------------------------------------------------------------

    def to_dict(self, folder: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """What the YAML file holds, without fields at their defaults; paths relative to `folder`, where it is given."""
        data = self.model_dump(exclude_defaults=True)
        data["version"], data["rule"] = VERSION, self.rule.model_dump()
        for n, entry in enumerate(data["adapters"]):
            source, local = self.source(n)
            entry["path"] = _relative(source, folder) if local and folder is not None else entry["path"]
            if folder is not None and "freed" in entry:
                entry["freed"]["path"] = _relative(self.freed_file(n), folder)
        if folder is not None:
            if self.weights:
                data["weights"] = _relative(self.folder / Path(self.weights).expanduser(), folder)
            if self.out_path:
                data["out"] = _relative(self.out_path, folder)
        for field in ("rule", "before", "after"):
            if field in data and set(data[field]) == {"name"}:
                data[field] = data[field]["name"]
        if data.get("modules", {}).keys() == {"include"}:
            data["modules"] = data["modules"]["include"]
        return {field: data[field] for field in Fields.model_fields if field in data}

    def to_yaml(self, folder: str | os.PathLike[str] | None = None) -> str:
        """The recipe as YAML, for a file in `folder`; ``Recipe.load`` reads it back."""
        return yaml.dump(self.to_dict(folder), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _part_problems(
    field: str, entry: PartEntry, known: Mapping[str, Part], every: Mapping[str, Part]
) -> Iterator[Problem]:
    """An unknown rule or plug-in, and parameters that it has not got or that are out of range."""
    part = known.get(entry.name)
    what = "rule" if field == "rule" else f"plug-in for `{field}`"
    if part is None:
        other = every.get(entry.name)
        if other is not None:
            home = getattr(other, "when", "rule")
            yield Problem((field,), f"{entry.name} is not a {what}; give it as `{home}`")
        else:
            near = suggest(entry.name, list(known))
            yield Problem((field,), f"there is no {what} {entry.name!r}{near}; give {or_list(list(known))}")
        return
    for name, value in entry.parameters.items():
        if name not in part.parameters:
            has = ", ".join(part.parameters) or "none"
            near = suggest(name, list(part.parameters))
            takers = [other.name for other in every.values() if name in other.parameters]
            for_others = f"; it is for {or_list(takers)}" if takers else ""
            said = f"{part.name} has no such parameter{near}; its parameters: {has}{for_others}"
            yield Problem((field, name), said, True)
            continue
        try:
            part.parameters[name].check(value, part.name)
        except LoralloyError as error:
            yield Problem((field, name), str(error))


def _relative(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> str:
    """`path` as seen from `folder`; absolute where there is no way between (another drive)."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return os.path.abspath(path)


class _Dumper(yaml.SafeDumper):
    """Lists of numbers on one line, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _list(dumper: _Dumper, data: list[Any]) -> yaml.Node:
    flow = bool(data) and all(isinstance(x, int | float) for x in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _list)
