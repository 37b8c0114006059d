"""What the two sides of the merging benchmark share, and the process in which one of them is timed.

`python benchmarks/merging_worker.py ours|peft` makes the adapters and answers one JSON line on stdout for each on stdin:
{"rule": ..., "what": "rule" | "merge()"} is one run, in seconds. `benchmarks/merging.py cpu` holds one process of each side and
asks in turns, so at most one of them is at work.

As the command `loralloy` does, it has NumPy leave its AVX-512 code on a processor where that is slow (loralloy.processor; our
side alone selects with NumPy).

A process holds one side only, because the two change each other's memory: our merge has glibc keep what is freed (for the whole
process), which speeds PEFT up. A user runs one of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from loralloy.processor import prefer_avx2

prefer_avx2()  # before torch, which imports NumPy

import torch  # noqa: E402
from torch import nn  # noqa: E402

from loralloy.factors import LoraFactors  # noqa: E402

if TYPE_CHECKING:
    from loralloy.bank import Bank
    from loralloy.merging import Space


WEIGHTS = [0.4, 0.3, 0.2, -0.1]
SHAPES = {
    "cuda": {"layers": 32, "hidden": 4096, "kv": 4096, "mlp": 11008, "rank": 64},  # Llama-2-7B
    "cpu": {"layers": 30, "hidden": 576, "kv": 192, "mlp": 1536, "rank": 8},  # SmolLM2-135M
}
Case: TypeAlias = "tuple[str, str, Space, dict[str, Any], dict[str, Any]]"
CASES: list[Case] = [
    # label, our rule, our space, our parameters, PEFT's call
    ("linear", "linear", "factors", {}, {"rule": "linear"}),
    ("cat", "cat", "delta", {}, {"rule": "cat"}),
    ("ties", "ties", "factors", {"density": 0.2}, {"rule": "ties", "density": 0.2}),
    ("magnitude_prune", "magnitude_prune", "factors", {"density": 0.8}, {"rule": "magnitude_prune", "density": 0.8}),
    ("dare_ties", "dare_ties", "factors", {"density": 0.5}, {"rule": "dare_ties", "density": 0.5}),
    ("dare_linear", "dare_linear", "factors", {"density": 0.5}, {"rule": "dare_linear", "density": 0.5}),
    ("svd", "svd", "delta", {}, {"rule": "svd"}),
    ("ties on dW", "ties", "delta", {"density": 0.2}, {"rule": "ties_svd", "density": 0.2}),
]


def modules(kind: dict[str, int], layers: int) -> dict[str, tuple[int, int]]:
    """module -> (out, in)."""
    h, kv, m = kind["hidden"], kind["kv"], kind["mlp"]
    each = {
        "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m),
    }  # fmt: skip
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in each.items()}


def make(device: str, layers: int, seed: int) -> list[dict[str, LoraFactors]]:
    """Four random adapters; bf16 on a GPU, float32 on a CPU; scalings 0.5 to 2."""
    kind = SHAPES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(seed)
    adapters = []
    for scaling in (0.5, 1.0, 2.0, 1.0):
        adapters.append({
            name: LoraFactors(
                (torch.randn(kind["rank"], inside, generator=g, device=device) / inside**0.5).to(dtype),
                (torch.randn(out, kind["rank"], generator=g, device=device) * 0.1).to(dtype),
                scaling,
            )
            for name, (out, inside) in modules(kind, layers).items()
        })  # fmt: skip
    return adapters


def bank_of(adapters: list[dict[str, LoraFactors]]) -> Bank:
    """The same for the whole `merge()`; a new one for each run, because an adapter keeps its hash."""
    from loralloy.adapter import Adapter
    from loralloy.adapter_config import AdapterConfig
    from loralloy.bank import Bank
    from loralloy.base_ref import BaseRef

    config = AdapterConfig(next(iter(adapters[0].values())).rank, 1.0)
    return Bank([Adapter(f"a{i}", a, config, BaseRef("base")) for i, a in enumerate(adapters)])


def peft_model(adapters: list[dict[str, LoraFactors]], device: str) -> Any:
    """A PEFT model with the adapters loaded; its base's weights are empty, which no merge reads."""
    from peft import LoraConfig, get_peft_model

    dtype = next(iter(adapters[0].values())).A.dtype
    root = nn.Module()
    for name, f in adapters[0].items():
        at = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        with torch.device(device):
            at.add_module(leaf, nn.Linear(f.shape[1], f.shape[0], bias=False, dtype=dtype))
    targets = sorted({name.rsplit(".", 1)[1] for name in adapters[0]})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model: Any = None
        for i, adapter in enumerate(adapters):
            f = next(iter(adapter.values()))
            config = LoraConfig(
                r=f.rank, lora_alpha=f.scaling * f.rank, target_modules=targets, init_lora_weights=False
            )
            if model is None:
                model = get_peft_model(root, config, adapter_name="a0", autocast_adapter_dtype=False)
            else:
                model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
        for i, adapter in enumerate(adapters):
            for name, f in adapter.items():
                layer = model.base_model.model.get_submodule(name)
                layer.lora_A[f"a{i}"].weight.data = f.A.clone()
                layer.lora_B[f"a{i}"].weight.data = f.B.clone()
    return model


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peft_seconds(model: Any, rule: str, device: str, **more: Any) -> float:
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    gc.collect()
    sync(device)
    start = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter([f"a{i}" for i in range(4)], WEIGHTS, "merged", combination_type=rule, **more)
    sync(device)
    return time.perf_counter() - start


