"""LoGo: its weights are those of the formula, written out on hidden states."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tokenizer

from helpers import PROJECTIONS, peft_folder, tiny_llama
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live import LiveModel
from loralloy.live.gates import Logo
from loralloy.weights import Weights

PROMPTS = ["a question of some length", "short", "another one here"]
LAST = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def live(tmp_path_factory, tokenizer):
    base = tiny_llama(vocab=len(tokenizer))
    root = tmp_path_factory.mktemp("bank")
    for i, name in enumerate("abcd"):
        peft_folder(base, root / name, i + 1, target_modules=PROJECTIONS, r=2 + i, lora_alpha=4 + 3 * i)
    live = LiveModel(base, Bank.load(root))
    yield live
    live.remove()


def oracle(live, tokenizer, prompt, names, signal="norm", attached="sum"):
    """Signals of one prompt, unpadded, from transformers' own hidden states; the residual stream into the last layer."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    weight = {"sum": 1.0, "mean": 1 / len(names), "none": 0.0}[attached]
    with live.compose(Weights(dict.fromkeys(names, weight))), torch.no_grad():
        h = live.model(ids, output_hidden_states=True).hidden_states[1][0, -1]
    found = {}
    for name in names:
        o = live.bank[name][LAST].dense(torch.float32) @ h
        p = o.softmax(0)
        found[name] = float(o.norm()) if signal == "norm" else float(1 / (-(p * p.log()).sum() + 1e-6))
    return found


@pytest.mark.parametrize("signal", ["norm", "entropy"])
@pytest.mark.parametrize("attached", ["sum", "mean", "none"])
def test_weights_are_the_formula_s(live, tokenizer, signal, attached):
    logo = Logo(live, 3, signal, attached=attached)
    assert logo.module == LAST
    for prompt, got in zip(PROMPTS, logo.weigh(tokenizer, PROMPTS, batch_size=2), strict=True):
        want = oracle(live, tokenizer, prompt, live.names, signal, attached)
        best = sorted(want, key=lambda n: -want[n])[:3]
        total = sum(want[n] for n in best)
        assert sorted(got.names) == sorted(best)
        assert all(got.of(n) == pytest.approx(want[n] / total, rel=1e-4) for n in best)


def test_withheld_adapters_are_neither_attached_nor_chosen(live, tokenizer):
    allowed = torch.tensor([[True, True, True, True], [True, False, True, False], [False, False, False, True]])
    got = Logo(live).weigh(tokenizer, PROMPTS, allowed)
    assert sorted(got[0].names) == live.names and got[2].coefficients == {"d": 1.0}
    want = oracle(live, tokenizer, PROMPTS[1], ["a", "c"])
    assert got[1].of("a") == pytest.approx(want["a"] / (want["a"] + want["c"]), rel=1e-4)
    assert all(sum(w for _, w in row.items()) == pytest.approx(1) for row in got)


def test_the_projection_s_own_input(live, tokenizer):
    """With input "projection" h is what the module is given, after the layer's norm."""
    seen = {}
    handle = live.model.get_submodule(LAST).register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    with live.compose(Weights(dict.fromkeys(live.names, 1.0))), torch.no_grad():
        live.model(ids)
    handle.remove()
    norms = {n: float((live.bank[n][LAST].dense(torch.float32) @ seen["x"][0, -1]).norm()) for n in live.names}
    got = Logo(live, input="projection").weigh(tokenizer, PROMPTS[:1])[0]
    assert all(got.of(n) == pytest.approx(v / sum(norms.values()), rel=1e-4) for n, v in norms.items())


def test_refusals(live, tokenizer, tmp_path):
    for wrong, says in (
        ({"signal": "size"}, "signal 'size' is unknown; use one of norm, entropy"),
        ({"attached": "all"}, "attached 'all' is unknown"),
        ({"input": "x"}, "input 'x' is unknown"),
        ({"top_k": 0}, "top_k is 0"),
        ({"module": "nowhere"}, "adapter 'a' has no module 'nowhere'"),
    ):
        with pytest.raises(LoralloyError, match=says):
            Logo(live, **wrong)
    with pytest.raises(LoralloyError, match="allows no adapter"):
        Logo(live).weigh(tokenizer, PROMPTS[:1], torch.zeros(1, 4))
    with pytest.raises(LoralloyError, match="batch_size is 0"):
        Logo(live).weigh(tokenizer, PROMPTS, batch_size=0)
