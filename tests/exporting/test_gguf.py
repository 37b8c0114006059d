"""A GGUF LoRA read back: dW by module, as llama.cpp would apply it, against the adapter's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers import PROJECTIONS, adapter, factors, generator, peft_folder, relative, tiny_gpt2, tiny_llama
from loralloy.adapter import Adapter
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.exporting.gguf import export_gguf
from loralloy.factors import LoraFactors

gguf = pytest.importorskip("gguf")

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def base(folder: Path, **more) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | more))
    return folder


def fields(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def applied(path: Path) -> dict[str, torch.Tensor]:
    """tensor -> what llama.cpp adds: alpha / rank * B @ A, the rank being B's columns (its llama-adapter.h, get_scale)."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    parts = {t.name: torch.from_numpy(t.data.copy()).double() for t in reader.tensors}
    names = {name.rsplit(".lora_", 1)[0] for name in parts}
    assert set(parts) == {f"{name}.lora_{side}" for name in names for side in "ab"}
    result = {}
    for name in names:
        a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        if name == "token_embd.weight":  # rows of A are looked up by token
            a = a.T
        result[name] = alpha / b.shape[1] * b @ a
    return result


def rotated(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What transformers' rows are in llama.cpp's order, written out: row 2i of a head was i, row 2i + 1 was size/2 + i."""
    size = rows.shape[0] // heads
    order = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2) for half in range(2)]
    return rows[order]


@pytest.mark.parametrize(("dtype", "bound"), [("f32", 1e-6), ("f16", 2e-3)])
@pytest.mark.parametrize("rslora", [False, True])
def test_llama_module_by_module(dtype, bound, rslora, tmp_path):
    """Ranks and alphas that differ by module, and the embeddings of a base that does not tie them."""
    config = {
        "target_modules": [*PROJECTIONS, "lm_head", "embed_tokens"], "use_rslora": rslora,
        "rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"k_proj": 3, "up_proj": -20},
    }  # fmt: skip
    thing = Adapter.load(peft_folder(tiny_llama(), tmp_path / "a", 1, **config))
    done = export_gguf(thing, tmp_path / "a.gguf", base=base(tmp_path / "base"), dtype=dtype, weight=0.7)
    got = applied(tmp_path / "a.gguf")
    assert len(got) == len(thing) == 16 and set(done.tensors) == set(thing)
    for module in thing:
        want, name = 0.7 * thing[module].dense(), done.tensors[module]
        tail = module.split(".", 3)[-1]
        if module.startswith("model.layers."):
            assert name == f"blk.{module.split('.')[2]}.{NAMES[tail]}.weight"
        if tail.endswith(("q_proj", "k_proj")):
            want = rotated(want, 4 if tail.endswith("q_proj") else 2)
        assert relative(got[name], want) < bound, module
    assert (done.lost > 0) == (dtype == "f16") and done.lost < bound
    told = fields(tmp_path / "a.gguf")
    assert told["general.type"] == "adapter" and told["adapter.type"] == "lora"
    assert told["general.architecture"] == "llama" and told["adapter.lora.alpha"] == pytest.approx(done.alpha)


def test_one_alpha_leaves_a_and_b_alone(tmp_path):
    """Nothing is folded where alphas agree, whatever the ranks: the factors are PEFT's to the bit."""
    thing = Adapter.load(
        peft_folder(tiny_llama(), tmp_path / "a", 1, target_modules=PROJECTIONS, rank_pattern={"v_proj": 2})
    )
    done = export_gguf(thing, tmp_path / "a.gguf", base=base(tmp_path / "base"))
    assert (done.alpha, done.folded, done.lost) == (8.0, [], 0.0)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    f = thing["model.layers.1.self_attn.v_proj"]
    assert torch.equal(stored["blk.1.attn_v.weight.lora_a"], f.A) and torch.equal(
        stored["blk.1.attn_v.weight.lora_b"], f.B
    )


@pytest.mark.parametrize("scaling", [0.0, -0.5])
def test_scalings_of_zero_and_below(scaling, tmp_path):
    """An alpha of 0 would mean a scaling of 1."""
    parts = {
        f"model.layers.{i}.mlp.up_proj": LoraFactors(factors().A, factors().B, s) for i, s in enumerate([scaling, 0.0])
    }
    export_gguf(adapter(parts), tmp_path / "a.gguf", base=base(tmp_path / "base"))
    got = applied(tmp_path / "a.gguf")
    assert fields(tmp_path / "a.gguf")["adapter.lora.alpha"] != 0
    for i, f in enumerate(parts.values()):
        assert relative(got[f"blk.{i}.ffn_up.weight"], f.dense()) < 1e-6


MODULES = {
    "MistralForCausalLM": ("model.layers.1.mlp.down_proj", "blk.1.ffn_down.weight"),
    "Qwen2ForCausalLM": ("model.layers.1.self_attn.v_proj", "blk.1.attn_v.weight"),
    "Qwen3ForCausalLM": ("model.layers.1.self_attn.q_proj", "blk.1.attn_q.weight"),
    "GemmaForCausalLM": ("model.layers.1.mlp.gate_proj", "blk.1.ffn_gate.weight"),
    "Gemma2ForCausalLM": ("model.layers.1.self_attn.k_proj", "blk.1.attn_k.weight"),
    "Gemma3ForCausalLM": ("model.layers.1.self_attn.o_proj", "blk.1.attn_output.weight"),
    "Phi3ForCausalLM": ("model.layers.1.self_attn.qkv_proj", "blk.1.attn_qkv.weight"),
}


@pytest.mark.parametrize("architecture", MODULES)
def test_other_architectures_keep_their_rows(architecture, tmp_path):
    module, name = MODULES[architecture]
    f = factors(32, 16)
    export_gguf(adapter({module: f}), tmp_path / "a.gguf", base=base(tmp_path / "base", architectures=[architecture]))
    assert relative(applied(tmp_path / "a.gguf")[name], f.dense()) < 1e-6


def test_gpt2_is_not_transposed(tmp_path):
    """llama.cpp holds Conv1D's weight as [out, in], which is what dW is here."""
    model = tiny_gpt2()
    folder = peft_folder(model, tmp_path / "a", 1, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    (tmp_path / "base").mkdir()
    model.config.save_pretrained(tmp_path / "base")
    told = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(told | {"architectures": ["GPT2LMHeadModel"]}))
    thing = Adapter.load(folder)
    done = export_gguf(thing, tmp_path / "a.gguf", base=tmp_path / "base")
    got = applied(tmp_path / "a.gguf")
    assert done.tensors["transformer.h.1.attn.c_attn"] == "blk.1.attn_qkv.weight"
    assert all(relative(got[done.tensors[m]], thing[m].dense()) < 1e-6 for m in thing)


def test_names_without_model_in_front(tmp_path):
    """An adapter trained on the bare model (AutoModel)."""
    done = export_gguf(adapter({"layers.0.mlp.up_proj": factors()}), tmp_path / "a.gguf", base=base(tmp_path / "base"))
    assert done.tensors == {"layers.0.mlp.up_proj": "blk.0.ffn_up.weight"}


Q = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "architecture": ({Q: factors(32, 32)}, {"architectures": ["BertForMaskedLM"]}, r"architecture is BertForMaskedLM.*--into"),
    "no architecture": ({Q: factors(32, 32)}, {"architectures": None}, r"architecture is none"),
    "layer": ({"model.layers.2.mlp.up_proj": factors()}, {}, r"'model.layers.2.mlp.up_proj' \(linear\) is no tensor .* 2 layers"),
    "module": ({"model.visual": factors()}, {}, r"'model.visual' \(linear\) is no tensor"),
    "heads": ({Q: factors(36, 32)}, {}, r"36 outputs, but .* 4 heads of 8"),
    "tied head": ({"lm_head": factors()}, {"tie_word_embeddings": True}, r"'lm_head': the base ties .*--into"),
    "tied by default": (
        {"model.embed_tokens": LoraFactors(torch.zeros(2, 64), torch.zeros(32, 2), 1.0, "embedding")},
        {"architectures": ["GemmaForCausalLM"], "tie_word_embeddings": None},
        r"'model.embed_tokens': the base ties",
    ),
    "kind": ({"model.embed_tokens": factors()}, {}, r"a linear module cannot be llama.cpp's tensor 'token_embd'"),
    "twice": ({Q: factors(32, 32), Q[6:]: factors(32, 32)}, {}, r"are one tensor of llama.cpp's"),
    "conv": (
        {"model.layers.0.mlp.up_proj": LoraFactors(torch.zeros(2, 3, 3), torch.zeros(4, 2, 1), 1.0, "conv")},
        {},
        r"\(conv\) is no tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_take(case, tmp_path):
    parts, config, says = REFUSED[case]
    with pytest.raises(LoralloyError, match=says):
        export_gguf(adapter(parts), tmp_path / "a.gguf", base=base(tmp_path / "base", **config))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_other_refusals(tmp_path):
    thing, folder, out = adapter({Q: factors(32, 32)}), base(tmp_path / "base"), tmp_path / "a.gguf"
    saved = adapter({Q: factors(32, 32)}, extra={"lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(LoralloyError, match=r"saved whole tensors \(lm_head.weight\).*--into"):
        export_gguf(saved, out, base=folder)
    with pytest.raises(LoralloyError, match=r"--dtype 'q8_0'.*f32 or f16"):
        export_gguf(thing, out, base=folder, dtype="q8_0")
    with pytest.raises(LoralloyError, match=r"names, tiny/llama, is not here; .*--base"):
        export_gguf(thing, out)
    with pytest.raises(LoralloyError, match=r"names no base model; pass its folder as --base"):
        export_gguf(adapter({Q: factors(32, 32)}, base=BaseRef()), out)
    large, larger = (adapter({Q: LoraFactors(factors(32, 32).A.double() * x, factors(32, 32).B)}) for x in (1e6, 1e40))
    with pytest.raises(LoralloyError, match=r"A of module '.*q_proj' overflows fp16; write it as f32 \(--dtype f32\)"):
        export_gguf(large, out, base=folder, dtype="f16")
    for dtype in ("f16", "f32"):
        with pytest.raises(LoralloyError, match=r"A of module '.*q_proj' overflows fp32; give a smaller --weight"):
            export_gguf(larger, out, base=folder, dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    with pytest.raises(LoralloyError, match=r"base is a folder"):
        export_gguf(thing, folder, base=folder, overwrite=True)
    export_gguf(thing, out, base=folder)
    first = out.read_bytes()
    with pytest.raises(LoralloyError, match=r"exists already"):
        export_gguf(thing, out, base=folder)
    export_gguf(thing, out, base=folder, overwrite=True)
    assert out.read_bytes() == first and sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "base"]


def test_copies_of_the_base_are_left_out_and_it_is_said(tmp_path):
    """PEFT's copy of an embedding under an adapter; with another vocabulary it is no copy."""
    folder, name = base(tmp_path / "base", vocab_size=64), "model.embed_tokens.base_layer.weight"
    thing = Adapter.load(peft_folder(tiny_llama(), tmp_path / "a", 1, target_modules=["q_proj", "embed_tokens"]))
    assert name in thing.extra
    done = export_gguf(thing, tmp_path / "a.gguf", base=folder)
    assert len(done.notes) == 1 and name in done.notes[0] and "left out" in done.notes[0]
    more = Adapter("a", dict(thing), thing.config, thing.base, {name: torch.zeros(66, 32)})
    with pytest.raises(LoralloyError, match=r"with 66 rows, but the base's vocabulary has 64; .*--into"):
        export_gguf(more, tmp_path / "b.gguf", base=folder)
    plain = Adapter("a", dict(thing), thing.config, thing.base)
    assert export_gguf(plain, tmp_path / "c.gguf", base=folder).notes == []


def test_bf16_factors_are_widened(tmp_path):
    g = generator(0)
    f = LoraFactors(torch.randn(4, 32, generator=g).bfloat16(), torch.randn(48, 4, generator=g).bfloat16(), 2.0)
    done = export_gguf(adapter({"model.layers.0.mlp.up_proj": f}), tmp_path / "a.gguf", base=base(tmp_path / "base"))
    assert done.lost == 0 and relative(applied(tmp_path / "a.gguf")["blk.0.ffn_up.weight"], f.dense()) < 1e-7
