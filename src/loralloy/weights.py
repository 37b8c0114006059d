"""Weights: how much of each adapter, for a whole adapter or module by module. Plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from .atomic import atomic_file
from .errors import LoralloyError

VERSION = 1
Coefficient: TypeAlias = "float | Mapping[str, float]"


@dataclass(frozen=True)
class Weights:
    """adapter -> coefficient, or adapter -> {module -> coefficient}.

    A module that a per-module mapping does not name takes its ``"*"`` entry, else 0. Coefficients may be negative and need
    not sum to 1. `source` says which strategy made them; `explain` holds what it has to show for it (a retrieved weight:
    ``explain["neighbours"]``, a list of ``{"id", "task", "distance", "text"}``).

    Raises LoralloyError for an empty mapping or a coefficient that is not a finite number.
    """

    coefficients: Mapping[str, Coefficient]
    source: str = "given"
    explain: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.coefficients:
            raise LoralloyError("weights are empty; name at least one adapter")
        for adapter, value in self.coefficients.items():
            entries = value.items() if isinstance(value, Mapping) else [("", value)]
            for module, w in entries:
                if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w):
                    where = f"adapter {adapter!r}" + (f", module {module!r}" if module else "")
                    raise LoralloyError(f"weight of {where} is {w!r}; it must be a finite number")

    @property
    def names(self) -> list[str]:
        """The adapters, in the order given."""
        return list(self.coefficients)

    @property
    def per_module(self) -> bool:
        return any(isinstance(value, Mapping) for value in self.coefficients.values())

    def of(self, adapter: str, module: str | None = None) -> float:
        """The coefficient of `adapter` at `module`; 0.0 for an adapter that is not named.

        Without a module, a per-module adapter answers with the mean of its coefficients (what a bar shows).
        """
        value = self.coefficients.get(adapter, 0.0)
        if not isinstance(value, Mapping):
            return float(value)
        if module is None:
            return sum(value.values()) / len(value) if value else 0.0
        return float(value.get(module, value.get("*", 0.0)))

    def items(self) -> Iterator[tuple[str, float]]:
        for name in self.coefficients:
            yield name, self.of(name)

    def learned_for_other(self, rule: str, space: str) -> str | None:
        """What these weights were learned for (rule and space, as `loralloy learn` wrote them), where that is something else."""
        made = self.explain.get("learned")
        if not isinstance(made, Mapping) or not made.get("rule"):
            return None
        sums = ("linear", "cat", "svd")  # one and the same dW
        was, now = (
            (f"{r} in {s} space", "sum" if r in sums else r, s)
            for r, s in ((made["rule"], made.get("space")), (rule, space))
        )
        return None if was[1:] == now[1:] else f"these weights were learned for {was[0]}, and are used with {now[0]}"

    def normalised(self) -> Weights:
        """Divided by the sum, so that they sum to 1 (whole-adapter weights only)."""
        if self.per_module:
            raise LoralloyError("per-module weights cannot be normalised as one; normalise them per module first")
        total = sum(w for _, w in self.items())
        if abs(total) < 1e-12:
            raise LoralloyError("the weights sum to 0, so they cannot be normalised")
        return Weights({name: w / total for name, w in self.items()}, self.source, self.explain)

    def by_names(self, names: Mapping[str, Mapping[str, str]]) -> Weights:
        """The same weights with modules called otherwise: adapter -> {module -> its new name}; those not named keep theirs.

        Raises LoralloyError where two modules of an adapter would be one.
        """
        made = dict(self.coefficients)
        for adapter, new in names.items():
            value = made.get(adapter)
            if not isinstance(value, Mapping):
                continue
            renamed: dict[str, float] = {}
            for module, w in value.items():
                if (name := new.get(module, module)) in renamed:
                    raise LoralloyError(
                        f"weights of adapter {adapter!r} name module {name!r} twice, also as another version of transformers "
                        "calls it; leave one out"
                    )
                renamed[name] = w
            made[adapter] = renamed
        return replace(self, coefficients=made)

    @staticmethod
    def uniform(names: Iterable[str]) -> Weights:
        """1/n for each of n adapters."""
        names = list(names)
        return Weights({name: 1.0 / len(names) for name in names}, "uniform")

    # -- on disk -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        coefficients = {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.coefficients.items()}
        result: dict[str, Any] = {"version": VERSION, "source": self.source, "weights": coefficients}
        return result | ({"explain": self.explain} if self.explain else {})

    @staticmethod
    def from_dict(data: Any, where: str = "weights") -> Weights:
        if not isinstance(data, Mapping) or type(data.get("version")) is not int or data["version"] != VERSION:
            found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
            raise LoralloyError(f"{where}: expected `version: {VERSION}`, found {found!r}")
        unknown = set(data) - {"version", "source", "weights", "explain"}
        if unknown:
            raise LoralloyError(
                f"{where}: unknown field {sorted(unknown)[0]!r}; known: version, source, weights, explain"
            )
        if not isinstance(data.get("weights"), Mapping):
            raise LoralloyError(f"{where}: field 'weights' must map each adapter to a number or to {{module: number}}")
        explain = data.get("explain") or {}
        if not isinstance(explain, Mapping):
            raise LoralloyError(f"{where}: field 'explain' must be a mapping, found {type(explain).__name__}")
        try:
            return Weights(data["weights"], str(data.get("source", "given")), dict(explain))
        except LoralloyError as error:
            raise error.within(where) from None

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a weights file (JSON, ``version: 1``)."""
        atomic_file(path, json.dumps(self.to_dict(), indent=2) + "\n", overwrite)

    @staticmethod
    def load(path: str | Path) -> Weights:
        """Read a weights file. Raises LoralloyError naming the file and the field that is wrong."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LoralloyError(f"{path}: no such weights file") from None
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise LoralloyError(f"{path}: not a JSON weights file ({error})") from None
        return Weights.from_dict(data, str(path))

    # -- to look at ----------------------------------------------------------------------------------------------------

    def __rich__(self) -> Any:
        """One bar an adapter, the largest first; negative weights in red."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        rows = sorted(self.items(), key=lambda item: -abs(item[1]))
        top = max((abs(w) for _, w in rows), default=1.0) or 1.0
        for name, w in rows:
            bar = Text("█" * max(1, round(28 * abs(w) / top)) if w else "", style="red" if w < 0 else "cyan")
            table.add_row(Text(name, style="bold"), f"{w:.3f}", bar)
        return table

    def plot(self, path: str | Path) -> None:
        """Save a picture: bars for whole-adapter weights, a heat map (adapter by module) for per-module ones."""
        try:
            import matplotlib
        except ImportError:
            raise LoralloyError("a picture needs matplotlib: pip install 'loralloy[plots]'") from None

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = self.names
        modules = list(dict.fromkeys(m for v in self.coefficients.values() if isinstance(v, Mapping) for m in v))
        if not modules:
            figure, axes = plt.subplots(figsize=(6, 0.4 * len(names) + 1))
            axes.barh(names[::-1], [self.of(n) for n in names[::-1]], color="#2a7f9e")
            axes.set_xlabel("weight")
        else:
            figure, axes = plt.subplots(figsize=(max(6.0, 0.06 * len(modules)), 0.4 * len(names) + 1.5))
            image = axes.imshow([[self.of(n, m) for m in modules] for n in names], aspect="auto", cmap="viridis")
            axes.set_yticks(range(len(names)), names)
            axes.set_xlabel("module")
            figure.colorbar(image, label="weight")
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)
