"""Options that several commands share, and how they turn into objects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import LoralloyError

if TYPE_CHECKING:
    from ..bank import Bank
    from ..base_ref import BaseRef
    from ..merging.engine import Rank

BANK = "examples/bank"
INDEX = ".assets/index"
MODEL = ".assets/models/SmolLM2-135M-Instruct"

BankOption = Annotated[str, typer.Option("--bank", envvar="LORALLOY_BANK", help="Folder of adapters.")]
IndexOption = Annotated[str, typer.Option("--index", envvar="LORALLOY_INDEX", help="Index made by `loralloy index`.")]
ModelOption = Annotated[
    str, typer.Option("--model", envvar="LORALLOY_MODEL", help="Base model: a folder, or org/name@revision.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto takes the faster here.")]
LoadInOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--load-in", help="4bit or 8bit: pack the base's linear layers with bitsandbytes as it is loaded."),
]
SameBase = Annotated[
    bool, typer.Option("--assume-same-base", help="Skip the check that adapters are of one base model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Kernel = Annotated[str, typer.Option(help="exp (the paper's), inverse or uniform.")]
OptionalPath = Optional[Path]  # noqa: UP045 - typer evaluates this at run time on Python 3.10


def parse_rank(text: str | None) -> Rank | None:
    """--rank: a number, max or full."""
    if text is None or text in ("max", "full"):
        return text  # type: ignore[return-value]
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise LoralloyError(f"--rank {text!r} is not valid; give a positive number, max or full")
    return int(text)


def parse_dtype(text: str | None) -> Any:
    """--dtype of stored adapters: fp16, bf16 or fp32."""
    import torch

    known = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if text is None:
        return None
    if text not in known:
        raise LoralloyError(f"--dtype {text!r} is not known; choose fp16, bf16 or fp32")
    return known[text]


def load_bank(folder: str, assume_same_base: bool = False, argument: bool = False) -> Bank:
    """The adapters of --bank; a folder that is not there is answered with the flag and the variable that name it, or with
    the argument BANK where the command has that instead."""
    from ..bank import Bank
    from ..hub import parse_ref

    if not Path(folder).exists() and parse_ref(folder)[1] is None:
        place = f"{folder}: no such folder here ({Path.cwd()})"
        if argument:
            raise LoralloyError(f"BANK {place}; give a folder of adapters")
        raise LoralloyError(f"--bank {place}; pass --bank, or set LORALLOY_BANK, to a folder of adapters")
    return Bank.load(folder, assume_same_base)


def load_model(model: str, dtype: str, load_in: str | None = None) -> tuple[Any, Any, BaseRef]:
    """The base model, its tokenizer, and what it is; `load_in`: 4bit, 8bit, or None as its files are."""
    from ..base_ref import BaseRef
    from ..console import console
    from ..hub import parse_ref
    from ..live.base import base_fingerprint, load_base

    with console.status("loading the base model"):
        loaded, tokenizer = load_base(model, dtype, quantisation=load_in)
        name, revision = parse_ref(model)
        return loaded, tokenizer, BaseRef(name, revision, base_fingerprint(loaded))
