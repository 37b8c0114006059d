"""The packaged ViT: an ONNX graph with nameless linear weights becomes a transformers folder with the same outputs."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import generator
from loralloy.errors import LoralloyError
from loralloy.live import packaged_vit
from loralloy.live.vision import load_backbone
from vision_scenes import tiny_dinov2

onnx = pytest.importorskip("onnx")
OLD = {new: old for old, new in packaged_vit.RENAMED.items()}


def as_onnx(model) -> bytes:
    """The tensors of a Dinov2Model as the exporter left them in the packaged file; the graph computes nothing."""
    from onnx import helper, numpy_helper

    tensors, nodes = [], []
    for name, value in model.state_dict().items():
        for new, old in OLD.items():
            name = name.replace(new, old)
        if name == "embeddings.mask_token":
            continue
        if name == "embeddings.position_embeddings":
            tensors.append(numpy_helper.from_array(value[:, :1].numpy(), "onnx::Concat_1"))
            tensors.append(numpy_helper.from_array(value[:, 1:].numpy(), "onnx::Reshape_2"))
        elif name.startswith("encoder") and name.endswith(".weight") and value.ndim == 2:
            number = f"onnx::MatMul_{len(tensors)}"
            tensors.append(numpy_helper.from_array(value.T.contiguous().numpy(), number))
            path = "/backbone/" + name.removesuffix(".weight").replace(".", "/") + "/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", number], [path], name=path))
        else:
            tensors.append(numpy_helper.from_array(value.numpy(), "backbone." + name))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1])
    graph = helper.make_graph(nodes, "g", [x], [x], tensors)
    return helper.make_model(graph).SerializeToString()


@pytest.fixture(scope="module")
def model():
    return tiny_dinov2(seed=3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_folder_computes_what_the_graph_held(model, tmp_path, dtype, monkeypatch):
    built = packaged_vit.build_model
    monkeypatch.setattr(packaged_vit, "build_model", lambda state: built(state, heads=2))
    packaged_vit.convert(as_onnx(model), tmp_path / "vit", dtype)
    assert {p.name for p in (tmp_path / "vit").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["dtype"] == dtype
    loaded = load_backbone(tmp_path / "vit", "float32", "cpu")
    pixels = torch.randn(2, 3, 28, 28, generator=generator(0))
    want = model(pixel_values=pixels).last_hidden_state
    got = loaded(pixel_values=pixels).last_hidden_state
    assert float((got - want).abs().max()) < (1e-5 if dtype == "float32" else 2e-2)
    with pytest.raises(LoralloyError, match="exists already"):
        packaged_vit.convert(as_onnx(model), tmp_path / "vit", dtype)


def test_what_is_no_such_graph_is_refused(model, tmp_path):
    state = packaged_vit.read_onnx(as_onnx(model))
    del state["encoder.layer.1.mlp.fc1.bias"]
    with pytest.raises(LoralloyError, match=r"differ in 'encoder\.layer\.1\.mlp\.fc1\.bias'"):
        packaged_vit.build_model(state, heads=2)
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    with pytest.raises(LoralloyError, match="no DINOv2 backbone"):
        packaged_vit.read_onnx(empty.SerializeToString())
    with pytest.raises(LoralloyError, match="--dtype 'int8'"):
        packaged_vit.convert(b"", tmp_path / "vit", "int8")
    assert not (tmp_path / "vit").exists()
