"""The probe's moments against the activations themselves, and a merge that is judged by them."""

from __future__ import annotations

import pytest
import torch
from test_probed import MODELS, bank_of, tokens

from helpers import relative
from loralloy.errors import LoralloyError
from loralloy.merging import Tada
from loralloy.merging.tada import resolve
from loralloy.weighting.gating import Gate
from loralloy.weighting.moments import Moments
from loralloy.weighting.probed import probe
from loralloy.weighting.tada import compose


@pytest.mark.parametrize("name", MODELS)
def test_they_are_the_mean_over_tokens_of_what_a_answers(name, tmp_path):
    make, targets, inputs = MODELS[name]
    model, batch = make(), inputs()
    bank = bank_of(model, targets, tmp_path)
    readings = probe(
        model, bank, [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}], moments=True
    )
    assert not probe(model, bank, [batch]).moments
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(m).register_forward_hook(lambda _, args, y, m=m: seen.__setitem__(m, args[0]))
        for m in bank.modules
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch.get("attention_mask")
    for m in readings.modules:
        x = seen[m]
        if isinstance(model.get_submodule(m), torch.nn.Embedding):
            x = torch.nn.functional.one_hot(x, model.get_submodule(m).num_embeddings)
        x = x[mask.bool()] if mask is not None and x.shape[:2] == mask.shape else x.flatten(0, -2)
        answers = x.double() @ torch.cat([f.a for f in bank.factors(m).values()]).double().T
        got = readings.moments[m]
        assert relative(got.matrix, answers.T @ answers / len(answers)) < 1e-5
        assert got.ranks == {n: f.rank for n, f in bank.factors(m).items()}


def test_a_part_of_them_is_of_the_adapters_asked_for():
    full = Moments({"a": 2, "b": 1, "c": 2}, torch.arange(25.0).reshape(5, 5))
    assert full.of(["c", "a"]).tolist() == full.matrix[[3, 4, 0, 1]][:, [3, 4, 0, 1]].tolist()
    assert full.of(["a", "b", "c"]).equal(full.matrix)


def test_compose_judges_on_activations(tmp_path):
    make, targets, _ = MODELS["llama"]
    model = make()
    bank_of(model, targets, tmp_path)
    folders = [tmp_path / "a0", tmp_path / "a1"]
    batches = [tokens(rows=6, seed=3)]
    how = {"gate": Gate(kind="uniform"), "assume_same_base": True, "rank": "full"}
    rule = Tada(conflict="opposed", threshold=0.0)
    done = compose(folders, model, batches, rule=rule, judge="activations", **how)
    plain = compose(folders, model, batches, rule=rule, common=0, **how)
    assert done.conflicts.keys() == plain.conflicts.keys()
    from loralloy.adapter import Adapter
    from loralloy.bank import Bank
    from loralloy.merging.stack import Stack

    bank = Bank([Adapter.load(f) for f in folders], assume_same_base=True)
    moments = probe(model, bank, batches, moments=True).moments
    unlike = 0
    for m in bank.modules:
        parts = list(bank.factors(m).values())
        stack = Stack(
            tuple(f.a[None].double() for f in parts), tuple(f.b[None].double() for f in parts),
            torch.tensor([[f.scaling] for f in parts]).double(), torch.ones(2, 1).double(),
            torch.zeros(2, 1, dtype=torch.int64),
        )  # fmt: skip
        want = resolve(stack, "opposed", 0.0, moments[m].matrix[None])[0].dense()[0]
        assert relative(done.merged.adapter[m].dense(), want) < 1e-4
        unlike += relative(plain.merged.adapter[m].dense(), want) > 1e-2
    assert unlike
    with pytest.raises(LoralloyError, match="no recipe can repeat"):
        compose(folders, model, batches, tmp_path / "out", judge="activations", **how)
    with pytest.raises(LoralloyError, match="rule 'tada' alone"):
        from loralloy.merging import Ties

        compose(folders, model, batches, rule=Ties(density=0.5), judge="activations", **how)
