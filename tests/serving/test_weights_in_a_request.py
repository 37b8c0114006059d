"""Weights by module as a client asks for them: in the grammar, and in the fields of a recipe."""

from __future__ import annotations

import asyncio

import pytest
import torch
from serving_scenes import PROMPT, refused
from test_layers import MLP
from test_scheduler import Spy
from test_weights_by_module import SPECS

from helpers import close
from loralloy import layerwise
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.merging import get_rule, merge
from loralloy.serving.by_module import MAX_ITEMS, weights_of
from loralloy.serving.grammar import MAX_LENGTH, parse
from loralloy.weights import Weights

LAYER0_Q = "model.layers.0.self_attn.q_proj"


def meant(tiny, spec, **others):
    return Weights({"spam": layerwise.coefficients(spec, list(tiny.bank["spam"]), tiny.bank.modules), **others})


def exact(tiny, spy, row, weights, rule="linear"):
    """A row's logits are those of PEFT with the adapter that `merge` makes of these weights."""
    got = torch.stack(spy.seen[id(row)])
    tokens = got.argmax(-1).tolist()[:-1]
    want = tiny.scores(weights, row.prompt + tokens, rule)[len(row.prompt) - 1 :]
    assert got.shape == want.shape and float((got - want).abs().max()) <= 1e-4


class Rows(Spy):
    """The logits of each row, and the rows in the order they came."""

    def __init__(self, api):
        self.rows, scheduler = [], api.service.engine.scheduler
        super().__init__(scheduler)
        scheduler.ends = set()
        submit = scheduler.submit
        scheduler.submit = lambda row: (self.rows.append(row), submit(row))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("rule", ["linear", {"name": "ties", "density": 0.5}], ids=["live", "merged"])
def test_the_answer_is_that_of_the_merged_adapter(api, tiny, spec, rule):
    given = {"spam": spec, "cooking": 0.4}
    read = api.post("/v1/compositions", weights=given, rule=rule).json()
    bound = get_rule("linear") if rule == "linear" else get_rule("ties")(density=0.5)
    weights = meant(tiny, spec, cooking=0.4)
    spy = Rows(api)
    said = api.complete(read["composition"], max_tokens=4).json()["loralloy"]
    exact(tiny, spy, spy.rows[0], weights, bound)
    assert said["composition"] == read["composition"] == str(parse(read["composition"]))
    assert said["weights"] == read["weights"] == pytest.approx(dict(weights.items()))
    assert list(said["by_module"]) == ["spam"]
    assert (
        layerwise.coefficients(said["by_module"]["spam"], tiny.bank["spam"], tiny.bank.modules)
        == weights.coefficients["spam"]
    )
    assert said["cache"] == ("live" if rule == "linear" else "merged")


def test_they_differ_from_the_plain_weight(api, tiny):
    """On logits, so that the tests above would see a weight that was taken for its mean."""
    ids = tiny.tokenizer("prize winner")["input_ids"]
    for spec in SPECS.values():
        weights = meant(tiny, spec)
        plain = tiny.scores(Weights(dict(weights.items())), ids)
        assert not close(tiny.scores(weights, ids), plain, 1e-2)


def test_a_gradient_goes_over_the_layers_of_all_its_adapters(tiny):
    """As in a recipe, where the first and the last layer are those of the adapters in the merge, not of one alone."""
    spam = tiny.bank["spam"]
    early = Adapter("early", {m: f for m, f in spam.items() if ".layers.0." in m}, spam.config, spam.base)
    bank = Bank([early, tiny.bank["cooking"]])
    alone = weights_of(bank, parse("[0.5, 2]*early").terms)
    both = weights_of(bank, parse("[2, 0.5]*early + [0.5, 2]*cooking").terms)
    assert alone.coefficients == {"early": 0.5}  # its only layer is the first
    assert both.coefficients["early"] == 2.0 and set(both.coefficients["cooking"].values()) == {0.5, 2.0}
    late = Adapter("late", {m: f for m, f in spam.items() if ".layers.1." in m}, spam.config, spam.base)
    bank = Bank([late, tiny.bank["cooking"]])
    assert weights_of(bank, parse("[0.5, 2]*late").terms).coefficients == {"late": 0.5}
    assert weights_of(bank, parse("[0.5, 2]*late + cooking").terms).coefficients == {"late": 2.0, "cooking": 1.0}


