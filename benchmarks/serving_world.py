"""What the parts of the serving benchmark share: the model, random adapters on it, and PEFT's model of the same."""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralloy.adapter import Adapter
from loralloy.adapter_config import AdapterConfig
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.factors import LoraFactors
from loralloy.live.scoring import pad_rows
from loralloy.weights import Weights

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALING = 2.0


class Ids:
    """Stands in for a tokenizer where the model's is not there: a token's text is its number."""

    eos_token_id, pad_token_id, bos_token_id = 2, 0, None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f" {i}" for i in ids)


def load(folder: Path, device: str, dtype: str) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what the model is: random weights of SmolLM2-135M's shapes where the folder is not there."""
    if (folder / "config.json").is_file():
        from loralloy.live.base import load_base

        return *load_base(str(folder), dtype, device), folder.name
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, getattr(torch, dtype)).eval()
    return model, Ids(), "random weights of SmolLM2-135M's shapes"


def twin(model: Any) -> Any:
    """A copy of a model that has no hooks yet: every contender has its own."""
    return copy.deepcopy(model).requires_grad_(False)


Factors = dict[str, LoraFactors]


def random_adapters(model: Any, count: int = 16, rank: int = 8, seed: int = 0) -> dict[str, Factors]:
    """Adapters on all seven projections, float32 on the model's device; ||dW|| is about a tenth of ||W0||."""
    targets = {n: m.weight for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in PROJECTIONS}
    g = torch.Generator().manual_seed(seed)
    made: dict[str, Factors] = {}
    for i in range(count):
        mine = {}
        for name, weight in targets.items():
            out, inside = weight.shape
            a = torch.randn(rank, inside, generator=g) / inside**0.5
            b = torch.randn(out, rank, generator=g) * 0.02
            mine[name] = LoraFactors(a.to(weight.device), b.to(weight.device), SCALING)
        made[f"a{i:02d}"] = mine
    return made


def bank_of(adapters: dict[str, Factors]) -> Bank:
    rank = next(iter(next(iter(adapters.values())).values())).rank
    config = AdapterConfig(rank, SCALING * rank)
    return Bank([Adapter(name, parts, config, BaseRef("base")) for name, parts in adapters.items()])


def peft_model(model: Any, adapters: dict[str, Factors], autocast: bool = False) -> Any:
    """PEFT on a copy of the model with all adapters, in the model's dtype (`autocast`: float32, as PEFT loads them)."""
    from peft import LoraConfig, get_peft_model

    made: Any = None
    dtype = torch.float32 if autocast else next(model.parameters()).dtype
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for name, parts in adapters.items():
            f = next(iter(parts.values()))
            config = LoraConfig(
                r=f.rank, lora_alpha=f.scaling * f.rank, target_modules=list(PROJECTIONS), init_lora_weights=False
            )
            if made is None:
                made = get_peft_model(twin(model), config, adapter_name=name, autocast_adapter_dtype=autocast)
            else:
                made.add_adapter(name, config, autocast_adapter_dtype=autocast)
        for module, layer in peft_layers(made).items():
            for name, parts in adapters.items():
                layer.lora_A[name].weight.data = parts[module].A.to(dtype)
                layer.lora_B[name].weight.data = parts[module].B.to(dtype)
    return made.eval().requires_grad_(False)


def peft_layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}


def compositions(rows: int, names: Sequence[str], used: int = 4, seed: int = 0) -> list[Weights]:
    """One a row: `used` of the adapters, with positive weights that sum to 1."""
    source = random.Random(seed)
    made = []
    for _ in range(rows):
        raw = [source.uniform(0.1, 1.0) for _ in range(used)]
        made.append(Weights({n: w / sum(raw) for n, w in zip(source.sample(list(names), used), raw, strict=True)}))
    return made


def prompts(rows: int, shortest: int, longest: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(100, vocabulary) for _ in range(source.randint(shortest, longest))] for _ in range(rows)]


def sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.no_grad()
def decode(model: Any, rows: Sequence[Sequence[int]], tokens: int, device: str) -> tuple[float, float, Tensor]:
    """Greedy decoding with transformers' own cache: seconds of the prompt's pass and of `tokens` steps, and the tokens.

    The same for every contender: no stop, nothing read back before the end, so that a GPU is never waited for.
    """
    sync(device)
    start = time.perf_counter()
    ids, mask = pad_rows(rows, 0, device, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = torch.ones(len(rows), 1, dtype=mask.dtype, device=device)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache, token, at = out.past_key_values, out.logits[:, -1:].argmax(-1), positions[:, -1:] + 1
    sync(device)
    begun = time.perf_counter()
    seen = [token]
    for _ in range(tokens):
        mask = torch.cat([mask, more], 1)
        out = model(
            input_ids=token, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        token, at = out.logits[:, -1:].argmax(-1), at + 1
        seen.append(token)
    sync(device)
    return begun - start, time.perf_counter() - begun, torch.cat(seen, 1)


@dataclass
class Clock:
    """How long the whole run may take; parts ask whether there is time for more."""

    limit: float
    start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.limit - (time.perf_counter() - self.start)


def said(text: str, clock: Clock) -> None:
    print(f"[{clock.limit - clock.left:6.1f} s] {text}", flush=True)


Runs = dict[str, list[float]]


def alternate(contenders: dict[str, Callable[[], float]], repeats: int, clock: Clock, reserve: float = 0.0) -> Runs:
    """Each contender's numbers, one run of each in turn, after one that does not count; fewer where time runs out."""
    runs: Runs = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(repeats):
        begun = time.perf_counter()
        for name, run in contenders.items():
            runs[name].append(run())
        if clock.left - reserve < 1.2 * (time.perf_counter() - begun):
            break
    return runs
