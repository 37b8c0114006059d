"""Tiny random models and adapters. Adapters that stand for the outside world are made by PEFT itself, not by us."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralloy.adapter import Adapter
from loralloy.adapter_config import AdapterConfig
from loralloy.base_ref import BaseRef
from loralloy.factors import LoraFactors

BASE = "tiny/llama"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- factors -----------------------------------------------------------------------------------------------------------


def factors(
    out: int = 12,
    inside: int = 9,
    rank: int = 4,
    seed: int = 0,
    scaling: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> LoraFactors:
    """Random factors, A [rank, inside] and B [out, rank]."""
    g = generator(seed)
    a, b = torch.randn(rank, inside, generator=g), torch.randn(out, rank, generator=g)
    return LoraFactors(a.to(dtype), b.to(dtype), scaling)


def dense_sum(parts: Sequence[LoraFactors], weights: Sequence[float]) -> Tensor:
    """sum_i w_i s_i B_i A_i in float64: the oracle."""
    return sum((w * f.dense(torch.float64) for f, w in zip(parts, weights, strict=True)))  # type: ignore[return-value]


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want||_F / ||want||_F in float64; the plain norm where `want` is zero."""
    got, want = got.double(), want.double()
    lost, size = float((got - want).norm()), float(want.norm())
    return lost / size if size > 0 else lost


def adapter(
    parts: Mapping[str, LoraFactors],
    name: str = "a",
    base: BaseRef | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """An adapter in memory."""
    first = next(iter(parts.values()), None)
    config = AdapterConfig(rank=first.rank if first else 1, alpha=1.0)
    return Adapter(name, dict(parts), config, base or BaseRef(BASE), extra)


def delta(adapter: Adapter) -> dict[str, Tensor]:
    """module -> dW [out, in], float64."""
    return {module: adapter[module].dense(torch.float64) for module in adapter}


# -- tiny models -------------------------------------------------------------------------------------------------------


def tiny_llama(seed: int = 0, layers: int = 2, vocab: int = 64, hidden: int = 32) -> Any:
    """A random Llama in float32, eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0) -> Any:
    """A random GPT-2, whose linear layers are Conv1D (fan_in_fan_out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


class ConvNet(nn.Module):
    """One convolution of each dimension, one after the other on reshaped activations; input [b, 3, 8]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Conv1d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0))
        self.point = nn.Conv2d(6, 4, 1)
        self.three = nn.Conv3d(2, 5, (1, 2, 2))
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)  # [b, 8, 8]
        x = self.two(x.reshape(-1, 4, 4, 4))  # [b, 6, 4, 2]
        x = self.point(x)  # [b, 4, 4, 2]
        x = self.three(x.reshape(-1, 2, 2, 4, 2))  # [b, 5, 2, 3, 1]
        return self.out(x.mean((2, 3, 4)))


class Nest(nn.Module):
    """`lin` and `block.lin`: one module's name is the end of another's."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lin = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"lin": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["lin"](torch.tanh(self.lin(x)))


# -- PEFT --------------------------------------------------------------------------------------------------------------


def peft_model(base: nn.Module, seed: int = 0, *, name: str = BASE, spread: float = 0.15, **config: Any) -> Any:
    """A PEFT model on a copy of `base` whose factors (B too) are random, so that dW is not zero."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    model.peft_config["default"].base_model_name_or_path = name
    randomise(model, seed, spread)
    return model.eval()


def randomise(model: Any, seed: int, spread: float = 0.15, adapter: str = "default") -> None:
    """Fill every LoRA factor of one adapter with random numbers."""
    g = generator(seed)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key and adapter in key.split("."):
                parameter.copy_(spread * torch.randn(parameter.shape, generator=g))


def peft_folder(base: nn.Module, folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter folder written by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model(base, seed, **config).save_pretrained(str(folder))
    return folder


def peft_deltas(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """module -> PEFT's own dW, in the shape of the module's weight."""
    from peft.tuners.lora import LoraLayer

    return {
        name: layer.get_delta_weight(adapter).detach()
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, LoraLayer) and (adapter in layer.lora_A or adapter in layer.lora_embedding_A)
    }


def as_weight(f: LoraFactors, fan_in_fan_out: bool = False) -> Tensor:
    """dW in the shape of the module's weight, float64."""
    dense = f.dense(torch.float64)
    if f.kind == "conv":
        return dense.reshape(f.B.shape[0], *f.A.shape[1:])
    return dense.T if f.kind == "embedding" or fan_in_fan_out else dense


def load_in_peft(base: nn.Module, folder: Path) -> Any:
    """PEFT's model from a folder; any warning or log line of warning level is an error."""
    from peft import PeftModel

    with silence():
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Fails on a Python warning and on anything logged at WARNING or above inside the block."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.name}: {record.getMessage()}")

    ear = Ear(logging.WARNING)
    loggers = [logging.getLogger(n) for n in (None, "transformers", "peft", "huggingface_hub", "accelerate")]
    for logger in loggers:
        logger.addHandler(ear)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for kind in (DeprecationWarning, FutureWarning):  # PEFT calling what transformers is about to drop
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(ear)
    assert not said, f"expected silence, heard: {said}"


def close(got: Tensor, want: Tensor, within: float = 1e-5) -> bool:
    """Whether two float32 outputs agree to `within`, relative to the largest."""
    return got.shape == want.shape and float((got - want).abs().max()) <= within * max(1.0, float(want.abs().max()))


def logits(model: Callable[..., Any], ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits
