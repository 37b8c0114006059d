"""Part a of the serving benchmark: decode throughput of rows of different compositions, beside PEFT and the bare base."""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

from loralloy.live import LiveModel
from loralloy.live.paged import PagedModel
from loralloy.serving.rows import Row
from loralloy.serving.sampling import Sampling
from loralloy.serving.scheduler import Scheduler
from loralloy.weights import Weights
from serving_world import (
    Clock,
    alternate,
    bank_of,
    compositions,
    decode,
    load,
    peft_layers,
    peft_model,
    prompts,
    random_adapters,
    said,
    sync,
    twin,
)  # fmt: skip

OURS, OURS_ONE, SERVED = "ours, each row its own 4 of 16", "ours, one adapter a row", "ours, the server's scheduler"
SERVED_ONE = "ours, the server's scheduler, one adapter a row"
ONE, MIXED, BASE = "PEFT, one adapter for all", "PEFT, adapter_names", "the bare base"


class World:
    """All contenders on copies of one model."""

    def __init__(self, given: Any, dtype: str, clock: Clock) -> None:
        self.device, self.rows, self.tokens = given.device, given.rows, given.tokens
        model, self.tokenizer, self.what = load(given.model, given.device, dtype)
        adapters = random_adapters(model, given.adapters, given.rank, given.seed)
        bank = bank_of(adapters)
        self.names = bank.names
        self.weights = compositions(given.rows, bank.names, given.used, given.seed)
        self.single = [bank.names[i % len(bank.names)] for i in range(given.rows)]
        self.each_one = [Weights({name: 1.0}) for name in self.single]
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.prompts = prompts(given.rows, 8, 64, vocabulary, given.seed)
        self.peft = peft_model(model, adapters)
        said(f"{dtype}: PEFT has its {len(adapters)} adapters", clock)
        self.base = model.requires_grad_(False)
        self.live = LiveModel(twin(model), bank)
        self.paged = PagedModel(twin(model), bank)
        self.seconds = 0.0
        self.scheduler = Scheduler(
            self.paged.model, self.tokenizer, self.paged, max_rows=given.rows, on_step=self._stepped
        )
        self.scheduler.ends = set()

    def _stepped(self, kind: str, rows: int, seconds: float) -> None:
        if kind == "decode":
            self.seconds += seconds

    def rate(self, seconds: float) -> float:
        return self.rows * self.tokens / seconds

    # -- contenders: tokens a second while decoding --------------------------------------------------------------------

    def ours(self, weights: Any = None) -> float:
        with self.live.compose(weights or self.weights) as model:
            return self.rate(decode(model, self.prompts, self.tokens, self.device)[1])

    def ours_one(self) -> float:
        return self.ours(self.each_one)

    def served_one(self) -> float:
        return self.served(self.each_one)

    def served(self, each: Any = None) -> float:
        self.seconds = 0.0
        sampling = Sampling(max_tokens=self.tokens + 1)
        for ids, weights in zip(self.prompts, each or self.weights, strict=True):
            self.scheduler.submit(Row(list(ids), weights, sampling, lambda event: None))
        while not self.scheduler.idle:
            self.scheduler.step()
        return self.rate(self.seconds)

    def peft_one(self) -> float:
        self.peft.set_adapter(self.names[0])
        return self.rate(decode(self.peft.base_model.model, self.prompts, self.tokens, self.device)[1])

    def peft_mixed(self) -> float:
        with self.peft.base_model._enable_peft_forward_hooks(adapter_names=self.single):
            return self.rate(decode(self.peft.base_model.model, self.prompts, self.tokens, self.device)[1])

    def bare(self) -> float:
        return self.rate(decode(self.base, self.prompts, self.tokens, self.device)[1])

    # -- whole requests ------------------------------------------------------------------------------------------------

    def ours_whole(self) -> float:
        """Seconds from weights and prompts to all rows' tokens."""
        start = time.perf_counter()
        with self.live.compose(self.weights) as model:
            decode(model, self.prompts, self.tokens, self.device)
        return time.perf_counter() - start

    def merged(self, row: int, kind: str) -> float:
        """Seconds of one row's request in PEFT: merge its adapters, decode it alone, forget the merged one."""
        start = time.perf_counter()
        weights = self.weights[row]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.peft.add_weighted_adapter(
                weights.names, [w for _, w in weights.items()], "request", combination_type=kind
            )
        self.peft.set_adapter("request")
        decode(self.peft.base_model.model, [self.prompts[row]], self.tokens, self.device)
        self.peft.delete_adapter("request")
        sync(self.device)
        return time.perf_counter() - start

    def active(self, row: int) -> float:
        """The same without a merge: PEFT adds the outputs of several active adapters, whose scalings are the weights."""
        start = time.perf_counter()
        weights, layers = self.weights[row], list(peft_layers(self.peft).values())
        before = {n: layers[0].scaling[n] for n in weights.names}
        for layer in layers:
            for name, w in weights.items():
                layer.scaling[name] = before[name] * w
        self.peft.base_model.set_adapter(weights.names)
        decode(self.peft.base_model.model, [self.prompts[row]], self.tokens, self.device)
        for layer in layers:
            layer.scaling.update(before)
        sync(self.device)
        return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "runs": len(values)}


