"""Linear routers: fresh ones are uniform, certain ones an adapter alone, and what is saved is what is loaded."""

from __future__ import annotations

import pytest
import torch

from helpers import PROJECTIONS, close, load_in_peft, logits, peft_folder, tiny_gpt2, tiny_llama
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live import Gated, LiveModel, Pass
from loralloy.live.gates import LinearRouter
from loralloy.weights import Weights

IDS = torch.arange(3, 27).reshape(3, 8)
LAYERS = ["model.layers.0", "model.layers.1"]


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("bank")
    for i, name in enumerate("abc"):
        peft_folder(base, root / name, i + 1, target_modules=PROJECTIONS, r=2 + i)
    return Bank.load(root)


@pytest.fixture
def live(base, bank):
    live = LiveModel(base, bank)
    yield live
    live.remove()


def randomised(router, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=g))
    return router.eval()


def certain(router, adapter):
    """A router that always wants one adapter."""
    with torch.no_grad():
        for bias in router.biases:
            bias[adapter] = 1e4
    return router.eval()


def test_layers_share_a_router(live):
    router = LinearRouter.of(live)
    assert list(router.groups) == LAYERS
    assert all(modules[0].endswith("q_proj") and len(modules) == 7 for modules in router.groups.values())
    assert [tuple(w.shape) for w in router.weights] == [(3, 32), (3, 32)]


@pytest.mark.parametrize("kind", ["token", "smear"])
def test_fresh_is_uniform(live, bank, kind):
    with live.compose(Weights.uniform(bank.names)) as model:
        want = logits(model, IDS)
    router = LinearRouter.of(live, kind).eval()
    c = router("model.layers.0.self_attn.q_proj", torch.randn(3, 8, 32), Pass())
    assert c.shape == (3, 8 if kind == "token" else 1, 3) and close(c.detach(), torch.full_like(c, 1 / 3))
    with live.gate(router) as model:
        got = logits(model, IDS)
    assert close(got, want) is (kind == "token")  # averaged factors have cross terms


@pytest.mark.parametrize(("kind", "top_k"), [("token", None), ("token", 1), ("smear", None)])
def test_certain_is_the_adapter_alone(live, base, bank, kind, top_k):
    with live.gate(certain(LinearRouter.of(live, kind, top_k), 1)) as model:
        got = logits(model, IDS)
    live.remove()
    assert close(got, logits(load_in_peft(base, bank["b"].path), IDS))


@pytest.mark.parametrize(("kind", "top_k"), [("token", None), ("token", 2), ("token", 1), ("smear", None)])
def test_masked_is_renormalised(live, bank, kind, top_k):
    """A withheld adapter has no part in the answer: as a bank of the others under the same scores."""
    router = randomised(LinearRouter.of(live, kind, top_k))
    allowed = torch.tensor([[True, False, True]])
    with Gated(live, router, allowed).rows() as model:
        got = logits(model, IDS)
    live.remove()
    two = LiveModel(live.model, bank.select(["a", "c"]))
    rest = LinearRouter.of(two, kind, top_k).eval()
    with torch.no_grad():
        for mine, theirs in zip([*rest.weights, *rest.biases], [*router.weights, *router.biases], strict=True):
            mine.copy_(theirs[[0, 2]])
    with two.gate(rest) as model:
        assert close(got, logits(model, IDS))
    two.remove()


def test_top_k_keeps_the_largest(live):
    soft = randomised(LinearRouter.of(live))
    two = randomised(LinearRouter.of(live, top_k=2))
    x = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(2))
    name = soft.groups[LAYERS[0]][0]
    with torch.no_grad():
        full, kept = soft(name, x, Pass()), two(name, x, Pass())
    least = full.argmin(-1, keepdim=True)
    want = full.scatter(-1, least, 0)
    assert close(kept, want / want.sum(-1, keepdim=True))


def test_a_row_is_pooled_over_its_own_tokens(live):
    """Padding has no part in a row's coefficients, nor has the size of its input."""
    router = randomised(LinearRouter.of(live, "smear"))
    name = router.groups[LAYERS[0]][0]
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.full((1, 3, 32), 9.0), x], 1)
    pooled = torch.tensor([[False] * 3 + [True] * 5])
    with torch.no_grad():
        want = router(name, x, Pass())
        assert close(router(name, padded, Pass(pooled=pooled)), want)
        assert close(router(name, 7 * x, Pass()), want)
        assert not close(router(name, padded, Pass()), want)


def test_saved_is_loaded(live, tmp_path):
    router = randomised(LinearRouter.of(live, "smear"), 3)
    router.save(tmp_path / "router.safetensors", {"steps": 5})
    again = LinearRouter.load(tmp_path / "router.safetensors")
    assert again.config == {"steps": 5} and again.kind == "smear" and again.groups == router.groups
    with live.gate(router) as model:
        want = logits(model, IDS)
    with live.gate(again) as model:
        assert torch.equal(logits(model, IDS), want)
    with pytest.raises(LoralloyError, match="exists already"):
        router.save(tmp_path / "router.safetensors")


def test_other_models(tmp_path):
    """GPT-2: its first module of a layer is c_attn."""
    base = tiny_gpt2()
    for i, name in enumerate("ab"):
        peft_folder(base, tmp_path / name, i, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    live = LiveModel(base, Bank.load(tmp_path))
    router = LinearRouter.of(live)
    assert [modules[0] for modules in router.groups.values()] == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    with live.compose(Weights({"b": 1.0})) as model:
        want = logits(model, IDS)
    with live.gate(certain(router, 1)) as model:
        assert close(logits(model, IDS), want)


def test_refusals(live, bank, tmp_path):
    with pytest.raises(LoralloyError, match="kind 'soft' is unknown; use one of token, smear"):
        LinearRouter.of(live, "soft")
    with pytest.raises(LoralloyError, match="top_k is 0"):
        LinearRouter.of(live, top_k=0)
    router, x = LinearRouter.of(live), torch.zeros(1, 2, 32)
    with pytest.raises(LoralloyError, match="no layer for module 'nowhere'"):
        router("nowhere", x, Pass())
    with pytest.raises(LoralloyError, match=r"k_proj' ran before .*q_proj"):
        router("model.layers.0.self_attn.k_proj", x, Pass())
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(LoralloyError, match="cannot be read as a router"):
        LinearRouter.load(tmp_path / "x.safetensors")
    with pytest.raises(LoralloyError, match="cannot be read as a router"):
        LinearRouter.load(tmp_path / "missing.safetensors")
    with pytest.raises(LoralloyError, match="no router file of version 1"):
        LinearRouter.load(bank["a"].path / "adapter_model.safetensors")
    with pytest.raises(LoralloyError, match="the gate is of the adapters"):
        Gated(LiveModel(live.model, bank.select(["a"])), router)
