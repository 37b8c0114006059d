"""The protocol: for each arriving domain train an adapter from the base, remember a few rows, relearn, merge, evaluate.

What is evaluated is the merged adapter as it was written to disk. Everything is kept under the output folder, in folders
that appear whole, so that a run killed at any point goes on where it was:

    plan.json                 the runs, and which experiences each is made of
    adapters/<domain>-seed0-<key>/    one adapter a domain and seed; and the joint and sequential ones
    buffers/<key>/            memory buffers
    experiences/<key>/        result.json, weights.json (and merged/, with `keep_merged`)
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..adapter import Adapter
from ..atomic import atomic_file, atomic_folder, recover
from ..bank import Bank
from ..console import console
from ..errors import LoralloyError
from ..training.lock import locked
from .adapt import Adapted, Held, adapt
from .buffer import BufferRow, MemoryBuffer
from .experience import DomainStream
from .plan import AdapterJob, BufferJob, Plan, Step, make_plan
from .workshop import Evaluation, Workshop, composed, make_workshop

PLAN, RESULT, WEIGHTS = "plan.json", "result.json", "weights.json"


def run(stream: DomainStream, workshop: Workshop | None = None) -> Plan:
    """Compute what of a stream is not there yet; returns the plan, whose results are then all on disk.

    workshop: of the stream's kind where it is None.
    Raises LoralloyError when another run holds the output folder, and, after all others have been computed, for
    experiences that failed, naming the first. Ctrl-C leaves whole folders only; the same call goes on.
    """
    stream.out.mkdir(parents=True, exist_ok=True)
    with locked(stream.out):
        _tidy(stream.out)
        workshop = workshop or make_workshop(stream)
        plan = make_plan(stream, workshop)
        atomic_file(stream.out / PLAN, json.dumps(_described(stream, plan), indent=1) + "\n")
        runner = Runner(stream, workshop)
        todo = [step for step in plan.steps.values() if not (runner.folder(step) / RESULT).is_file()]
        if len(todo) < len(plan.steps):
            console.print(f"{len(plan.steps) - len(todo)} of {len(plan.steps)} experiences are there already")
        failed: list[str] = []
        try:
            for n, step in enumerate(todo, 1):
                start = time.perf_counter()
                try:
                    result = runner.compute(step)
                except LoralloyError as error:
                    failed.append(f"{_told(step)}: {error}")
                    console.print(f"[{n}/{len(todo)}] {failed[-1]}", style="red", markup=False, soft_wrap=True)
                    continue
                mean = sum(d["accuracy"] for d in result["domains"].values()) / len(result["domains"])
                said = f"{_told(step)}: accuracy {mean:.3f} over {len(result['domains'])}"
                took = time.perf_counter() - start
                console.print(f"[{n}/{len(todo)}] {said}, {took:.1f} s", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(f"stopped; what is done is in {stream.out}: the same command goes on from it", soft_wrap=True)
            raise
        finally:
            runner.held.drop()
        if failed:
            raise LoralloyError(
                f"{len(failed)} of {len(todo)} experiences failed, the others are done; the first: {failed[0]}"
            )
        return plan


def _tidy(out: Path) -> None:
    """Finish or remove what killed runs left: temporary folders beside those that they were to become."""
    for room in ("adapters", "buffers", "experiences"):
        for left in (out / room).glob(".*-*-*"):
            name = left.name[1:].rsplit(".", 1)[0]
            recover(out / room / name)


def _described(stream: DomainStream, plan: Plan) -> dict[str, Any]:
    return {
        "version": 1, "loralloy": __version__, "title": stream.fields.title, "kind": stream.fields.kind,
        "model": stream.fields.model, "experiences": stream.names,
        "stream": stream.fields.model_dump(mode="json"), "runs": plan.to_dict(),
    }  # fmt: skip


def _told(step: Step) -> str:
    parts = [f"seed {step.seed}", "+".join(step.arrived) if step.strategy else "base"]
    return ", ".join(parts + [x.name for x in (step.merge, step.strategy) if x is not None])


@dataclass
class Runner:
    """Computes steps, and on the way the adapters and buffers they need."""

    stream: DomainStream
    workshop: Workshop
    held: Held = field(init=False)

    def __post_init__(self) -> None:
        self.held = Held(self.workshop)
        self._bank: tuple[dict[str, Path], Bank] | None = None

    def folder(self, step: Step) -> Path:
        return self.stream.out / "experiences" / step.key

    def adapter(self, job: AdapterJob) -> Path:
        """The folder of an adapter; it is trained unless it is there."""
        out = self.stream.out / "adapters" / job.folder
        if out.is_dir():
            return out
        init = None if job.init is None else self.adapter(job.init)
        self.workshop.begin(job.seed, None if job.lead is None else self.adapter(job.lead))
        self.held.drop()  # its hooks must not be in the model that is trained
        out.parent.mkdir(parents=True, exist_ok=True)
        self.workshop.train([self.workshop.experiences[name] for name in job.domains], out, job.seed, init)
        if not out.is_dir():
            raise LoralloyError(f"{out}: the training left no adapter there")
        return out

    def buffer(self, job: BufferJob) -> MemoryBuffer:
        """The buffer after these domains; restored if it is there."""
        folder = self.stream.out / "buffers" / job.key
        if folder.is_dir():
            return MemoryBuffer.restore(folder)
        entry = job.settings
        buffer = MemoryBuffer(entry.per_class, entry.total, entry.selection, job.seed)
        for name in job.domains:
            experience = self.workshop.experiences[name]
            ids, labels = self.workshop.labels(experience, "train")
            features = self.workshop.features(experience, ids) if entry.selection == "herding" else None
            buffer.add(name, ids, labels, features, self.workshop.rows(experience, ids))
        buffer.save(folder, overwrite=True)
        return buffer

    def compute(self, step: Step) -> dict[str, Any]:
        """One experience of one strategy, written to its folder."""
        start = time.perf_counter()
        folders = {job.domains[0] if len(job.domains) == 1 else job.folder: self.adapter(job) for job in step.adapters}
        lead = None if step.lead is None else self.adapter(step.lead)
        seconds = {"train": time.perf_counter() - start}
        rows: Sequence[BufferRow] = [] if step.buffer is None else self.buffer(step.buffer).rows
        self.workshop.begin(step.seed, lead)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with atomic_folder(self.folder(step), overwrite=True) as new:
            result: dict[str, Any] = {
                "version": 1, "seed": step.seed, "arrived": list(step.arrived), "buffer_rows": len(rows),
                "strategy": step.strategy and step.strategy.settings, "merge": step.merge and step.merge.settings,
                "adapters": {name: folder.name for name, folder in folders.items()},
                "bytes": sum(f.stat().st_size for folder in folders.values() for f in folder.glob("*.safetensors")),
            }  # fmt: skip
            if step.merge is not None and step.strategy is not None:
                result |= self._merged(step, folders, rows, new, seconds)
            else:
                own = next(iter(folders.values()), None)
                saved = own if step.adapters and len(step.adapters[0].domains) > 1 else None
                result["domains"] = self._evaluate(step, own, rows, seconds, saved)
            result |= {"seconds": seconds, "memory": _memory()}
            (new / RESULT).write_text(json.dumps(result) + "\n", encoding="utf-8")
        return result

    def _merged(
        self, step: Step, folders: dict[str, Path], rows: Sequence[BufferRow], new: Path, seconds: dict[str, float]
    ) -> dict[str, Any]:
        from ..merging import merge

        assert step.strategy is not None and step.merge is not None
        if self._bank is None or self._bank[0] != folders:  # strategies follow each other on one bank: read it once
            self._bank = folders, Bank([Adapter.load(folder, name) for name, folder in folders.items()])
        bank = self._bank[1]
        start = time.perf_counter()
        adapted = adapt(step.strategy, step.merge, bank, step.arrived, rows, self.workshop, self.held, step.seed)
        seconds["learn"] = time.perf_counter() - start
        found: dict[str, Any] = {"record": dict(adapted.record)}
        if self.stream.fields.uncut:
            found["uncut"] = self._uncut(adapted, step, rows)
        start = time.perf_counter()
        device = next(self.workshop.model.parameters()).device
        out = new / "merged"
        report = merge(
            adapted.bank, adapted.weights, step.merge.rule, step.merge.space, step.merge.rank,  # type: ignore[arg-type]
            device=device, measure="estimate", out=out,
        ).report  # fmt: skip
        seconds["merge"] = time.perf_counter() - start
        if step.strategy.balance:
            start = time.perf_counter()
            found["balance"] = self._balance(out, rows)
            seconds["balance"] = time.perf_counter() - start
        adapted.weights.save(new / WEIGHTS)
        cut, error = report.cut, report.error
        found |= {
            "weights": dict(adapted.weights.items()), "per_module": adapted.weights.per_module,
            "cut": cut if math.isfinite(cut) else None, "error": error if math.isfinite(error) else None,
            "rank": report.rank, "notes": list(report.notes),
        }  # fmt: skip
        found["domains"] = self._evaluate(step, out, rows, seconds, None)
        if not self.stream.fields.keep_merged:
            shutil.rmtree(out)
        return found

    def _balance(self, folder: Path, rows: Sequence[BufferRow]) -> dict[str, Any]:
        """The merged adapter in a folder, balanced over the buffer's inputs, in its place."""
        from ..weighting.balance import balance, marked

        self.held.drop()
        answering = self.workshop.answering(rows)
        merged = Adapter.load(folder, "merged")
        try:
            done = balance(self.workshop.model, merged, answering.run, answering.directions, at=answering.at)
        except LoralloyError as error:
            raise error.within("`balance`") from None
        marked(done).save(folder, overwrite=True)
        return {"module": done.module, "before": done.before, "after": done.after, "passes": done.passes}

    def _uncut(self, adapted: Adapted, step: Step, rows: Sequence[BufferRow]) -> dict[str, Any]:
        """The rule's own result, before the cut and the cast to a file."""
        from ..weighting.candidates import Candidates, can_learn

        assert step.merge is not None
        live = self.held.get(adapted.bank, step.merge) if can_learn(step.merge.rule, step.merge.space) else None
        candidates = Candidates(
            self.workshop.model,
            adapted.bank,
            step.merge.rule,
            step.merge.space,
            base=self.workshop.base,
            learnable=live,
        )
        try:
            with candidates.at(adapted.weights):
                self.workshop.after_merge(rows)
                return self._scores(step)
        finally:
            candidates.remove()

    def _evaluate(
        self, step: Step, folder: Path | None, rows: Sequence[BufferRow], seconds: dict[str, float], saved: Path | None
    ) -> dict[str, Any]:
        start = time.perf_counter()
        self.held.rest()
        with composed(self.workshop, folder):
            self.workshop.after_merge(rows, saved)
            found = self._scores(step)
        seconds["evaluate"] = time.perf_counter() - start
        return found

    def _scores(self, step: Step) -> dict[str, Any]:
        return {name: _score(self.workshop.evaluate(self.workshop.experiences[name])) for name in step.evaluated}


def _score(evaluation: Evaluation) -> dict[str, Any]:
    """Accuracy, and the row-by-row answers as a text of 0 and 1."""
    bits = "".join("1" if right else "0" for right in evaluation.correct)
    return {"accuracy": evaluation.accuracy, "n": len(bits), "correct": bits}


def _memory() -> int:
    """Peak bytes: of the GPU since the step began; without one, of the process in all its life."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