def test_one_key_for_all_that_ask_for_the_same(api, tiny):
    compositions = api.service.compositions
    keys = {
        text: compositions.key(compositions.read(text + "*spam + weather @ ties"))
        for text in ("0.5", "[0.5]", "[0.5, 0.5]", "[{value: 0.5}]", '{"*": 0.5}', "[0.2, 0.8]", "[{value: [0.2, 0.8]}]",
                     "[0.8, 0.2]", f"{{{LAYER0_Q}: 0.5}}")
    }  # fmt: skip
    assert len({keys[t] for t in ("0.5", "[0.5]", "[0.5, 0.5]", "[{value: 0.5}]", '{"*": 0.5}')}) == 1
    assert keys["[0.2, 0.8]"] == keys["[{value: [0.2, 0.8]}]"] and len(set(keys.values())) == 4


def test_a_merged_one_is_merged_once(api):
    text = "[0.2, 0.8]*spam + weather @ ties(density=0.5)"
    first = api.complete(text, max_tokens=1).json()["loralloy"]
    again = api.complete("weather + [.2, .8]*spam @ ties(density=0.5)", max_tokens=1).json()["loralloy"]
    plain = api.complete("0.5*spam + weather @ ties(density=0.5)", max_tokens=1).json()["loralloy"]
    assert [a["cache"] for a in (first, again, plain)] == ["merged", "hit", "merged"]
    assert first["key"] == again["key"] != plain["key"] and "by_module" not in plain
    kept = api.call("GET", "/v1/compositions").json()["data"]
    assert sorted(k["composition"] for k in kept) == sorted([first["composition"], plain["composition"]])
    assert [k["by_module"] for k in kept if "by_module" in k] == [{"spam": [0.2, 0.8]}]


def test_rows_by_module_and_plain_ones_in_one_batch(serve, tiny):
    api = serve(max_rows=8)
    asked = {
        "[1, -0.5]*spam": meant(tiny, [1, -0.5]), "spam - weather": Weights({"spam": 1.0, "weather": -1.0}),
        "{" + LAYER0_Q + ": 2}*spam + 0.5*cooking": meant(tiny, {LAYER0_Q: 2}, cooking=0.5),
    }  # fmt: skip

    spy = Rows(api)

    async def go():
        async with api.client() as client:
            body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
            said = [client.post("/v1/completions", json=body | {"model": m}) for m in asked]
            assert {r.status_code for r in await asyncio.gather(*said)} == {200}

    api.run(go())
    assert len(spy.rows) == 3
    for row in spy.rows:
        (weights,) = [w for w in asked.values() if w.coefficients == row.weights.coefficients]
        exact(tiny, spy, row, weights)


@pytest.mark.parametrize("rule", [None, "ties"])
def test_the_heat_map_shows_them(api, tiny, rule):
    spec = [{"filter": "q_proj", "value": [0.1, 2.0]}, {"filter": "mlp", "value": 0}, {"value": -0.5}]
    given = {"weights": {"spam": spec, "weather": 1}} | ({"rule": rule} if rule else {})
    said = api.post("/v1/layers", **given, prepare=True).json()
    weights = meant(tiny, spec, weather=1.0)
    by_text = api.post("/v1/layers", model=said["composition"]).json()
    assert by_text["adapters"] == said["adapters"] and by_text["total"] == said["total"]
    spam, weather = said["adapters"]
    assert spam["by_module"][0] == {"filter": "q_proj", "value": [0.1, 2.0]} and weather["by_module"] is None
    assert spam["weight"] == pytest.approx(weights.of("spam"))
    made = merge(tiny.bank, weights, rule or "linear").adapter
    for i, layer in enumerate(said["layers"]):
        for j, projection in enumerate(said["projections"]):
            module = f"model.layers.{layer}.{'mlp' if projection in MLP else 'self_attn'}.{projection}"
            mine = weights.of("spam", module) * torch.linalg.norm(tiny.bank["spam"][module].dense())
            assert spam["norms"][i][j] == pytest.approx(abs(float(mine)), rel=1e-5, abs=1e-7)
            assert said["total"][i][j] == pytest.approx(float(torch.linalg.norm(made[module].dense())), rel=1e-4)


