"""Recipes whose adapters are freed of input directions first, and the file that holds them."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import save_file

from helpers import adapter, factors, relative
from loralloy import merging
from loralloy.errors import LoralloyError
from loralloy.recipe import Recipe
from loralloy.recipe.freed import freed_adapter, packed, read, without


def directions(width=8, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, count, generator=generator)).Q.contiguous()


def test_what_is_left_is_dw_without_the_directions():
    f, q = factors(6, 8, 3, 1), directions()
    dense, left = f.dense(), without(f, q)
    assert relative(left.dense(), dense - dense @ q.double() @ q.double().T) < 1e-6
    assert left.rank == f.rank and torch.equal(left.B, f.B) and relative(without(left, q).dense(), left.dense()) < 1e-6
    with pytest.raises(LoralloyError, match="are of 5 inputs and the module has 8"):
        without(f, directions(5))


@pytest.fixture
def made(tmp_path):
    """Two adapters on disk, the directions of one module, and a recipe of the second freed of them."""
    for name, seed in (("a", 1), ("b", 2)):
        parts = {m: factors(6, 8, 2, seed + n) for n, m in enumerate(("x.q_proj", "x.k_proj"))}
        adapter(parts, name).save(tmp_path / name)
    save_file({"x.q_proj": directions(), "y.other": directions(3, 1)}, tmp_path / "q.safetensors")
    entries = [{"path": "a", "weight": 0.5}, {"path": "b", "weight": 2.0, "freed": "q.safetensors"}]
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"version": 1, "rule": "svd", "rank": "full", "adapters": entries})
    )
    return tmp_path


def test_a_recipe_frees_its_adapters(made):
    job = Recipe.load(made / "recipe.yaml").prepare()
    got = job.merge(made / "out").adapter
    plain = job.opened
    want = freed_adapter(plain["b"], {"x.q_proj": directions()})
    for m in ("x.q_proj", "x.k_proj"):
        assert relative(got[m].dense(), 0.5 * plain["a"][m].dense() + 2 * want[m].dense()) < 2e-3
    assert relative(want["x.q_proj"].dense(), plain["b"]["x.q_proj"].dense()) > 0.05
    assert torch.equal(want["x.k_proj"].A, plain["b"]["x.k_proj"].A)
    parents = got.provenance["merge"]["parents"]
    assert "freed_from" not in parents[0] and parents[1]["freed_from"] == plain["b"].content_hash != parents[1]["hash"]
    assert (
        f"| b | 2 | `{plain['b'].content_hash}`, freed of what its inputs shared |"
        in (made / "out/README.md").read_text()
    )
    locked = yaml.safe_load((made / "out/recipe.yaml").read_text())["adapters"]
    assert "freed" not in locked[0] and locked[1]["hash"] == plain["b"].content_hash
    assert locked[1]["freed"] == {"path": "freed.safetensors", "hash": packed({"x.q_proj": directions()})[1]}
    again = Recipe.load(made / "out/recipe.yaml").prepare().merge().adapter
    assert all(torch.equal(again[m].A, got[m].A) and torch.equal(again[m].B, got[m].B) for m in got)
    lock = Recipe.load(made / "recipe.yaml").lock()
    assert (
        lock.adapters[1].freed.hash == read(made / "q.safetensors")[1]
        and lock.adapters[1].freed.path == "q.safetensors"
    )
    assert any("adapter b is freed of the directions in q.safetensors" in note for note in job.notes())


def test_what_is_wrong_with_the_file_is_said_at_the_field(made):
    def refused(said, **entry):
        data = yaml.safe_load((made / "recipe.yaml").read_text())
        data["adapters"][1]["freed"] = entry
        (made / "bad.yaml").write_text(yaml.safe_dump(data))
        with pytest.raises(LoralloyError, match=said):
            Recipe.load(made / "bad.yaml").prepare()

    refused(r"bad.yaml:\d+:\d+: .*none.safetensors cannot be read", path="none.safetensors")
    refused("unknown field.*known here: path, hash", path="q.safetensors", count=1)
    refused("is not the file that this recipe was locked to", path="q.safetensors", hash="sha256:" + "0" * 64)
    save_file({"y.other": directions(3, 1)}, made / "other.safetensors")
    refused("directions of none of the modules of adapter 'b'", path="other.safetensors")
    save_file({"x.q_proj": directions(3, 1)}, made / "narrow.safetensors")
    refused("another width than module 'x.q_proj'", path="narrow.safetensors")
    save_file({"x.q_proj": torch.ones(8)}, made / "flat.safetensors")
    refused("'x.q_proj' holds no directions", path="flat.safetensors")


def test_two_adapters_freed_of_different_directions_at_one_module_are_not_written_as_one_file(made, monkeypatch):
    save_file({"x.q_proj": directions(seed=3)}, made / "p.safetensors")
    data = yaml.safe_load((made / "recipe.yaml").read_text())
    data["adapters"][0]["freed"] = "p.safetensors"
    (made / "two.yaml").write_text(yaml.safe_dump(data))
    job = Recipe.load(made / "two.yaml").prepare()
    assert job.merge().adapter.max_rank > 0
    with pytest.raises(
        LoralloyError, match=r"adapter 'b' is freed of other directions at 'x.q_proj' than one before it"
    ):
        job.merge(made / "out")
    assert not (made / "out").exists()
    monkeypatch.setattr(merging, "merge", None)  # it is said before any work
    with pytest.raises(LoralloyError, match="give both one file"):
        job.merge(made / "out")
