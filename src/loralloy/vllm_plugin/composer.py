"""From a model's name to a folder that vLLM can load: read it, check what vLLM could not serve, merge it once, keep it."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoralloyError
from ..formats import peft_key
from ..serving.by_module import weights_of
from ..serving.grammar import AUTO, BASE, Composition, parse
from .store import REPORT, Store

if TYPE_CHECKING:
    import torch

    from ..adapter import Adapter
    from ..bank import Bank
    from ..merging import Plan

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")  # of init_lora_weights: what vLLM and a bank both take


@dataclass(frozen=True)
class Composed:
    """A composition that vLLM can load from `path`.

    Attributes:
        composition: in the grammar.
        key: of the merged adapter in the cache; None for an adapter of the bank, served as it is.
        merged: whether it was merged now.
        rank: of its modules, at most.
        error: ||dW - dW_exact|| / ||dW_exact||, as stored; 0 for an adapter served as it is.
        cut: what cutting the rule's own result to `rank` lost of it, relative.
        seconds: of the merge.
    """

    composition: str
    path: Path
    key: str | None = None
    merged: bool = False
    rank: int = 0
    error: float | None = 0.0
    cut: float | None = 0.0
    seconds: float = 0.0


class Composer:
    """Merges compositions of a bank to folders.

    Args:
        bank: the adapters.
        store: where merged ones are kept.
        rank: the most that vLLM loads (--max-lora-rank).
        dtype: that vLLM computes adapters in, and so of what is stored; None for the adapters' own.
        make_room: called with the bytes of a merge before it begins.
    """

    def __init__(
        self,
        bank: Bank,
        store: Store,
        rank: int,
        dtype: torch.dtype | None = None,
        make_room: Callable[[int], None] | None = None,
    ) -> None:
        self.bank, self.store, self.rank, self.dtype = bank, store, rank, dtype
        self.make_room = make_room or (lambda _: None)
        self.merges = 0
        self._one = threading.Lock()

    def read(self, name: str) -> Composition:
        """An adapter's exact name, or a composition. Raises LoralloyError for what vLLM cannot be given."""
        if name in self.bank and name not in (AUTO, BASE):
            return Composition(((name, 1.0),))
        made = parse(name)
        for term, _ in made.terms:
            if term not in self.bank:
                known = ", ".join(self.bank.names[:20]) + (", ..." if len(self.bank) > 20 else "")
                shown = term if len(term) <= 200 else term[:197] + "..."
                raise LoralloyError(f"there is no adapter {shown!r} in this bank; it has {known}")
        if made.auto:
            raise LoralloyError("auto is routed by `loralloy front`, not by vLLM; ask there, or name adapters")
        if not made.terms:
            raise LoralloyError("base is vLLM's own model: ask for it by the name that /v1/models gives it")
        return made

    def ready(self, name: str) -> Composed | None:
        """The composition if nothing has to be merged for it; it is held then."""
        made = self.read(name)
        if (alone := self.alone(made)) is not None:
            return alone
        key = self.key(self.plan(made))
        if not self.store.hold(key):
            return None
        try:
            return self._kept(made, key)
        except FileNotFoundError:  # let go of and deleted at this moment (see lending)
            return None

    def compose(self, name: str) -> Composed:
        """The composition, merged now if it has to be; it is held.

        Raises LoralloyError for what cannot be read, merged, stored, or loaded by vLLM.
        """
        made = self.read(name)
        if (alone := self.alone(made)) is not None:
            return alone
        plan = self.plan(made)
        key, start = self.key(plan), time.perf_counter()
        said = len(str(made)) + len(json.dumps(plan.weights.to_dict()["weights"]))
        size = plan.bytes_out + 512 * len(plan.modules) + (16 << 10) + 4 * said  # headers, the card, the report
        with self._one:  # torch's threads are all that a merge can use
            if not self.store.has(key):
                self.make_room(size)
            new = self.store.take(key, size, lambda folder: self._merge(made, plan, key, folder))
            self.merges += new
        found = self._kept(made, key)
        return replace(found, merged=True, seconds=time.perf_counter() - start) if new else found

    def plan(self, made: Composition) -> Plan:
        """What a merge of it will do. Raises LoralloyError for what vLLM could not load, or the rule not merge."""
        from ..merging import make_plan

        for name, _ in made.terms:
            _check_loadable(self.bank[name])
        if type(made.rank) is int and made.rank > self.rank:
            raise LoralloyError(
                f"rank={made.rank} is more than vLLM was started with; it takes {self.rank} (--max-lora-rank)"
            )
        rank: Any = self.rank if made.rank in (None, "full") else made.rank
        if rank == "max":
            rank = min(self.rank, max(self.bank[name].max_rank for name, _ in made.terms))
        weights = weights_of(self.bank, made.terms)
        return make_plan(self.bank, weights, made.bound, made.space, rank, self.dtype, name=str(made))  # type: ignore[arg-type]

    def key(self, plan: Plan) -> str:
        """A hash of all that the merged adapter depends on: the adapters' contents, weights, rule, space, rank, dtype."""
        weights = plan.weights.to_dict()["weights"]
        terms = sorted(
            ([p.content_hash, weights[p.name]] for p in plan.parents),
            key=lambda term: (term[0], json.dumps(term[1], sort_keys=True)),
        )
        said = json.dumps(
            ["vllm", 1, terms, str(plan.rule), plan.space, str(plan.rank), str(plan.dtype)], sort_keys=True
        )
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def alone(self, made: Composition) -> Composed | None:
        """An adapter of the bank that is asked for as it is, and that vLLM can load as it is; any other is written anew."""
        (name, weight), *more = made.terms
        if more or weight != 1.0 or str(made) != str(Composition(made.terms)):
            return None
        adapter = self.bank[name]
        _check_loadable(adapter)
        if adapter.max_rank > self.rank or adapter.path is None:
            return None
        folder = adapter.path.absolute()
        if not all((folder / file).is_file() for file in _FILES) or not _read_by_vllm(adapter, folder, self.rank):
            return None
        return Composed(str(made), folder, rank=adapter.max_rank)

    def _merge(self, made: Composition, plan: Plan, key: str, folder: Path) -> None:
        from ..merging import run
        from ..saving import write_adapter

        start = time.perf_counter()
        done = run(plan, self.bank)
        write_adapter(done.adapter, folder, None)
        report = done.report
        said = {
            "version": 1,
            "key": key,
            "composition": str(made),
            "weights": plan.weights.to_dict()["weights"],
            "rule": str(plan.rule),
            "space": plan.space,
            "rank": done.adapter.max_rank,
            "dtype": report.dtype,
            "error": _finite(report.error),
            "error_before_cast": _finite(report.error_before_cast),
            "cut": _finite(report.cut),
            "worst": dict(report.worst(3)),
            "notes": list(report.notes),
            "seconds": round(time.perf_counter() - start, 3),
        }
        (folder / REPORT).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _kept(self, made: Composition, key: str) -> Composed:
        path = self.store.path(key)
        said = json.loads((path / REPORT).read_text(encoding="utf-8"))
        return Composed(str(made), path, key, rank=said["rank"], error=said["error"], cut=said["cut"])


