"""`loralloy vllm check`: how vLLM's plugin reads a model's name, or why it does not serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LoralloyError
from .common import Json, OptionalPath, SameBase

app = typer.Typer(help="What vLLM's plugin makes of a name.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """What vLLM's plugin makes of a name."""


@app.command()
def check(
    names: Annotated[list[str], typer.Argument(help="Models as requests name them: adapters, compositions.")],
    bank: Annotated[str, typer.Option("--bank", envvar="LORALLOY_BANK", help="Folder of adapters.")],
    rank: Annotated[int, typer.Option(min=1, envvar="LORALLOY_RANK", help="vLLM's --max-lora-rank.")] = 16,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16: what vLLM computes adapters in.")
    ] = "auto",
    cache: Annotated[
        OptionalPath, typer.Option(envvar="LORALLOY_CACHE", help="The plugin's cache; tells what is there.")
    ] = None,
    cache_gib: Annotated[
        float, typer.Option(min=0.001, envvar="LORALLOY_CACHE_GIB", help="Room in the cache, as the plugin has it.")
    ] = 20.0,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge what is not there, ahead of its first request.")
    ] = False,
    assume_same_base: SameBase = False,
    json: Json = False,
) -> None:
    """Say what vLLM would load for each name, or why it answers 404.

    Example: loralloy vllm check "0.6*sms_spam + 0.4*sarcasm @ ties" --bank examples/bank --rank 16
    """
    from ..console import out
    from ..vllm_plugin.check import look
    from ..vllm_plugin.settings import Settings

    if merge and cache is None:
        raise LoralloyError("--merge needs --cache, or LORALLOY_CACHE: where the merged adapter is kept")
    room = int(cache_gib * (1 << 30))
    settings = Settings(Path(bank).absolute(), (cache or Path(".")).absolute(), room, same_base=assume_same_base)
    found = look(settings, names, rank, dtype, cache is not None, merge)
    if json:
        out.print_json(data=found)
    else:
        for said in found:
            lines = [f"{k}: {v}" for k, v in said.items() if k not in ("name", "error_message") and v is not None]
            why = f"not served: {said['error_message']}" if "error_message" in said else "\n  ".join(lines)
            out.print(f"{said['name']}\n  {why}", markup=False, soft_wrap=True)
    if any("error_message" in said for said in found):
        raise typer.Exit(1)
