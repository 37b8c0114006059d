"""Where a composition acts: norms by layer and projection, against dense matrices in float64."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from serving_scenes import refused

from loralloy.merging import get_rule, merge
from loralloy.serving.layers import Grid, LayerNorms
from loralloy.serving.service import Limits
from loralloy.weights import Weights

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def module(layer, projection):
    return f"model.layers.{layer}.{'mlp' if projection in MLP else 'self_attn'}.{projection}"


def check(table, said, dense):
    """Every cell is the norm of `dense(module)`."""
    assert said["projections"] == [*ATTENTION, *MLP]
    for i, layer in enumerate(said["layers"]):
        for j, projection in enumerate(said["projections"]):
            want = float(torch.linalg.norm(dense(module(layer, projection))))
            assert table[i][j] == pytest.approx(want, rel=1e-5)


def test_a_weighted_sum(api, tiny):
    said = api.post("/v1/layers", model="0.5*spam - 2*weather").json()
    assert said["composition"] == "0.5*spam - 2.0*weather" and said["cache"] == "live" and said["rule"] == "linear"
    assert said["layers"] == [str(i) for i in range(len(said["layers"]))] and len(said["layers"]) >= 2
    spam, weather = tiny.bank["spam"], tiny.bank["weather"]
    assert [(a["adapter"], a["weight"]) for a in said["adapters"]] == [("spam", 0.5), ("weather", -2.0)]
    check(said["adapters"][0]["norms"], said, lambda m: 0.5 * spam[m].dense())
    check(said["adapters"][1]["norms"], said, lambda m: 2 * weather[m].dense())
    check(said["total"], said, lambda m: 0.5 * spam[m].dense() - 2 * weather[m].dense())


def test_a_rule_is_measured_once_it_is_merged(api, tiny):
    text = "spam + 0.5*weather @ ties(density=0.3)"
    cold = api.post("/v1/layers", model=text).json()
    assert cold["cache"] == "cold" and "total" in cold and cold["total"] is None and len(cold["adapters"]) == 2
    assert api.call("GET", "/v1/compositions").json()["data"] == []  # nothing was merged for it
    merged = api.post("/v1/layers", model=text, prepare=True).json()
    assert merged["cache"] == "merged" and merged["adapters"] == cold["adapters"]
    made = merge(tiny.bank, Weights({"spam": 1.0, "weather": 0.5}), get_rule("ties")(density=0.3)).adapter
    check(merged["total"], merged, lambda m: made[m].dense())
    again = api.post("/v1/layers", model=text).json()
    assert again["cache"] == "hit" and again["total"] == merged["total"]


@pytest.mark.parametrize("after", [1, 2])
def test_one_that_is_driven_out_at_that_moment_is_not_merged(api, monkeypatch, after):
    """Room is made for another once its key has been made `after` times: then or before it is cold, or it is in use."""
    text, compositions = "spam + 0.5*weather @ ties(density=0.3)", api.service.compositions
    merged = api.post("/v1/layers", model=text, prepare=True).json()
    key, made = compositions.key, []

    def key_and_gone(composition):
        made.append(key(composition))
        if len(made) == after:
            compositions._kept.clear()
        return made[-1]

    monkeypatch.setattr(compositions, "key", key_and_gone)
    monkeypatch.setattr(compositions, "_merge_now", lambda *_: pytest.fail("it was merged"))
    said = api.post("/v1/layers", model=text).json()
    gone = len(made) >= after
    assert (said["cache"], said["total"]) == (("cold", None) if gone else ("hit", merged["total"]))


def test_what_has_no_layers(api):
    base = api.post("/v1/layers", model="base").json()
    assert (base["layers"], base["adapters"], base["total"]) == ([], [], [])
    refused(api.post("/v1/layers", model="auto"), 400, "auto is composed for each request")
    refused(api.post("/v1/layers", model="auto @ ties"), 400, "auto is composed for each request")
    refused(api.post("/v1/layers", model="music"), 404, "no adapter 'music'")
    assert refused(api.post("/v1/layers", model="spam + @ ties"), 400, "expected an adapter's name")["position"] == 7


def test_modules_as_a_table():
    names = [f"model.layers.{i}.self_attn.{p}" for i in (10, 2, 0) for p in ("v_proj", "q_proj", "zz")]
    grid = Grid.of(["lm_head", *names])
    assert grid.layers == ["0", "2", "10", "lm_head"] and grid.projections == ["q_proj", "v_proj", "lm_head", "zz"]
    table = grid.table({"lm_head": 3.0, "model.layers.2.self_attn.v_proj": 0.5})
    assert table == [[None] * 4, [None, 0.5, None, None], [None] * 4, [None, None, 3.0, None]]


def test_experts_share_a_cell_and_stacks_do_not():
    experts = [f"model.layers.1.mlp.experts.{i}.w1" for i in range(2)]
    grid = Grid.of(experts)
    assert (grid.layers, grid.projections) == (["1"], ["w1"])
    assert grid.table({experts[0]: 3.0, experts[1]: 4.0}) == [[5.0]]
    two = Grid.of(["encoder.block.1.q", "decoder.block.1.q", "decoder.block.0.q"])
    assert two.layers == ["decoder.block.0", "decoder.block.1", "encoder.block.1"]


def test_limits(serve, monkeypatch):
    """One at a time; too many are 429, too long is 504, and then the thread is free again."""
    api = serve(limits=Limits(seconds=0.3))
    layers, seen, free = api.service.layers, [], threading.Event()
    layers.max_waiting = 2
    report = LayerNorms._report

    def slow(self, ready, gone):
        free.wait(10)
        seen.append(gone())
        return report(self, ready, gone)

    monkeypatch.setattr(LayerNorms, "_report", slow)

    async def go():
        async with api.client() as client:
            return await asyncio.gather(*(client.post("/v1/layers", json={"model": "spam"}) for _ in range(3)))

    codes = sorted(r.status_code for r in api.run(go()))
    assert codes == [429, 504, 504]
    free.set()
    layers._pool.submit(lambda: None).result(10)
    assert seen and all(seen)  # who went on for nobody was told
    monkeypatch.undo()
    layers.seconds = 30
    assert api.post("/v1/layers", model="spam").status_code == 200


def test_what_the_server_has(api, serve):
    said = api.call("GET", "/v1/server").json()
    assert said["auto"] and said["templates"] == ["auto", "none", "cooking", "spam", "weather"]
    assert said["adapters"] == 3 and said["max_tokens"] == 1024 and "ties" in said["rules"] and not said["chat"]
    bare = serve(index=False, limits=Limits(max_tokens=7)).call("GET", "/v1/server").json()
    assert not bare["auto"] and bare["templates"] == ["none"] and bare["max_tokens"] == 7
    locked = serve(key="k")
    for method, path, body in (("GET", "/v1/server", None), ("POST", "/v1/layers", {"model": "spam"})):
        refused(locked.call(method, path, body), 401, "API key")
