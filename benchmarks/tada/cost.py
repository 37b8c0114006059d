"""Seconds of a TaDA merge beyond its calibration pass: a 7B-shaped pair (32 layers, seven projections), in memory, on one GPU.

    python benchmarks/tada/cost.py                  # rank 64, fp16, on the GPU
    python benchmarks/tada/cost.py --write          # docs/results/tada-cost.md
    python benchmarks/tada/cost.py --layers 1 --width 256 --rank 8 --device cpu --repeats 1    # whether it runs

The factors are random, the readings made up; what is timed is all that `loralloy tada` does after the probe but reading and
writing files: from the probe's readings to gates, the merge, the cut to the rank and the cast. Libraries are warm: the
first merge of a process, told apart, also loads them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [p for p in (str(ROOT / "src"),) if p not in sys.path]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from loralloy.adapter import Adapter  # noqa: E402
from loralloy.adapter_config import AdapterConfig  # noqa: E402
from loralloy.atomic import atomic_file  # noqa: E402
from loralloy.bank import Bank  # noqa: E402
from loralloy.base_ref import BaseRef  # noqa: E402
from loralloy.factors import LoraFactors  # noqa: E402
from loralloy.merging import Tada, make_plan, run  # noqa: E402
from loralloy.merging.tada import watched  # noqa: E402
from loralloy.weighting.gating import Gate  # noqa: E402
from loralloy.weighting.moments import Moments  # noqa: E402
from loralloy.weighting.probed import SIGNALS, Readings  # noqa: E402
from loralloy.weighting.tada import in_order  # noqa: E402

WIDTH, INNER = 4096, 11008  # Llama-2-7B's
PROJECTIONS = {
    "self_attn.q_proj": (1, 1), "self_attn.k_proj": (1, 1), "self_attn.v_proj": (1, 1), "self_attn.o_proj": (1, 1),
    "mlp.gate_proj": (2, 1), "mlp.up_proj": (2, 1), "mlp.down_proj": (1, 2),
}  # fmt: skip
RULES = [("shared", "weights"), ("cosine", "weights"), ("opposed", "weights"), ("owned", "weights"), ("none", "weights"),
         ("shared", "activations"), ("cosine", "activations"), ("opposed", "activations")]  # fmt: skip
LIMIT = 1.0  # seconds


def pair(layers: int, width: int, rank: int, dtype: torch.dtype, device: str) -> Bank:
    inner = width * INNER // WIDTH
    sides = {1: width, 2: inner}
    shapes = {f"model.layers.{n}.{p}": (sides[o], sides[i]) for n in range(layers) for p, (o, i) in PROJECTIONS.items()}
    made = []
    for k, name in enumerate(("task", "domain")):
        g = torch.Generator(device).manual_seed(k)

        def draw(*shape: int, g: torch.Generator = g) -> torch.Tensor:
            return (torch.randn(*shape, generator=g, device=device) * 0.02).to(dtype)

        parts = {m: LoraFactors(draw(rank, i), draw(o, rank), 0.5) for m, (o, i) in shapes.items()}
        made.append(Adapter(name, parts, AdapterConfig(rank=rank, alpha=rank / 2), BaseRef("shape/of-7b")))
    return Bank(made)


def readings(bank: Bank, rank: int) -> Readings:
    """As a probe of 32 inputs gives them."""
    rng = np.random.default_rng(0)
    modules = tuple(bank.modules)
    sums = {s: 100 * rng.uniform(0.01, 0.05, (32, len(modules), 2)) for s in SIGNALS}
    moments = {}
    for m in modules:
        x = torch.randn(4 * rank, 2 * rank, dtype=torch.float64)
        moments[m] = Moments({"task": rank, "domain": rank}, x.T @ x / len(x))
    return Readings(tuple(bank.names), modules, sums, np.full((32, len(modules)), 100.0), {}, moments)


def once(bank: Bank, seen: Readings, general: Readings, conflict: str, judge: str, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    weights = Gate(reference="general").weights(seen, general)
    plan = make_plan(bank, weights, Tada(conflict=conflict), device=device, measure="none")
    answers = in_order(plan, seen) if judge == "activations" else None
    run(dataclasses.replace(plan, rule=watched(plan.rule, [], answers)), bank)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="write docs/results/tada-cost.md and .json")
    options = parser.parse_args(argv)
    bank = pair(options.layers, options.width, options.rank, torch.float16, options.device)
    seen, general = readings(bank, options.rank), readings(bank, options.rank)
    for adapter in bank.values():
        adapter.content_hash  # noqa: B018 - of files it is known from the reading
    rows = []
    for n, (conflict, judge) in enumerate(RULES):
        first = once(bank, seen, general, conflict, judge, options.device)
        times = sorted(once(bank, seen, general, conflict, judge, options.device) for _ in range(options.repeats))
        rows.append({"conflict": conflict, "judge": judge, "first": first, "times": times, "cold": n == 0})
        middle = times[len(times) // 2]
        print(f"{conflict}, judged on {judge}: {middle:.3f} s ({times[0]:.3f} to {times[-1]:.3f}), first {first:.2f}")
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    default = rows[0]["times"][options.repeats // 2]
    verdict = "met" if default <= LIMIT else "missed"
    print(f"{name}: shared {default:.3f} s, at most {LIMIT:g} s: {verdict}")
    if options.write:
        shown = "\n".join(
            f"| {r['conflict']} | {r['judge']} | {r['times'][len(r['times']) // 2]:.3f} ({r['times'][0]:.3f} to "
            f"{r['times'][-1]:.3f}) | {r['first']:.2f} |"
            for r in rows
        )
        text = (
            f"# TaDA: seconds beyond the calibration pass\n\nTwo random adapters of rank {options.rank}, fp16, "
            f"{options.layers} layers of width {options.width}, seven projections, in memory on {name} (torch "
            f"{torch.__version__}): from the probe's readings to the merged adapter. Median of {options.repeats} and range; the "
            f"first of all merges also loads libraries.\n\n"
            f"| conflict | judged on | seconds | first |\n|---|---|---:|---:|\n{shown}\n\n"
            f"At most {LIMIT:g} s for `shared`: **{verdict}**. `none`, the default of `loralloy tada`, is counted here as the "
            "others are, which the command does not do.\n\n"
            "```sh\npython benchmarks/tada/cost.py --write\n```\n"
        )
        atomic_file(ROOT / "docs/results/tada-cost.md", text)
        atomic_file(ROOT / "docs/results/tada-cost.json", json.dumps({"device": name, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
