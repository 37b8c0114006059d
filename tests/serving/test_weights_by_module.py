"""Weights by module, from a file or from filters and gradients, on the live path and in the decoder."""

from __future__ import annotations

import pytest
from serving_scenes import drain, row
from test_scheduler import Spy, check, prompt

from helpers import close, load_in_peft, logits
from loralloy import layerwise
from loralloy.live import LiveModel
from loralloy.live.base import load_base
from loralloy.merging import merge
from loralloy.serving.scheduler import Scheduler
from loralloy.weights import Weights

SPECS = {
    "gradient": [1.0, -0.5],
    "filters": [{"filter": "q_proj", "value": 0.9}, {"filter": "*.mlp.*", "layers": "1", "value": [0.1, 0.8]}, {"value": 0.2}],
    "names": {"*": 0.3, "model.layers.0.self_attn.v_proj": -1.0},
}  # fmt: skip


def weights_of(tiny, spec):
    adapter = tiny.bank["spam"]
    return Weights({"spam": layerwise.coefficients(spec, list(adapter), tiny.bank.modules), "cooking": 0.4})


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_live_is_the_merged_adapter_in_peft(tiny, tmp_path, spec):
    weights = weights_of(tiny, spec)
    weights.save(tmp_path / "weights.json")
    read = Weights.load(tmp_path / "weights.json")
    assert read.per_module
    merge(tiny.bank, weights).adapter.save(tmp_path / "merged")
    fresh, _ = load_base(str(tiny.root / "model"), "float32", "cpu")
    import torch

    ids = torch.tensor([prompt(0, 9)])
    want = logits(load_in_peft(fresh, tmp_path / "merged"), ids)
    live = LiveModel(tiny.model, tiny.bank)
    with live.compose([read]) as model:
        assert close(logits(model, ids), want)
    live.remove()


def test_decoded_beside_others(tiny, paged):
    """Rows by module and rows by adapter in one batch, joining and leaving."""
    scheduler = Scheduler(tiny.model, tiny.tokenizer, paged, max_rows=3)
    scheduler.ends = set()
    spy, made = Spy(scheduler), []
    all_ = [weights_of(tiny, spec).coefficients for spec in SPECS.values()] + [{"spam": 1.0}, {"weather": 0.5}]
    for i, weights in enumerate(all_):
        one = row(prompt(i, 3 + 2 * i), weights, max_tokens=3 + i)
        scheduler.submit(one[0])
        made.append((one, weights, prompt(i, 3 + 2 * i)))
    drain(scheduler)
    check(tiny, spy, made)
