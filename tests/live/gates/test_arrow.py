"""Arrow: exact prototypes, routing as written out token by token, and PEFT's own Arrow as the oracle."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import PROJECTIONS, adapter, close, factors, logits, peft_folder, tiny_llama
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live import Gated, LiveModel, Pass
from loralloy.live.gates import Arrow
from loralloy.live.gates.arrow import top_directions
from loralloy.weights import Weights

IDS = torch.arange(3, 35).reshape(4, 8)


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Four adapters of one rank and one set of modules, as PEFT's Arrow wants; the top singular value is far from the second, so
    that its power iteration converges."""
    root = tmp_path_factory.mktemp("arrow")
    result = []
    for i in range(4):
        made = Adapter.load(peft_folder(base, root / "plain" / f"e{i}", i + 1, target_modules=PROJECTIONS, r=3))
        parts = {}
        for module in made:
            f = made[module]
            parts[module] = replace(f, A=f.A * torch.tensor([6.0, 1, 1])[:, None])
        Adapter(made.name, parts, made.config, made.base).save(root / "bank" / f"e{i}")
        result.append(root / "bank" / f"e{i}")
    return result


@given(seed=st.integers(0, 99), ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_prototypes_are_top_right_singular_vectors(seed, ranks):
    parts = [factors(12, 9, rank, seed + i, dtype=torch.float64) for i, rank in enumerate(ranks)]
    for v, f in zip(top_directions(parts), parts, strict=True):
        dense = f.dense(torch.float64)
        s = torch.linalg.svdvals(dense)
        assert abs(float(v.norm()) - 1) < 1e-12
        assert abs(float((dense @ v).norm() - s[0])) < 1e-11 * float(s[0])


def test_prototypes_know_only_dw():
    """(A, B) and (GA, BG^-1) are one dW; more rank than features; a zero dW has no direction."""
    f, g = factors(12, 9, 3, 1, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    same = replace(f, A=g @ f.A, B=f.B @ torch.linalg.inv(g), scaling=-2.0)
    one, two = top_directions([f, same])
    assert abs(abs(float(one @ two)) - 1) < 1e-9
    wide = factors(4, 3, 6, 2, dtype=torch.float64)
    assert float((wide.dense() @ top_directions([wide])[0]).norm()) == pytest.approx(
        float(torch.linalg.svdvals(wide.dense())[0])
    )
    assert torch.equal(top_directions([replace(f, B=f.B * 0)]), torch.zeros(1, 9, dtype=torch.float64))


@pytest.mark.parametrize(("top_k", "temperature"), [(2, 1.0), (3, 0.3), (1, 1.0)])
def test_parity_with_peft(base, folders, top_k, temperature):
    """The logits of PEFT's own Arrow under its prototypes; its 15 power iterations find ours to float32's accuracy. On a base in
    float64: at a low temperature the routing makes a hundred times more of a last digit."""
    import copy

    from peft.tuners.lora import ArrowConfig
    from peft.tuners.lora.arrow import create_arrow_model

    base = copy.deepcopy(base).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
        theirs = create_arrow_model(copy.deepcopy(base), [str(f) for f in folders], config).eval()
    want = logits(theirs, IDS)
    live = LiveModel(base, Bank.load(folders))
    gate = Arrow(live, top_k, temperature)
    for module, mine in gate.prototypes.items():
        layer = theirs.base_model.model.get_submodule(module)
        other = layer.lora_arrow["arrow_router"].prototypes
        assert float(((mine * other).sum(1).abs() - 1).abs().max()) < 1e-6
        gate.prototypes[module] = other
    with live.gate(gate) as model:
        got = logits(model, IDS)
    with live.compose(Weights.uniform(live.names)) as model:
        even = logits(model, IDS)
    live.remove()
    assert got.dtype == torch.float64 and close(got, want)
    assert float((even - want).abs().max()) > 1e-2


def test_as_written_out(base, folders):
    live = LiveModel(base, Bank.load(folders))
    gate, name = Arrow(live, 2, 0.5), "model.layers.0.self_attn.k_proj"
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    allowed = torch.tensor([[True, True, True, True], [False, True, False, True]])
    c = gate(name, x, Pass(allowed))
    for b in range(2):
        for t in range(3):
            scores = (gate.prototypes[name] @ x[b, t]).abs()
            best = sorted((float(s), i) for i, s in enumerate(scores) if allowed[b, i])[-2:]
            e = torch.tensor([s for s, _ in best]).div(0.5).exp()
            want = torch.zeros(4)
            want[[i for _, i in best]] = e / e.sum()
            assert close(c[b, t], want)
    live.remove()


def test_one_allowed_adapter_is_that_adapter(base, folders):
    live = LiveModel(base, Bank.load(folders))
    with Gated(live, Arrow(live, 3), torch.eye(4).bool()).rows() as model:
        got = logits(model, IDS)
    with live.compose([Weights({name: 1.0}) for name in live.names]) as model:
        assert close(got, logits(model, IDS))
    live.remove()


def test_absent_modules_do_not_compete():
    net = torch.nn.ModuleDict({"m": torch.nn.Linear(9, 12), "n": torch.nn.Linear(9, 12)})
    bank = Bank([adapter({"m": factors(seed=1)}, "a"), adapter({"m": factors(seed=2), "n": factors(seed=3)}, "b")])
    live = LiveModel(net, bank)
    gate, x = Arrow(live, 1), torch.randn(5, 4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gate("n", x, Pass()), torch.tensor([0.0, 1.0]).expand(5, 4, 2))
    assert torch.equal(gate("n", x, Pass(torch.tensor([[True, False]]))), torch.zeros(5, 4, 2))
    assert set(gate("m", x, Pass()).argmax(-1).flatten().tolist()) == {0, 1}


def test_refusals(base, folders):
    live = LiveModel(base, Bank.load(folders))
    with pytest.raises(LoralloyError, match="top_k is 0"):
        Arrow(live, 0)
    with pytest.raises(LoralloyError, match="temperature is 0"):
        Arrow(live, 1, 0)
    live.remove()
