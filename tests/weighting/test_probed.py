"""The probe: what it reads against dW itself, its invariances, and Llama, ViT, BERT and GPT-2 as models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import adapter, factors, generator, peft_folder, tiny_gpt2, tiny_llama
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.weighting.gating import Gate
from loralloy.weighting.probed import SIGNALS, Readings, probe, text_batches


def tiny_vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config).eval()


def tiny_bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tokens(rows: int = 3, length: int = 7, vocab: int = 40, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids, the last row padded by two and the second by one."""
    ids = torch.randint(3, vocab, (rows, length), generator=generator(seed))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, -2:] = 0
    mask[1, -1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(rows: int = 3) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator(0))}


MODELS = {
    "llama": (tiny_llama, ["q_proj", "down_proj", "lm_head"], tokens),
    "llama backbone": (tiny_llama, ["v_proj", "gate_proj", "embed_tokens"], tokens),
    "vit": (tiny_vit, "all-linear", images),
    "bert": (tiny_bert, ["query", "dense"], tokens),
    "gpt2": (tiny_gpt2, ["c_attn", "c_fc"], tokens),
}


def bank_of(model, targets, folder, ranks=(4, 2)) -> Bank:
    made = []
    for i, r in enumerate(ranks):
        config = {"fan_in_fan_out": True} if type(model).__name__.startswith("GPT2") else {}
        place = peft_folder(model, folder / f"a{i}", i + 1, r=r, target_modules=targets, **config)
        made.append(Adapter.load(place))
    return Bank(made, assume_same_base=True)


def reference(model, bank: Bank, batch) -> dict[str, np.ndarray]:
    """The three signals, token by token from the definitions, dW formed; mean over tokens, [M, n]."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        model.get_submodule(m).register_forward_hook(lambda _, args, y, m=m: seen.__setitem__(m, (args[0], y)))
        for m in bank.modules
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch.get("attention_mask")
    result = {name: np.zeros((len(bank.modules), len(bank))) for name in SIGNALS}
    for k, m in enumerate(bank.modules):
        x, y = seen[m]
        target = model.get_submodule(m)
        if isinstance(target, torch.nn.Embedding):
            x = torch.nn.functional.one_hot(x, target.num_embeddings)
        elif target.bias is not None:
            y = y - target.bias.detach()
        keep = (
            mask.bool()
            if mask is not None and x.shape[:2] == mask.shape
            else torch.ones(x.shape[:-1], dtype=torch.bool)
        )
        x, y = x[keep].double(), y[keep].double()
        for i, name in enumerate(bank.names):
            dw = bank[name][m].dense()
            answer = (x @ dw.T).norm(dim=1)
            unit = answer / dw.norm()
            result["norm"][k, i] = answer.mean()
            result["response"][k, i] = (unit / x.norm(dim=1)).mean()
            result["base"][k, i] = (unit * target.weight.detach().double().norm() / y.norm(dim=1)).mean()
    return result


@pytest.mark.parametrize("name", MODELS)
def test_it_reads_what_dw_would_answer(name, tmp_path):
    make, targets, inputs = MODELS[name]
    model, batch = make(), inputs()
    with torch.no_grad():  # a new model's biases are 0
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator(1))
    bank = bank_of(model, targets, tmp_path)
    model.train()
    readings = probe(model, bank, [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}])
    assert model.training and not any(m._forward_hooks for m in model.modules())
    want = reference(model.eval(), bank, batch)
    assert readings.modules == tuple(bank.modules) and readings.inputs == 3 and not readings.left_out
    for signal in SIGNALS:
        np.testing.assert_allclose(readings.mean(signal), want[signal], rtol=2e-5)
    assert (readings.mean() <= 1 + 1e-6).all() and (readings.mean() > 0).all()


class Two(torch.nn.Module):
    """One linear layer after another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(9, 9) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def bank_two(change=lambda i, f: f, dtype=torch.float32) -> Bank:
    return Bank(
        adapter({f"layers.{m}": change(i, factors(9, 9, 3 + i, 10 * i + m, dtype=dtype)) for m in range(3)}, n)
        for i, n in enumerate(("task", "domain"))
    )


BATCH = {"x": torch.randn(5, 4, 9, generator=generator(3))}


def gates(readings: Readings, general: Readings) -> np.ndarray:
    return np.stack(
        [
            Gate(reference=r, by=by).shares(readings, general)
            for r in ("none", "general", "base")
            for by in ("module", "layer")
        ]
    )


def both(bank: Bank) -> tuple[Readings, Readings]:
    return probe(Two(), bank, [BATCH]), probe(Two(), bank, [{"x": 1 + BATCH["x"]}])


