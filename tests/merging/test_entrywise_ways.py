"""ties, dare_linear, dare_ties, magnitude_prune: the same whatever the batches and blocks; DARE by seed, content and module."""

from __future__ import annotations

import pytest
import torch
from entry_scenes import ALL_SPACES, DTYPES, SPACES, Scene, merged
from torch import Tensor

from helpers import adapter, relative
from loralloy.bank import Bank
from loralloy.factors import LoraFactors
from loralloy.merging import (
    DareLinear,
    DareTies,
    MagnitudePrune,
    Rule,
    Space,
    Ties,
    merge,
    select,
    spaces,
    stacking,
)
from loralloy.weights import Weights

SOME = [
    Ties(density=0.3), Ties(density=0.6, majority="frequency", vote="weighted"), MagnitudePrune(density=0.45),
    MagnitudePrune(density=0.45, prune="merged"), DareLinear(density=0.4, seed=1), DareTies(density=0.4, seed=2),
]  # fmt: skip


def shared(grid: bool, dtype: torch.dtype = torch.float32) -> Scene:
    """Four modules of one shape and one of another, in three adapters."""
    g = torch.Generator().manual_seed(7)
    modules = {"p": (6, 8), "q": (6, 8), "r": (6, 8), "s": (6, 8), "t": (9, 5)}

    def draw(*shape: int) -> Tensor:
        return (torch.randint(-3, 4, shape, generator=g).float() if grid else torch.randn(shape, generator=g)).to(dtype)

    adapters = [
        adapter(
            {m: LoraFactors(draw(2, i), draw(o, 2), 0.5) for m, (o, i) in modules.items() if (n, m) != ("b", "r")}, n
        )
        for n in "abc"
    ]
    return Scene(Bank(adapters), {"a": 1.0, "b": -0.5, "c": 0.25})


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("space", ALL_SPACES)
@pytest.mark.parametrize("rule", SOME, ids=str)
def test_batches_and_blocks_do_not_matter(rule, space, grid, monkeypatch):
    """One module at a time; a row at a time; selection from samples: identical, masks too.

    Off the grid blocks of another shape may round dW another way, and no more.
    """
    _same_in_batches_and_blocks(shared(grid), rule, space, grid or space == "factors", monkeypatch)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rule", [Ties(density=0.3, trim="all"), MagnitudePrune(density=0.45, trim="all")], ids=str)
def test_batches_do_not_decide_which_equals_stay(rule, space, monkeypatch):
    _same_in_batches_and_blocks(shared(True), rule, space, True, monkeypatch)


def _same_in_batches_and_blocks(
    scene: Scene, rule: Rule, space: Space, exactly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scene.merged(rule, space)
    changes = [
        [(stacking, "_BUDGET", {"cpu": 1})],
        [(spaces, "_BLOCK", 16)],
        [(stacking, "_BUDGET", stacking._BUDGET)],
        [(select, "_SMALL", 1), (select, "_SAMPLE", 6)],
    ]
    for change in changes:
        for where, name, value in change:
            monkeypatch.setattr(where, name, value)
        again = scene.merged(rule, space)
        assert list(again) == list(first)
        for m, x in first.items():
            assert torch.equal(again[m], x) if exactly else relative(again[m], x) < 1e-6, m


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [*SOME, Ties(trim="all"), MagnitudePrune(density=0.45, trim="all")], ids=str)
def test_equal_input_gives_equal_bytes(rule, dtype, tmp_path):
    for space in ALL_SPACES:
        for i in (1, 2):
            scene = shared(True, dtype)
            merge(scene.bank, Weights(scene.weights), rule, space).adapter.save(tmp_path / space / f"{i}")
        one, two = ((tmp_path / space / f"{i}" / "adapter_model.safetensors").read_bytes() for i in (1, 2))
        assert one == two


def test_seeds_differ():
    scene = shared(False)
    for rule in (DareLinear, DareTies):
        one, again, other = (scene.merged(rule(seed=s), "delta")["p"] for s in (3, 3, 4))
        assert torch.equal(one, again) and relative(other, one) > 0.1


def test_dare_drops_adapters_and_modules_apart():
    """The same factors in two modules, or in two adapters of other content, lose other entries; equal adapters the same."""
    g = torch.Generator().manual_seed(1)
    f = LoraFactors(torch.randn(2, 40, generator=g), torch.randn(30, 2, generator=g))
    b = Bank([adapter({"p": f, "q": f}, "a"), adapter({"p": f}, "b"), adapter({"p": f, "q": f}, "twin")])
    kept = {n: {m: x != 0 for m, x in merged(b, {n: 1.0}, DareLinear, "delta").items()} for n in b}
    assert 0.4 < float((kept["a"]["p"] == kept["a"]["q"]).double().mean()) < 0.6
    assert 0.4 < float((kept["a"]["p"] == kept["b"]["p"]).double().mean()) < 0.6
    assert torch.equal(kept["a"]["p"], kept["twin"]["p"])


def test_what_is_dropped_cannot_overflow():
    f = LoraFactors(torch.full((1, 3), 1e15), torch.full((3, 1), 1e15))
    b = Bank([adapter({"m": f}, "a"), adapter({"m": f}, "b")])
    for rule in (DareLinear, DareTies):
        assert merged(b, {"a": 1.0, "b": 1.0}, rule(density=1e-30), "delta")["m"].abs().max() == 0