@pytest.mark.parametrize(
    ("given", "says", "param"),
    [
        ({"spam": [{"filter": "qproj", "value": 1}]}, "filter 'qproj' takes no module of the adapter; close names: q_proj",
         "weights.spam[0]"),
        ({"spam": {"model.layers.0.self_attn.qproj": 1}}, "there is no module", "weights.spam.model.layers.0.self_attn.qproj"),
        ({"spam": [{"filter": "q_proj", "value": 1}]}, "end the list with a default", "weights.spam"),
        ({"spam": [{"layers": "90-99", "value": 1}, {"value": 0}]}, "its layers are 0 to 1", "weights.spam[0]"),
        ({"spam": [1, "2"]}, "'2' is not a weight (it is text here", "weights.spam[1]"),
        ({"spam": [{"fitler": "q_proj", "value": 1}]}, "did you mean `filter`?", "weights.spam[0].fitler"),
        ({"spam": None}, "None is not a weight; give a number, a list of numbers", "weights.spam"),
        ({"spam": True}, "True is not a weight", "weights.spam"),
        ({"spam": 10**400}, "give a finite number", "weights.spam"),
        ({"spam": 1e7}, "too large; weights go up to 1e+06", "weights.spam"),
        ({"spam": [[[[]]]]}, "is not a weight", "weights.spam[0]"),
        ({"spam": [{"filter": "q" * 401, "value": 1}]}, "at most 400 characters", "weights.spam[0].filter"),
        ({"spam": [{"filter": "q", "value": 1}] * 257}, "at most 256 entries", "weights.spam[256]"),
        ({n: [{"filter": "q", "value": 1}] * 200 for n in ("spam", "cooking")}, "at most 256 entries", None),
        ({"spam": {"q" * 401: 1}}, "at most 400 characters", "weights.spam"),
        ({"spam": [1] * (MAX_ITEMS + 1)}, f"at most {MAX_ITEMS} items", "weights.spam"),
        ({"spam": [{"value": [1] * (MAX_ITEMS + 1)}]}, f"at most {MAX_ITEMS} anchors", "weights.spam"),
        ({f"a{i}": [0.123456789] * 400 for i in range(100)}, f"more than {MAX_LENGTH} characters", None),
        ({"": 1}, "the name is empty", None),
        ({}, "at least 1 item", "weights"),
        ({f"a{i}": 1 for i in range(1025)}, "at most 1024", "weights"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/compositions", "/v1/layers"])
def test_what_is_wrong_is_told_with_its_field(api, given, says, param, path):
    refused(api.post(path, weights=given), 400, says, param=param)


def test_what_is_wrong_in_a_text(api):
    text = "0.4*weather + [{filter: qproj, value: 1}, {value: 0}]*spam"
    for response in (
        api.complete(text),
        api.post("/v1/compositions", model=text),
        api.call("GET", f"/v1/models/{text}"),
    ):
        refused(response, 400, "weight of adapter 'spam', [0]: filter 'qproj' takes no module", code="invalid_weights")
    refused(api.complete(text + " @ ties"), 400, "'qproj' takes no module", param="weights.spam[0]")
    error = refused(
        api.complete("[0.2; 0.8]*spam"), 400, "';' has no meaning here", code="invalid_composition", param="model"
    )
    assert error["position"] == 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "give one of model"),
        ({"model": "spam", "weights": {"spam": 1}}, "give one of model"),
        ({"model": "spam", "rule": "ties"}, "rule, space and rank go with weights"),
        ({"weights": {"ham": 1}}, None),
        ({"weights": {"spam": 1}, "rule": "tie"}, "did you mean ties?"),
        ({"weights": {"spam": 1}, "rule": {"density": 0.2}}, "rule: give a name"),
        ({"weights": {"spam": 1}, "rule": {"name": "ties", "keep": 0.2}}, "ties has no parameter 'keep'"),
        ({"weights": {"spam": 1}, "rule": {"name": "ties", "density": [2]}}, "density"),
        ({"weights": {"spam": 1}, "space": "moon"}, "space 'moon' is not known"),
        ({"weights": {"spam": 1}, "rank": 0}, "rank 0 is not valid"),
        ({"weights": {"spam": 1}, "rank": 65537}, "rank 65537 is not valid"),
        ({"weights": {"spam": 1}, "rank": "most"}, "rank 'most' is not valid"),
    ],
)
def test_fields_that_do_not_go_together(api, given, says):
    if says is None:
        refused(api.post("/v1/compositions", **given), 404, "no adapter 'ham'", code="model_not_found")
    else:
        refused(api.post("/v1/compositions", **given), 400, says)


def test_fields_are_read_as_a_recipe_reads_them(api):
    said = api.post(
        "/v1/compositions",
        weights={"spam": 1, "weather": -0.5},
        rule={"name": "ties", "density": 0.3},
        space="delta",
        rank=2,
    ).json()
    assert said["composition"] == "spam - 0.5*weather @ ties(density=0.3, space=delta, rank=2)"
    assert (said["cache"], said["rank"], "by_module" in said) == ("cold", "2", False)
