"""`loralloy export`: an adapter added into a copy of its base model, or as a GGUF LoRA for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import LoralloyError
from .common import Json

if TYPE_CHECKING:
    from ..adapter import Adapter


def export(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or org/name@revision.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; with --gguf, the file.")],
    into: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--into", help="Base model: a folder, or org/name@revision. A copy of it gets W + dW."),
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write a GGUF LoRA for llama.cpp instead.")] = False,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--base", help="With --gguf: where the base's config.json is, if not where the adapter says."),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --gguf: f32 or f16.", show_default="f32"),
    ] = None,
    weight: Annotated[float, typer.Option(help="Scales dW.")] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    assume_same_base: Annotated[
        bool,
        typer.Option("--assume-same-base", help="With --into: skip the check that BASE is what the adapter is of."),
    ] = False,
    json: Json = False,
) -> None:
    """Export an adapter for programs that do not read PEFT's format.

    --into BASE writes a copy of the base model with dW added, tensor by tensor, in the base's own dtype; BASE itself is
    only read. --gguf writes one file that llama.cpp takes as --lora.

    Example: loralloy export merged --into models/SmolLM2-135M-Instruct -o exported
    """
    from ..adapter import Adapter
    from ..atomic import check_free
    from ..console import out as stdout

    if gguf == (into is not None):
        raise LoralloyError("give one of --into BASE (a copy of the base model) and --gguf (a LoRA for llama.cpp)")
    if not gguf and (base or dtype):
        raise LoralloyError(
            f"{'--base' if base else '--dtype'} goes with --gguf; with --into the base is BASE and its dtype is kept"
        )
    if gguf and assume_same_base:
        raise LoralloyError(
            "--assume-same-base goes with --into; --gguf reads the base's config.json alone, where there is no base to check"
        )
    check_free(out.absolute(), overwrite)
    loaded = Adapter.load(adapter)
    if gguf:
        data, lines = _gguf(loaded, out, base, dtype or "f32", weight, overwrite)
    else:
        data, lines = _into(loaded, str(into), out, weight, assume_same_base, overwrite)
    if json:
        stdout.print_json(data=data | {"out": str(out)})
        return
    for line in [*lines, f"wrote {out}"]:
        stdout.print(line, markup=False, soft_wrap=True)


def _into(
    adapter: Adapter, into: str, out: Path, weight: float, assume: bool, overwrite: bool
) -> tuple[dict[str, Any], list[str]]:
    from ..console import progress
    from ..exporting.base import export_into_base

    with progress() as bar:
        task = bar.add_task("checking the base", total=None)

        def step(done: int, total: int) -> None:
            bar.update(task, description="tensors", completed=done, total=total)

        done = export_into_base(
            adapter, into, out, weight=weight, assume_same_base=assume, overwrite=overwrite, on_tensor=step
        )
    data = {
        "adapter": {"name": adapter.name, "hash": adapter.content_hash, "weight": weight, "licence": adapter.licence},
        "base": done.base.to_dict(),
        "change": done.change,
        "lost_to_rounding": done.lost,
        "modules": {module: added.change for module, added in done.modules.items()},
        "replaced": done.replaced,
        "left_out": done.left_out,
        "notes": done.notes,
    }
    how = "" if weight == 1 else f"{weight:g} "
    lines = [
        f"{how}dW added to {len(done.modules)} of the base's weights, stored as {', '.join(sorted(done.dtypes)) or 'they were'}",
        f"change: norm of dW over norm of W {done.change:.2e}; lost to rounding: {done.lost:.2e} of dW",
    ]
    if done.lost > 0.05:
        lines.append(
            f"note: {', '.join(sorted(done.dtypes))} rounds small changes away; the same base saved in fp32 keeps them"
        )
    if done.replaced:
        lines.append(f"replaced whole: {', '.join(done.replaced)}")
    lines += [f"note: {note}" for note in done.notes]
    if done.left_out:
        lines.append(f"left out (other copies of weights): {', '.join(done.left_out)}")
    return data, lines


def _gguf(
    adapter: Adapter, out: Path, base: str | None, dtype: str, weight: float, overwrite: bool
) -> tuple[dict[str, Any], list[str]]:
    from ..console import progress
    from ..exporting.gguf import export_gguf

    with progress() as bar:
        task = bar.add_task("modules", total=len(adapter))
        done = export_gguf(
            adapter,
            out,
            base=base,
            dtype=dtype,
            weight=weight,
            overwrite=overwrite,
            on_module=lambda _: bar.advance(task),
        )
    data = {
        "adapter": {"name": adapter.name, "hash": adapter.content_hash, "weight": weight, "licence": adapter.licence},
        "architecture": done.architecture,
        "alpha": done.alpha,
        "dtype": dtype,
        "lost_to_rounding": done.lost,
        "tensors": dict(done.tensors),
        "notes": done.notes,
    }
    lines = [f"{len(done.tensors)} modules for llama.cpp's {done.architecture}, alpha {done.alpha:g}, {dtype}"]
    if done.lost:
        lines.append(f"lost to rounding: {done.lost:.2e} of dW")
    if done.folded:
        lines.append(f"scalings differ by module: the rest is in lora_b of {len(done.folded)} of them")
    lines += [f"note: {note}" for note in done.notes]
    return data, lines