@settings(max_examples=15)
@given(st.floats(1e-4, 1e4), st.floats(1e-4, 1e4), st.booleans())
def test_an_adapters_size_does_not_matter(c_task, c_domain, in_scaling):
    """dW -> c dW, c > 0 and another for each adapter: the same responses, the same gates."""
    c = (c_task, c_domain)

    def change(i: int, f: LoraFactors) -> LoraFactors:
        return replace(f, scaling=f.scaling * c[i]) if in_scaling else replace(f, B=f.B * c[i])

    plain, scaled = both(bank_two()), both(bank_two(change))
    np.testing.assert_allclose(scaled[0].mean(), plain[0].mean(), rtol=1e-5)
    np.testing.assert_allclose(gates(*scaled), gates(*plain), atol=1e-4)
    np.testing.assert_allclose(scaled[0].mean("norm"), plain[0].mean("norm") * np.array(c), rtol=1e-5)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.floats(-2, 2))
def test_gauge_does_not_matter(seed, power):
    """(A, B) -> (G A, B G^-1), G of a condition up to about 1e4."""

    def change(i: int, f: LoraFactors) -> LoraFactors:
        g = torch.randn(f.rank, f.rank, generator=generator(seed + i), dtype=torch.float64) + 4 * torch.eye(f.rank)
        g = torch.diag(torch.logspace(0, power, f.rank, dtype=torch.float64)) @ g
        return replace(f, A=g @ f.A, B=torch.linalg.solve(g, f.B, left=False))

    plain, turned = both(bank_two(dtype=torch.float64)), both(bank_two(change, torch.float64))
    np.testing.assert_allclose(turned[0].mean(), plain[0].mean(), rtol=1e-5)
    np.testing.assert_allclose(gates(*turned), gates(*plain), atol=1e-4)


def test_factors_that_depend_on_each_other_are_read_right():
    """Columns of B that repeat or are zero, ranks above the width: Cholesky cannot take them."""

    def change(i: int, f: LoraFactors) -> LoraFactors:
        b = torch.cat([f.B, f.B, torch.zeros(9, 1)], 1)
        return LoraFactors(torch.cat([f.A, f.A.flip(0) / 3, f.A[:1]], 0), b, f.scaling)

    bank = bank_two(change)
    readings = probe(Two(), bank, [BATCH])
    x = BATCH["x"].reshape(-1, 9).double()
    for i, name in enumerate(bank.names):
        dw = bank[name]["layers.0"].dense()
        want = ((x @ dw.T).norm(dim=1) / x.norm(dim=1)).mean() / dw.norm()
        assert readings.mean()[0, i] == pytest.approx(float(want), rel=1e-5)


def test_absent_modules_and_zero_adapters_are_not_numbers():
    task, domain = bank_two().values()
    parts = {m: f for m, f in domain.items() if m != "layers.1"}
    parts["layers.2"] = replace(parts["layers.2"], B=torch.zeros(9, 4))
    bank = Bank([task, adapter(parts, "domain")])
    readings = probe(Two(), bank, [BATCH])
    assert np.isnan(readings.mean()).tolist() == [[False, False], [False, True], [False, True]]
    weights = Gate(reference="none").weights(readings)
    assert weights.of("task", "layers.1") == weights.of("task", "layers.2") == 1.0
    bank.check_weights(weights)


def test_inputs_apart_and_together():
    bank = bank_two()
    whole = probe(Two(), bank, [BATCH])
    parts = [probe(Two(), bank, [{"x": BATCH["x"][k : k + 1]}]) for k in range(5)]
    np.testing.assert_allclose(whole.sums["response"], np.concatenate([p.sums["response"] for p in parts]), rtol=1e-5)
    np.testing.assert_allclose(whole.of([3]).mean(), parts[3].mean(), rtol=1e-5)
    counts = np.array([[1, 1, 0, 0, 0], [0, 0, 2, 0, 0]])
    np.testing.assert_allclose(whole.mean(counts=counts)[1], parts[2].mean(), rtol=1e-5)


def test_what_cannot_be_probed_is_said_or_refused():
    bank = bank_two()
    with pytest.raises(LoralloyError, match="nothing to probe"):
        probe(Two(), bank, [])
    with pytest.raises(LoralloyError, match=r"'task' has module 'layers.0', which the model does not"):
        probe(torch.nn.Linear(9, 9), bank, [BATCH])
    with pytest.raises(LoralloyError, match=r"module 'layers.0' of adapter 'task': .*expects a weight of \[9, 9\]"):
        wrong = Two()
        wrong.layers[0] = torch.nn.Linear(9, 8)
        probe(wrong, bank, [BATCH])

    class Half(Two):
        def forward(self, x):
            return self.layers[0](x)

    readings = probe(Half(), bank, [BATCH])
    assert readings.modules == ("layers.0",) and set(readings.left_out) == {"layers.1", "layers.2"}
    weights = Gate(reference="none", scale=(1.0, 0.5)).weights(readings)
    assert weights.of("domain", "layers.2") == 0.5


def test_texts_become_padded_batches():
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    batches = list(text_batches(tokenizer, ["abc", "a", "abcdef"], batch_size=2, max_length=4))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 3), (1, 4)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(LoralloyError, match="has no token"):
        list(text_batches(tokenizer, [""]))
