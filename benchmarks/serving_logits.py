"""Part b of the serving benchmark: a mixed batch's logits against each row alone through PEFT with its merged adapter."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralloy.live import LiveModel
from loralloy.live.scoring import pad_rows
from loralloy.weights import Weights
from serving_world import Clock, bank_of, load, peft_layers, peft_model, prompts, random_adapters, said, twin

OURS16, OURS_FEW = "ours, bfloat16", "ours, bfloat16, the rows of the last line"
ROOT = Path(__file__).resolve().parents[1]


class Merged:
    """PEFT with one adapter, the exact sum of a composition: all factors beside each other, as PEFT's `cat` has them.

    The columns of B carry the weights, 0 for an adapter that is not in the sum, so that a new composition is one product.
    """

    def __init__(self, model: Any, adapters: dict[str, Any], autocast: bool = False) -> None:
        self.names, self.autocast = list(adapters), autocast
        first = self.names[0]
        made = peft_model(model, {first: adapters[first]}, autocast)
        self.model, layers = made.base_model.model, peft_layers(made)
        model_dtype = next(model.parameters()).dtype
        dtype = torch.float32 if autocast else model_dtype
        wide = torch.promote_types(dtype, torch.float32)
        parts = {m: [adapters[n][m] for n in self.names] for m in layers}
        self.B = torch.cat([torch.cat([f.B.to(wide) * f.scaling for f in fs], 1) for fs in parts.values()])
        self.slots = self.B.to(dtype, copy=True)  # [sum of out, R]
        self.modules, self.outs = list(parts), torch.tensor([fs[0].B.shape[0] for fs in parts.values()])
        self.ranks = torch.tensor([f.rank for f in next(iter(parts.values()))])
        at = 0
        for module, layer in layers.items():
            out = parts[module][0].B.shape[0]
            layer.lora_A[first].weight.data = torch.cat([f.A for f in parts[module]]).to(dtype)
            layer.lora_B[first].weight.data = self.slots[at : at + out]
            layer.scaling[first] = 1.0
            at += out

    def set(self, weights: Weights) -> None:
        each = torch.tensor([weights.of(n) for n in self.names], dtype=torch.float64)
        if weights.per_module:
            each = torch.tensor([[weights.of(n, m) for n in self.names] for m in self.modules], dtype=torch.float64)
            each = each.repeat_interleave(self.outs, 0)
        self.slots.copy_(self.B * each.repeat_interleave(self.ranks, -1).to(self.B))

    def logits(self, weights: Weights, ids: list[int], device: str) -> Tensor:
        """[len, vocabulary], float32 or wider."""
        self.set(weights)
        made = self.model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
        return made if made.dtype == torch.float64 else made.float()


def mixed(live: LiveModel, rows: list[Weights], ids: list[list[int]], device: str) -> list[Tensor]:
    """Each row's logits [len, vocabulary] from one batch, padded on the left."""
    padded, mask = pad_rows(ids, 0, device, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with live.compose(rows) as model:
        out = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cut = [line[-len(row) :] for line, row in zip(out, ids, strict=True)]
    return cut if out.dtype == torch.float64 else [line.float() for line in cut]


def random_rows(count: int, names: list[str], seed: int) -> list[Weights]:
    """None to eight adapters a row; weights of either sign, whose sizes sum to between 0.5 and 1.2."""
    source, made = random.Random(seed), []
    for _ in range(count):
        used = source.sample(names, source.randint(0, 8))
        raw = [source.uniform(0.1, 1) * (-1 if source.random() < 0.2 else 1) for _ in used]
        size = source.uniform(0.5, 1.2) / (sum(map(abs, raw)) or 1.0)
        made.append(Weights({n: w * size for n, w in zip(used, raw, strict=True)} or {names[0]: 0.0}))
    return made


def texts(tokenizer: Any, count: int, shortest: int, longest: int, seed: int) -> list[list[int]]:
    """Spans of this repository's prose: on random tokens the base by itself is unstable in float32."""
    if not callable(tokenizer):
        return prompts(count, shortest, longest, 49152, seed)
    pages = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
    whole = [i for page in pages for i in tokenizer(page.read_text(encoding="utf-8"))["input_ids"]]
    if len(whole) < 1000:
        return prompts(count, shortest, longest, 49152, seed)
    source, made = random.Random(seed), []
    for _ in range(count):
        length = source.randint(shortest, longest)
        at = source.randrange(len(whole) - length)
        made.append(whole[at : at + length])
    return made


def most(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


def spread_of(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt())


def run(given: Any, clock: Clock, low: bool, reserve: float) -> dict[str, Any]:
    """`low`: in bfloat16 too, against the float32 oracle of the same (bfloat16) base weights.

    Float64 runs of both sides go along for the first rows of each batch: there rounding is out of the way.
    """
    device = given.device
    base16, tokenizer, what = load(given.model, device, "bfloat16")
    base = twin(base16).float()
    adapters = random_adapters(base, given.adapters, given.rank, given.seed)
    bank = bank_of(adapters)
    wide = twin(base).double()
    peft, peft64 = Merged(base, adapters), Merged(wide, adapters)
    live, live64 = LiveModel(base, bank), LiveModel(wide, bank)
    plain = twin(base16).float()
    peft16, live16 = {}, None
    if low:
        peft16 = {"PEFT, bfloat16": Merged(base16, adapters), "PEFT, float32 adapters": Merged(base16, adapters, True)}
        live16 = LiveModel(base16, bank)
    rows = random_rows(given.logits_rows, bank.names, given.seed + 1)
    ids = texts(tokenizer, given.logits_rows, 1, 20, given.seed + 2)
    gaps: dict[str, list[float]] = {key: [] for key in ("ours", "ours64", "peft64", "both64", "base", "scale", "moved")}
    gaps16: dict[str, list[float]] = {name: [] for name in [OURS16, OURS_FEW, *peft16] if low}
    nothing = Weights({bank.names[0]: 0.0})
    done, size = 0, given.rows
    while done < len(rows):
        begun = time.perf_counter()
        chunk = slice(done, min(done + size, len(rows)))
        few = given.exact_rows
        got = mixed(live, rows[chunk], ids[chunk], device)
        got64 = mixed(live64, rows[chunk][:few], ids[chunk][:few], device)
        bare = mixed(live, [nothing] * len(got), ids[chunk], device)
        got16 = mixed(live16, rows[chunk], ids[chunk], device) if live16 else []
        for i, (weights, line) in enumerate(zip(rows[chunk], ids[chunk], strict=True)):
            want = peft.logits(weights, line, device)
            gaps["ours"].append(most(got[i], want))
            gaps["scale"].append(float(want.abs().max()))
            gaps["moved"].append(most(bare[i], want))
            if i < few:
                truth = peft64.logits(weights, line, device)
                gaps["both64"].append(most(got64[i], truth))
                gaps["ours64"].append(most(got[i], truth))
                gaps["peft64"].append(most(want, truth))
                alone = plain(input_ids=torch.tensor([line], device=device), use_cache=False).logits[0]
                gaps["base"].append(most(bare[i], alone))
            if live16:
                gaps16[OURS16].append(spread_of(got16[i], want))
                for name, other in peft16.items():
                    if i < few or not other.autocast:
                        gaps16[name].append(spread_of(other.logits(weights, line, device), want))
                if i < few:
                    gaps16[OURS_FEW].append(gaps16[OURS16][-1])
        done = chunk.stop
        if clock.left - reserve < 1.5 * (time.perf_counter() - begun):
            break
    found: dict[str, Any] = {
        "model": what, "rows": done, "within 1e-4": sum(g <= 1e-4 for g in gaps["ours"]), "exact rows": len(gaps["both64"]),
        "within 1e-4, PEFT": sum(g <= 1e-4 for g in gaps["peft64"]),
        "median": {k: statistics.median(v) for k, v in gaps.items()}, "largest": {k: max(v) for k, v in gaps.items()},
    }  # fmt: skip
    said(f"logits of {done} rows, largest difference {found['largest']['ours']:.1e}", clock)
    if low:
        found["bf16"] = {name: statistics.mean(v) for name, v in gaps16.items()}
        for name in peft16:
            ours = OURS_FEW if peft16[name].autocast else OURS16
            pairs = [a / b for a, b in zip(gaps16[ours], gaps16[name], strict=True) if b > 0]
            found[f"times {name}"] = {
                "rows": len(pairs), "mean": found["bf16"][ours] / found["bf16"][name], "median row": statistics.median(pairs),
                "worst row": max(pairs), "rows above 1.5": sum(p > 1.5 for p in pairs),
            }  # fmt: skip
    for one in (live, live64, live16):
        if one:
            one.remove()
    return found


def table(found: dict[str, Any]) -> list[str]:
    big, mid = found["largest"], found["median"]
    lines = [
        f"{found['rows']:,} rows (texts of 1 to 20 tokens, none to eight of 16 adapters, weights of either sign), in batches "
        "of 32 padded on the left, against PEFT with each row's merged adapter, one row at a time. Logits reach "
        f"{big['scale']:.0f}; the compositions move them by {mid['moved']:.1f} (median of the rows' largest).",
        "",
        "| largest difference of a row's logits | median row | worst row | asked |",
        "|---|---|---|---|",
        f"| ours and PEFT, float32 | {mid['ours']:.1e} | **{big['ours']:.1e}** ({found['within 1e-4']} of {found['rows']} rows "
        "within 1e-4) | 1e-4 |",
        f"| ours and PEFT, both in float64 ({found['exact rows']} rows) | {mid['both64']:.1e} | **{big['both64']:.1e}** | |",
        f"| PEFT in float32 and in float64 (same rows) | {mid['peft64']:.1e} | {big['peft64']:.1e} "
        f"({found['within 1e-4, PEFT']} within 1e-4) | |",
        f"| ours in float32 and PEFT in float64 | {mid['ours64']:.1e} | {big['ours64']:.1e} | |",
        f"| the bare base, in the batch and alone, float32 | {mid['base']:.1e} | {big['base']:.1e} | |",
    ]
    if found.get("bf16"):
        lines += ["", "| distance from PEFT in float32 (root mean square) | mean |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in found["bf16"].items()] + [""]
    for name in ("PEFT, bfloat16", "PEFT, float32 adapters"):
        if s := found.get(f"times {name}"):
            lines.append(
                f"- Ours in times of {name}: **{s['mean']:.2f}** (asked: at most 1.5); by row {s['median row']:.2f} in the "
                f"median, {s['worst row']:.2f} at worst, above 1.5 in {s['rows above 1.5']} of {s['rows']} rows."
            )
    return lines
