"""Every rule against PEFT's, side by side on the same factors: seconds, ratios, and how far each is from the optimum.

Examples:
    python benchmarks/merging.py cpu --write         # four rank-8 adapters of SmolLM2's shapes, on the CPU
    python benchmarks/merging.py cuda --write        # four rank-64 adapters of Llama-2-7B's shapes, on one GPU

Factors are random (seeded). Ours is `merge_factors`: separate tensors in, separate tensors out, grouping, stacking and every
launch included; the last column is the whole `merge()` on adapters in memory, which also hashes its parents and measures its
own error. PEFT's is `add_weighted_adapter` on a model that has the adapters loaded.

On a CPU each side has a process of its own (merging_worker.py says why), and they run in turns after a warm-up of each;
`--together` puts both into this process, as on a GPU. There, ours is the median of several runs after a warm-up, PEFT's one run
after a warm-up on a small model (its svd on a GPU: one layer, times the layers).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from devices import cpu_name
from loralloy.merging import get_rule, merge, merge_factors
from loralloy.weights import Weights
from merging_checks import COMPARED, checked
from merging_worker import (
    CASES,
    SHAPES,
    WEIGHTS,
    Side,
    bank_of,
    cut_of,
    make,
    more_for_peft,
    peft_model,
    peft_seconds,
    sync,
)

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def timed(run: Callable[[], Any], device: str, times: int, warm: int = 2) -> list[float]:
    """Seconds of each run, after a warm-up; results are dropped before the next."""
    seconds = []
    gc.collect()
    for i in range(warm + times):
        sync(device)
        start = time.perf_counter()
        run()
        sync(device)
        if i >= warm:
            seconds.append(time.perf_counter() - start)
    return seconds


APART = (
    "Each side is timed in a process of its own, the two in turns, one at a time. In one process they change each other's\n"
    "memory: our merge has glibc keep what is freed, which speeds PEFT up; a user runs\n"
    "one of them. Where NumPy's AVX-512 selection is slow (AMD's Zen 4) it is left out, as the command `loralloy` does\n"
    "(loralloy.processor). Medians and ranges of {runs} rounds after a warm-up; a ratio is that of the medians, its range that\n"
    "of the rounds. Garbage is collected before every run, on both sides, and results are dropped between them."
)
NOTE = (
    "PEFT adds in bf16 here, ours in float32 with one rounding, hence the differences of 2e-3 below; in float32 the two agree\n"
    "to 1e-7 (merging-cpu.md, and the tests on dW and logits). PEFT's svd is one layer's time, times the layers."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=7, help="runs of ours, and on a CPU of PEFT's; the median counts")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peft", action="store_true", help="ours alone")
    parser.add_argument("--only", help="rules, separated by commas")
    parser.add_argument(
        "--together", action="store_true", help="both sides in one process on a CPU too, PEFT's run once"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where the time goes, for one run a rule (in one process)"
    )
    parser.add_argument(
        "--write", type=Path, nargs="?", const=RESULTS, help="write merging-DEVICE.{md,json} (docs/results)"
    )
    given = parser.parse_args()
    given.layers = given.layers or SHAPES[given.device]["layers"]
    given.together = given.together or given.profile or given.device == "cuda"
    torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    rows, more = (together if given.together else apart)(given)
    device, versions = given.device, f"torch {torch.__version__}, Python {platform.python_version()}{more}"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {given.threads} threads"
    page = report(rows, f"{where}; {versions}; load before {load:.1f}", given)
    print(page)
    if given.write:
        (given.write / f"merging-{device}.md").write_text(page, encoding="utf-8")
        (given.write / f"merging-{device}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def apart(given: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """The rows of a CPU, each side timed in its own process, in turns; and the versions. Correctness comes after, here."""
    cases = [case for case in CASES if not given.only or case[0] in given.only.split(",")]
    ours = Side("ours", given.layers, given.seed, given.threads)
    theirs = None if given.no_peft else Side("peft", given.layers, given.seed, given.threads)
    rows: list[dict[str, Any]] = []
    for label, _, space, _, _ in cases:
        taken: dict[str, list[float]] = {"ours": [], "peft": []}
        warm = 1 if label in ("svd", "ties on dW") else 2
        for i in range(warm + given.runs):
            for side, process in (("ours", ours), ("peft", theirs)):
                seconds = process.seconds(label) if process else 0.0
                if process and i >= warm:
                    taken[side].append(seconds)
        row: dict[str, Any] = {"rule": label, "space": space, "ours": statistics.median(taken["ours"])}
        row["runs"] = sorted(taken["ours"])
        if theirs:
            ratios = sorted(p / o for o, p in zip(taken["ours"], taken["peft"], strict=True))
            row |= {"peft": statistics.median(taken["peft"]), "peft runs": sorted(taken["peft"])}
            row |= {"times": row["peft"] / row["ours"], "times by round": ratios}
        rows.append(row)
        print(json.dumps(row), flush=True)
    for row in rows:
        ours.seconds(row["rule"], "merge()")
        row["merge()"] = statistics.median(ours.seconds(row["rule"], "merge()") for _ in range(given.runs))
    more = f", {theirs.versions}" if theirs else ""
    for process in (ours, theirs):
        if process:
            process.close()

    adapters, rank = make("cpu", given.layers, given.seed), SHAPES["cpu"]["rank"]
    model = None if given.no_peft else peft_model(adapters, "cpu")
    for row, case in zip(rows, cases, strict=True):
        label, name, space, parameters, peft = case
        rule, cut = get_rule(name)(**parameters), cut_of(case, rank)
        if label in COMPARED and model is not None:
            peft_seconds(model, peft["rule"], "cpu", **more_for_peft(peft, cut))
        row |= checked(label, adapters, rule, rank, merge_factors(adapters, WEIGHTS, rule, space, cut), model)
    return rows, more


def together(given: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """The rows, both sides in this process; and the versions."""
    device, layers, rank = given.device, given.layers, SHAPES[given.device]["rank"]
    adapters = make(device, layers, given.seed)
    weights = Weights({f"a{i}": w for i, w in enumerate(WEIGHTS)})
    model: Any = None
    versions = ""
    if not given.no_peft:
        import peft

        versions = f", peft {peft.__version__}"
        model = peft_model(adapters, device)
        small = peft_model([{n: f for n, f in a.items() if ".0.self_attn.v" in n} for a in adapters], device)
        peft_seconds(small, "linear", device)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        label, name, space, parameters, theirs = case
        if given.only and label not in given.only.split(","):
            continue
        rule, cut = get_rule(name)(**parameters), cut_of(case, rank)
        slow = label == "ties on dW" and device == "cuda"
        run = lambda: merge_factors(adapters, WEIGHTS, rule, space, cut)  # noqa: E731, B023
        if given.profile:
            profiled(run, device)
        seconds = timed(run, device, 2 if slow else given.runs, 1 if slow else 2)
        row: dict[str, Any] = {"rule": label, "space": space, "ours": statistics.median(seconds)}
        row["runs"] = sorted(seconds)
        if device == "cpu":
            banks = [bank_of(adapters) for _ in range(4)]
            whole = timed(lambda: merge(banks.pop(), weights, rule, space, cut), device, 3, 1)  # noqa: B023
            row["merge()"] = statistics.median(whole)
        if model is not None:
            if label in ("svd", "ties on dW") and device == "cuda":
                first = [{n: f for n, f in a.items() if n.startswith("model.layers.0.")} for a in adapters]
                one = peft_model(first, device) if label == "svd" else None
                if one is not None:
                    row["peft"] = peft_seconds(one, theirs["rule"], device, svd_rank=rank) * layers
            else:
                row["peft"] = peft_seconds(model, theirs["rule"], device, **more_for_peft(theirs, cut))
            if "peft" in row:
                row["times"] = row["peft"] / row["ours"]
        row |= checked(label, adapters, rule, rank, run(), model)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows, versions


def ranged(runs: list[float] | None, scale: float, digits: int) -> str:
    """' (least to most)' of sorted runs."""
    return f" ({runs[0] * scale:,.{digits}f} to {runs[-1] * scale:,.{digits}f})" if runs else ""


def profiled(run: Callable[[], Any], device: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    run()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=kinds) as seen:
        run()
        sync(device)
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=key, row_limit=14, max_name_column_width=40))


def report(rows: list[dict[str, Any]], where: str, given: argparse.Namespace) -> str:
    device = given.device
    shapes = "Llama-2-7B's" if device == "cuda" else "SmolLM2-135M's"
    lines = [
        f"# Merging on {'one GPU' if device == 'cuda' else 'a CPU'}: ours against PEFT's",
        "",
        f"Four random adapters of rank {SHAPES[device]['rank']} at {shapes} shapes ({given.layers} layers, seven projections), "
        f"weights {WEIGHTS}, {'bf16 tensors on the GPU' if device == 'cuda' else 'float32 tensors in memory'}, merged by "
        f"`python benchmarks/merging.py {device}{' --together' if device == 'cpu' and given.together else ''} --write` "
        f"({where}).",
        "",
        *([] if given.together else [APART.format(runs=given.runs), ""]),
        "| rule | ours, ms | PEFT, ms | times faster | `merge()` with hashes and its error, ms |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        whole = f"{row['merge()'] * 1e3:,.0f}" if "merge()" in row else ""
        peft = f"{row['peft'] * 1e3:,.0f}" if "peft" in row else ""
        peft += ranged(row.get("peft runs"), 1e3, 0)
        times = f"**{row['times']:,.0f}**" if "times" in row else ""
        times += ranged(row.get("times by round"), 1, 0)
        ours = f"{row['ours'] * 1e3:,.1f}{ranged(row['runs'], 1e3, 1)}"
        lines.append(f"| {row['rule']} ({row['space']}) | {ours} | {peft} | {times} | {whole} |")
    if device == "cuda":
        lines += ["", NOTE]
    lines += ["", "Correctness in the same run:", ""]
    for row in rows:
        if "from peft" in row:
            lines.append(
                f"- {row['rule']}: worst relative difference of dW from PEFT's over a dozen modules {row['from peft']:.1e}"
            )
        for name, said in row.get("error", {}).items():
            text = ", ".join(f"{k} {v:.6g}" for k, v in said.items())
            lines.append(f"- {row['rule']}, {name}: {text}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