def more_for_peft(theirs: dict[str, Any], cut: int | None) -> dict[str, Any]:
    """Arguments of PEFT's add_weighted_adapter besides adapters, weights and names."""
    return {k: v for k, v in theirs.items() if k != "rule"} | ({"svd_rank": cut} if cut else {})


def cut_of(case: Case, rank: int) -> int | None:
    """The rank that a case's result is cut to."""
    return rank if case[2] == "delta" and case[1] != "cat" else None


# -- one side in a process of its own ----------------------------------------------------------------------------------


class Side:
    """A process that times one side, "ours" or "peft", seen from the one that asks it."""

    def __init__(self, side: str, layers: int, seed: int, threads: int) -> None:
        self._side, command = side, [sys.executable, __file__, side, str(layers), str(seed), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions: str = self._answer()

    def seconds(self, rule: str, what: str = "rule") -> float:
        """Of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"rule": rule, "what": what}) + "\n")
        self._process.stdin.flush()
        seconds = self._answer()
        time.sleep(0.05)  # torch's threads spin for a while before they sleep: not beside the other side's run
        return seconds

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self._side} ended with {self._process.wait()}; it says why above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def our_runs(layers: int, seed: int) -> tuple[str, Callable[[str, str], float]]:
    """(versions, seconds of one run of a rule or of the whole merge)."""
    from loralloy.merging import get_rule, merge, merge_factors
    from loralloy.weights import Weights

    adapters, rank = make("cpu", layers, seed), SHAPES["cpu"]["rank"]
    weights = Weights({f"a{i}": w for i, w in enumerate(WEIGHTS)})

    def seconds(label: str, what: str) -> float:
        case = next(c for c in CASES if c[0] == label)
        rule, cut = get_rule(case[1])(**case[3]), cut_of(case, rank)
        if what == "rule":
            return once(lambda: merge_factors(adapters, WEIGHTS, rule, case[2], cut))
        bank = bank_of(adapters)
        return once(lambda: merge(bank, weights, rule, case[2], cut))

    return "", seconds


def peft_runs(layers: int, seed: int) -> tuple[str, Callable[[str, str], float]]:
    """(versions, seconds of one run of a rule)."""
    import peft

    model = peft_model(make("cpu", layers, seed), "cpu")

    def seconds(label: str, what: str) -> float:
        case = next(c for c in CASES if c[0] == label)
        more = more_for_peft(case[4], cut_of(case, SHAPES["cpu"]["rank"]))
        return peft_seconds(model, case[4]["rule"], "cpu", **more)

    return f"peft {peft.__version__}", seconds


def once(run: Callable[[], Any]) -> float:
    """Seconds of one run on a CPU, garbage collected before it; its result is dropped afterwards, as PEFT's is."""
    gc.collect()
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", "peft"])
    for name in ("layers", "seed", "threads"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    torch.set_num_threads(given.threads)
    versions, seconds = (our_runs if given.side == "ours" else peft_runs)(given.layers, given.seed)
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(seconds(asked["rule"], asked["what"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
