"""`svd` of four rank-64 adapters on one 4096 x 4096 module: ours by QR of the stacked factors, PEFT's by a dense SVD.

Example:
    python benchmarks/svd.py --threads 2 --write

Both run in this process, on the same factors, with the same number of threads. Ours is the median of several runs,
PEFT's one run, after a small warm-up of each. `merge()` is timed too: it does the same and measures its own error, in
float64, besides.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from loralloy.adapter import Adapter
from loralloy.adapter_config import AdapterConfig
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.factors import LoraFactors, truncate, weighted_sum
from loralloy.merging import merge
from loralloy.weights import Weights

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "svd.md"
WEIGHTS = [0.4, 0.3, 0.2, -0.1]


def make(width: int, rank: int, seed: int) -> list[LoraFactors]:
    """Four random adapters of one [width, width] module; scalings alpha/r of 0.5 to 2."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for scaling in (0.5, 1.0, 2.0, 1.0):
        a, b = torch.randn(rank, width, generator=g) / width**0.5, torch.randn(width, rank, generator=g)
        parts.append(LoraFactors(a, b, scaling))
    return parts


def timed(run: Callable[[], object], times: int) -> list[float]:
    """Seconds of each run."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def peft_svd(parts: list[LoraFactors], rank: int) -> tuple[float, Tensor]:
    """Seconds that PEFT's add_weighted_adapter(combination_type="svd") takes, and its dW [out, in]."""
    from peft import LoraConfig, get_peft_model

    out, inside = parts[0].shape
    names = [f"a{i}" for i in range(len(parts))]

    def config(f: LoraFactors) -> LoraConfig:
        return LoraConfig(r=f.rank, lora_alpha=f.scaling * f.rank, target_modules=["m"])

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = nn.ModuleDict({"m": nn.Linear(inside, out, bias=False)})
        model = get_peft_model(base, config(parts[0]), adapter_name=names[0])
        for name, f in zip(names[1:], parts[1:], strict=True):
            model.add_adapter(name, config(f))
        layer = model.base_model.model["m"]
        for name, f in zip(names, parts, strict=True):
            layer.lora_A[name].weight.copy_(f.A)
            layer.lora_B[name].weight.copy_(f.B)
        start = time.perf_counter()
        model.add_weighted_adapter(names, WEIGHTS, "merged", combination_type="svd", svd_rank=rank)
        seconds = time.perf_counter() - start
        return seconds, layer.get_delta_weight("merged")


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads, for both sides")
    parser.add_argument("--width", type=int, default=4096, help="of the square module (4096: Llama-2-7B's attention)")
    parser.add_argument("--rank", type=int, default=64, help="of each adapter and of the result")
    parser.add_argument("--runs", type=int, default=9, help="runs of ours; the median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"write docs/results/{RESULT.name}")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    import peft

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    small = make(128, 8, given.seed)
    truncate(weighted_sum(small, WEIGHTS), 8)
    peft_svd(small, 8)

    parts = make(given.width, given.rank, given.seed)
    ours = timed(lambda: truncate(weighted_sum(parts, WEIGHTS), given.rank), given.runs)
    cut, said = truncate(weighted_sum(parts, WEIGHTS), given.rank)
    bank = Bank([Adapter(f"a{i}", {"m": f}, AdapterConfig(f.rank, 1.0), BaseRef("base")) for i, f in enumerate(parts)])
    weights = Weights({f"a{i}": w for i, w in enumerate(WEIGHTS)})
    whole = timed(lambda: merge(bank, weights, "svd", rank=given.rank), max(3, given.runs // 3))
    print(f"ours: {statistics.median(ours) * 1e3:.1f} ms; PEFT's runs now ...", flush=True)
    theirs, peft_delta = peft_svd(parts, given.rank)

    exact = sum((w * f.dense() for f, w in zip(parts, WEIGHTS, strict=True)))
    assert isinstance(exact, Tensor)
    median, whole_median = statistics.median(ours), statistics.median(whole)
    spread = f"median of {given.runs} ({min(ours):.4f} to {max(ours):.4f})"
    threads = f"{given.threads} thread{'s' if given.threads > 1 else ''}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load before the run {load:.2f}"
    report = f"""# svd: ours against PEFT's

Four adapters of rank {given.rank} on one {given.width} x {given.width} module, merged with weights
{WEIGHTS} to rank {given.rank}, float32, on a CPU.
`python benchmarks/svd.py --threads {given.threads} --write` makes this page.

| | seconds | times faster |
|---|---|---|
| PEFT {peft.__version__}: `add_weighted_adapter(combination_type="svd")`, one run | {theirs:.1f} | 1 |
| LoRAlloy: `weighted_sum` + `truncate`, {spread} | {median:.4f} | {theirs / median:,.0f} |
| LoRAlloy: `merge()`, which also measures its own error | {whole_median:.4f} | {theirs / whole_median:,.0f} |

| relative error of dW (Frobenius) | |
|---|---|
| ours against the exact weighted sum (float64) | {relative(cut.dense(), exact):.6f} |
| PEFT's against the exact weighted sum (float64) | {relative(peft_delta, exact):.6f} |
| the optimum that rank {given.rank} allows, as `truncate` reports it | {said:.6f} |
| ours against PEFT's | {relative(cut.dense(), peft_delta):.1e} |

Both on {threads} of one process; torch {torch.__version__}, Python {platform.python_version()};
{machine}.

PEFT forms dW and takes its full dense SVD, O(n^3). QR of the stacked factors costs O(n R^2), with R the sum of the
ranks ({given.rank * len(WEIGHTS)} here), and never forms dW. The error is large because random adapters have nothing in
common; both sides reach the optimum.
"""
    print(report)
    if given.write:
        from loralloy.atomic import atomic_file

        atomic_file(RESULT, report)


if __name__ == "__main__":
    main()
