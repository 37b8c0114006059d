"""Where in the model a composition acts: ||w_i dW_i||_F of each adapter, by layer and projection."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

from ..errors import LoralloyError
from ..factors import LoraFactors, inner, norm, weighted_sum
from ..layerwise import group_of, layer_of
from .compositions import Compositions, Ready
from .engine import Busy
from .grammar import Composition
from .schemas import LayerPart, LayersReport, Table

# The order in which a transformer block uses them; others follow by name.
_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Grid:
    """Modules as a table: a row is a layer (or a module outside the layers), a column the last part of a module's name."""

    layers: list[str]
    projections: list[str]
    cells: dict[str, tuple[int, int]]

    @staticmethod
    def of(modules: Iterable[str]) -> Grid:
        modules = list(modules)
        groups = {module: group_of(module, "layer") for module in modules}
        stacks = {groups[m].rpartition(".")[0] for m in modules if layer_of(m) is not None}

        def place(module: str) -> tuple[str, int, str]:
            """Layers in their order, stack by stack; modules outside them last."""
            layer = layer_of(module)
            return ("\uffff", 0, module) if layer is None else (groups[module].rpartition(".")[0], layer, "")

        names = {}
        for module in sorted(modules, key=place):
            layer = layer_of(module)
            names[groups[module]] = groups[module] if layer is None or len(stacks) > 1 else str(layer)
        columns = sorted(
            {m.rpartition(".")[2] for m in modules}, key=lambda c: (_ORDER.index(c) if c in _ORDER else len(_ORDER), c)
        )
        rows = list(names)
        cells = {m: (rows.index(groups[m]), columns.index(m.rpartition(".")[2])) for m in modules}
        return Grid(list(names.values()), columns, cells)

    def table(self, norms: Mapping[str, float]) -> Table:
        """Norms by module as rows of cells. Modules that share a cell (experts) count together, as one matrix would: the
        root of the sum of squares. None where there is no module."""
        squares: list[list[float | None]] = [[None] * len(self.projections) for _ in self.layers]
        for module, value in norms.items():
            row, column = self.cells[module]
            squares[row][column] = (squares[row][column] or 0.0) + value * value
        return [[None if s is None else math.sqrt(s) for s in row] for row in squares]


class LayerNorms:
    """Measures compositions, one after the other, in a thread: it reads adapters, and takes time from the decoder.

    Args:
        compositions: of the bank.
        seconds: the most that one may take.
        max_waiting: how many may wait.
    """

    def __init__(self, compositions: Compositions, seconds: float = 300.0, max_waiting: int = 16) -> None:
        self.compositions, self.seconds, self.max_waiting = compositions, seconds, max_waiting
        self._pool = ThreadPoolExecutor(1, "layers")
        self._open = 0

    async def measure(self, model: str | Composition, prepare: bool = False) -> LayersReport:
        """The norms of a composition's parts and of what answers under it; a merge is made only with `prepare`.

        Raises what the grammar, the bank and the merge raise, Busy when too many wait, TimeoutError.
        """
        asked = await self.compositions.asked(model)
        if asked.auto:
            raise LoralloyError("auto is composed for each request; give the composition that an answer names")
        if self._open >= self.max_waiting:
            raise Busy(f"{self._open} compositions wait to be measured", 2)
        self._open += 1
        gone = Event()
        try:
            return await asyncio.wait_for(self._measure(asked, prepare, gone.is_set), self.seconds)
        finally:
            gone.set()  # a thread that goes on for nobody stops at its next module
            self._open -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _measure(self, asked: Composition, prepare: bool, gone: Callable[[], bool]) -> LayersReport:
        async with self.compositions.use(asked, merge=prepare) as ready:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._report, ready, gone)

    def _report(self, ready: Ready, gone: Callable[[], bool]) -> LayersReport:
        bank, terms = self.compositions.bank, ready.composition.terms
        grid = Grid.of(dict.fromkeys(m for name, _ in terms for m in bank[name]))
        parts = {name: weight.spec for name, weight in ready.composition.by_module.items()}
        norms: dict[str, dict[str, float]] = {name: {} for name, _ in terms}
        total: dict[str, float] = {}
        for module in grid.cells:
            if gone():
                raise TimeoutError
            having = [name for name, _ in terms if module in bank[name]]
            present = [(name, ready.given.of(name, module), bank[name][module]) for name in having]
            for name, w, f in present:
                norms[name][module] = abs(w) * math.sqrt(max(0.0, inner(f, f)))
            if ready.cache == "live":
                total[module] = norm(weighted_sum([f for _, _, f in present], [w for _, w, _ in present]))
        if ready.key is not None and ready.cache != "cold":
            total = self._merged(ready)
        return LayersReport(
            composition=str(ready.composition),
            rule=str(ready.composition.bound),
            cache=ready.cache,
            layers=grid.layers,
            projections=grid.projections,
            adapters=[
                LayerPart(adapter=n, weight=ready.given.of(n), by_module=parts.get(n), norms=grid.table(norms[n]))
                for n, _ in terms
            ],
            total=None if ready.cache == "cold" else grid.table(total),
        )

    def _merged(self, ready: Ready) -> dict[str, float]:
        """Of the merged adapter as rows use it: in the model's dtype."""
        live = self.compositions.live
        loaded = live.load(ready.weights.names[0])
        return {m: norm(LoraFactors(a.flatten(1), b.flatten(1))) for m, (a, b) in loaded.items()}
