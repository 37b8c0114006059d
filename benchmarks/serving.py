"""Serving, side by side in one run: decode throughput, exactness of mixed batches, routing, and a server under load.

    python benchmarks/serving.py decode logits --device cuda --write     # a, b: on a GPU or a CPU
    python benchmarks/serving.py route load --write                      # c, d: on a CPU

Figures of several runs gather in docs/results/serving.json, from which serving.md is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import serving_check
import serving_decode
import serving_load
import serving_logits
import serving_route
from serving_world import Clock, said

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def where(device: str) -> str:
    import peft
    import transformers

    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"Python {platform.python_version()}"
    )


def settings(given: Any) -> dict[str, Any]:
    keys = ("device", "rows", "tokens", "adapters", "rank", "used", "repeats", "seed")
    return {key: getattr(given, key) for key in keys} | {"where": where(given.device), "load": os.getloadavg()[0]}


def write(folder: Path, found: dict[str, Any]) -> str:
    """Merge these parts into serving.json, and write serving.md of all it has."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "serving.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept.update(found)
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    text = page(kept)
    (folder / "serving.md").write_text(text, encoding="utf-8")
    return text


def page(parts: dict[str, Any]) -> str:
    lines = ["# Serving: compositions live in one batch", "", "Made by `python benchmarks/serving.py` (see its help)."]
    for key, part in sorted(parts.items()):
        kind, given, found = key.split()[0], part["settings"], part["found"]
        if kind == "decode":
            lines += [
                "", f"## Decoding, {key.split(' ', 1)[1]}", "",
                f"{found['model']}; {given['rows']} rows, each its own composition of {given['used']} of {given['adapters']} "
                f"adapters (rank {given['rank']}, all seven projections); prompts of 8 to 64 tokens, {given['tokens']} tokens "
                f"decoded greedily with a KV cache; contenders in turn, at most {given['repeats']} times. "
                f"{given['where']}.", *_note(part), "",
                *serving_decode.table(found, given),
            ]  # fmt: skip
        elif kind == "logits":
            lines += [
                "",
                f"## Logits, {key.split(' ', 1)[1]}",
                "",
                f"{found['model']}. {given['where']}.",
                *_note(part),
                "",
            ]
            lines += serving_logits.table(found)
        elif kind == "route":
            lines += ["", "## Routing a request, CPU", "", f"{given['where']}; load {given['load']:.1f}.", ""]
            lines += serving_route.table(found)
        elif kind == "load":
            lines += ["", "## Under load, CPU", "", f"{given['where']}.", "", *serving_load.table(found)]
    return "\n".join(lines) + "\n"


def _note(part: dict[str, Any]) -> list[str]:
    """What is to be known of a part's run, kept with its figures."""
    return ["", part["note"]] if "note" in part else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["decode", "logits", "route", "load"])
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--dtypes", help="of the decoding; float32,bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--model", type=Path, default=ROOT / ".assets" / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--used", type=int, default=4, help="adapters of a composition")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--merged-rows", type=int, default=4, help="rows that PEFT merges for; the time is scaled to all"
    )
    parser.add_argument("--logits-rows", type=int, default=1000)
    parser.add_argument("--exact-rows", type=int, default=8, help="rows of each batch that are run in float64 too")
    parser.add_argument("--seed", type=int, default=0)
    for name, place in (("bank", "examples/bank"), ("index", ".assets/index"), ("tasks", "examples/tasks")):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / place, help="of routing and load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0, help="of the load test")
    parser.add_argument("--threads", type=int, default=0, help="of the server's; 0 for all")
    parser.add_argument("--check", type=int, default=0, help="answers of the load test to check; 0 for all")
    parser.add_argument("--control", action="store_true", help="check each answer against another's composition too")
    parser.add_argument("--keep", type=Path, help="a file for the load test's answers")
    parser.add_argument("--limit", type=float, default=1e6, help="seconds for all; repeats and rows are fewer then")
    parser.add_argument("--write", type=Path, nargs="?", const=RESULTS, help="write serving.{md,json} (docs/results)")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    clock, gpu = Clock(given.limit), given.device.startswith("cuda")
    dtypes = given.dtypes.split(",") if given.dtypes else (["bfloat16", "float32"] if gpu else ["float32"])
    said(where(given.device), clock)
    found: dict[str, Any] = {}
    place = "one GPU" if gpu else "CPU"

    def keep(key: str, result: dict[str, Any]) -> None:
        found[key] = {"settings": settings(given), "found": result}
        print(json.dumps({key: result}), flush=True)
        if given.write:  # at once: a later part may run out of time
            write(given.write, found)

    # each part leaves a share of the time to those after it
    shares = [0.28] * len(dtypes) * ("decode" in given.parts) + [0.38] * ("logits" in given.parts)
    total = sum(shares)
    for i, dtype in enumerate(dtypes if "decode" in given.parts else []):
        reserve = given.limit * sum(shares[i + 1 :]) / total
        keep(f"decode {place}, {dtype}", serving_decode.run(given, dtype, clock, reserve))
    if "logits" in given.parts:
        keep(f"logits {place}", serving_logits.run(given, clock, "bfloat16" in dtypes, 5.0))
    if "route" in given.parts:
        keep("route CPU", serving_route.run(given, clock))
    if "load" in given.parts:
        result = serving_load.run(given, clock)
        result["check"] = serving_check.run(given, result.pop("recorded"))
        keep("load CPU", result)
    print(page(found))


if __name__ == "__main__":
    main()