def run(given: Any, dtype: str, clock: Clock, reserve: float) -> dict[str, Any]:
    """The figures of one dtype; `reserve`: seconds to leave for what comes after."""
    world = World(given, dtype, clock)
    contenders = {
        OURS: world.ours, SERVED: world.served, ONE: world.peft_one, BASE: world.bare, OURS_ONE: world.ours_one,
    }  # fmt: skip
    own = (clock.left - reserve) * 0.45
    runs = alternate(contenders, given.repeats, clock, clock.left - own)
    said(f"{dtype}: {len(runs[OURS])} repeats of the first five", clock)
    found: dict[str, Any] = {"model": world.what, "speed": {name: spread(v) for name, v in runs.items()}}
    found["ratios"] = {
        "one adapter in PEFT": spread([a / b for a, b in zip(runs[OURS], runs[ONE], strict=True)]),
        "one adapter in PEFT, from the scheduler": spread(
            [a / b for a, b in zip(runs[SERVED], runs[ONE], strict=True)]
        ),
        "the bare base": spread([a / b for a, b in zip(runs[OURS], runs[BASE], strict=True)]),
    }
    tokens, world.tokens = world.tokens, max(8, world.tokens // 16)  # a slow one, and its rate hardly depends on it
    alike = {MIXED: world.peft_mixed, OURS_ONE: world.ours_one, SERVED_ONE: world.served_one}
    pairs = alternate(alike, min(5, given.repeats), clock, reserve + 20)
    world.tokens = tokens
    found["speed"] |= {name: spread(pairs[name]) for name in (MIXED, SERVED_ONE)}
    for name, what in (
        (OURS_ONE, "PEFT's adapter_names, one adapter a row"),
        (SERVED_ONE, "the same, from the scheduler"),
    ):
        found["ratios"][what] = spread([a / b for a, b in zip(pairs[name], pairs[MIXED], strict=True)])
    said(f"{dtype}: adapter_names", clock)
    whole = [world.ours_whole() for _ in range(3)]
    ways = {
        "cat": lambda r: world.merged(r, "cat"),
        "linear": lambda r: world.merged(r, "linear"),
        "active": world.active,
    }
    each: dict[str, list[float]] = {name: [] for name in ways}
    for row in range(given.merged_rows + 1):
        begun = time.perf_counter()
        for name, way in ways.items():
            seconds = way(row)
            if row:  # the first warms up
                each[name].append(seconds)
        if row and clock.left - reserve < 1.2 * (time.perf_counter() - begun):
            break
    found["requests"] = {"ours, all rows": spread(whole)} | {
        f"PEFT {name}, one row": spread(v) for name, v in each.items()
    }
    best = min(("cat", "active"), key=lambda name: statistics.median(each[name]))
    ours = statistics.median(whole)
    found["ratios"]["PEFT merging per request (cat)"] = spread([s * world.rows / ours for s in each["cat"]])
    found["ratios"]["PEFT per request, linear (of A and B apart: another sum)"] = spread(
        [s * world.rows / ours for s in each["linear"]]
    )
    found["ratios"][f"PEFT per request, its fastest exact way ({best})"] = spread(
        [s * world.rows / ours for s in each[best]]
    )
    said(f"{dtype}: requests of their own merge", clock)
    world.live.remove()
    world.paged.close()
    return found


def table(found: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Markdown of one dtype's figures."""
    lines = ["| decoding | tokens/s, median (low to high, runs) |", "|---|---|"]
    for name, s in sorted(found["speed"].items(), key=lambda item: -item[1]["median"]):
        lines.append(f"| {name} | {s['median']:,.0f} ({s['low']:,.0f} to {s['high']:,.0f}, {s['runs']}) |")
    lines += ["", "| ours in times of | median (low to high) |", "|---|---|"]
    for name, s in found["ratios"].items():
        lines.append(f"| {name} | **{s['median']:.2f}** ({s['low']:.2f} to {s['high']:.2f}) |")
    lines += ["", f"| {given['tokens']} tokens a row, from weights and prompt | seconds |", "|---|---|"]
    for name, s in found["requests"].items():
        lines.append(f"| {name} | {s['median']:.3f} ({s['low']:.3f} to {s['high']:.3f}) |")
    return lines