def described(composed: Composed) -> dict[str, Any]:
    """For a log or a terminal."""
    return asdict(composed) | {"path": str(composed.path)}


def _check_loadable(adapter: Adapter) -> None:
    """Raises LoralloyError for what vLLM's LoRA layers have no place for (a bank has refused DoRA and biases already)."""
    if whole := adapter.extra or adapter.config.modules_to_save:
        raise LoralloyError(
            f"adapter {adapter.name!r} also saves whole tensors ({', '.join(whole[:3])}), which vLLM does not load; use "
            "`loralloy serve`, or train it without modules_to_save"
        )
    for module in adapter:
        if (kind := adapter.outline(module).kind) != "linear":
            raise LoralloyError(
                f"adapter {adapter.name!r} has {module!r}, of kind {kind}; this plugin gives vLLM adapters of linear layers alone"
            )


def _read_by_vllm(adapter: Adapter, folder: Path, rank: int) -> bool:
    """Whether vLLM takes these files as they are (``PEFTHelper`` and ``parse_fine_tuned_lora_name`` in vllm/lora): a bank
    also reads other names of tensors, and configurations in which a field is left to its default."""
    from safetensors import safe_open

    said = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))
    with safe_open(str(folder / _FILES[1]), framework="pt") as file:
        named = set(file.keys()) == {peft_key(module, side, "linear") for module in adapter for side in "AB"}
    ranks, init = [said.get("r"), *(said.get("rank_pattern") or {}).values()], said.get("init_lora_weights")
    return (
        named
        and all(said.get(field) is not None for field in ("lora_alpha", "target_modules"))
        and all(type(r) is int and r <= rank for r in ranks)
        and (not isinstance(init, str) or init.lower() in _PLAIN_INITS)
    )


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
