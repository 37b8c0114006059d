"""The laws of merging, against dense float64 sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    BASE,
    PROJECTIONS,
    adapter,
    close,
    delta,
    dense_sum,
    factors,
    load_in_peft,
    logits,
    peft_folder,
    relative,
    tiny_llama,
)
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.merging import RULES, get_rule, merge
from loralloy.weights import Weights

EXACT = 1e-5
RULE_NAMES = ["linear", "cat", "svd"]
SHAPES = {"q": (14, 10), "v": (6, 10), "mlp": (10, 22)}


def bank(dtype: torch.dtype = torch.float32, **base) -> Bank:
    """Three adapters: ranks 2, 5 and 30 (wider than the modules), alpha/r and alpha/sqrt(r), modules that differ."""
    ranks, scalings = {"a": 2, "b": 5, "c": 30}, {"a": 2.0, "b": 16 / math.sqrt(5), "c": 0.1}
    have = {"a": ["q", "v", "mlp"], "b": ["q", "mlp"], "c": ["q", "v"]}
    adapters = []
    for i, name in enumerate(have):
        parts = {m: factors(*SHAPES[m], ranks[name], 10 * i + len(m), scalings[name], dtype) for m in have[name]}
        adapters.append(adapter(parts, name, BaseRef(BASE)))
    return Bank(adapters)


def truth(of: Bank, weights: Weights) -> dict[str, torch.Tensor]:
    result = {}
    for m in of.modules:
        parts = of.factors(m)
        result[m] = dense_sum(list(parts.values()), [weights.of(n, m) for n in parts])
    return result


WEIGHTS = [
    Weights({"a": 1.0}),
    Weights({"a": 0.5, "b": 0.5}),
    Weights({"a": 0.9, "b": -1.3, "c": 2.5}),
    Weights({"c": 7.0, "b": 1e-3}),
    Weights({"a": {"q": 0.3, "v": -1}, "b": {"*": 0.5, "q": 0.0}, "c": 1.0}),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_full_rank_is_exact(rule, weights):
    b = bank()
    merged = merge(b, weights, rule, rank="full")
    want, got = truth(b, weights), delta(merged.adapter)
    for m, dense in want.items():
        if m in got:
            assert relative(got[m], dense) < EXACT
        else:
            assert float(dense.norm()) == 0
    assert merged.report.error < EXACT and merged.report.error_before_cast < EXACT
    assert len({merged.adapter.rank(m) for m in merged.adapter}) == 1  # vLLM and PEFT want one rank


@pytest.mark.parametrize("rank", [1, 3, 6, "max"])
@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("weights", WEIGHTS[1:], ids=str)
def test_a_cut_is_optimal_and_reports_its_true_error(rule, rank, weights):
    b = bank()
    merged = merge(b, weights, rule, rank=rank)
    got = delta(merged.adapter)
    lost = total = 0.0
    for m, dense in truth(b, weights).items():
        if m not in got:
            continue
        having = [f for n, f in b.factors(m).items() if weights.of(n, m)]
        k = max(f.rank for f in having) if rank == "max" else rank
        optimum = float(torch.linalg.svdvals(dense)[k:].norm() / dense.norm())
        assert relative(got[m], dense) == pytest.approx(optimum, rel=EXACT, abs=EXACT)
        gap, size = float((got[m] - dense).norm()), float(dense.norm())
        said = merged.report.modules[m]
        assert said.exact == pytest.approx(size, rel=EXACT)
        assert said.before_cast == pytest.approx(gap, rel=1e-4, abs=1e-6 * size)
        assert said.stored == pytest.approx(gap, rel=1e-4, abs=1e-6 * size)
        lost, total = lost + gap**2, total + size**2
    assert merged.report.error == pytest.approx(math.sqrt(lost / total), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float16, 5e-5, 1e-3), (torch.bfloat16, 5e-4, 8e-3)])
def test_the_report_tells_the_cast_apart(dtype, low, high):
    b, weights = bank(), WEIGHTS[2]
    merged = merge(b, weights, dtype=dtype)
    got, want = delta(merged.adapter), truth(b, weights)
    gap = math.sqrt(
        sum(float((got[m] - want[m]).norm()) ** 2 for m in want) / sum(float(w.norm()) ** 2 for w in want.values())
    )
    assert merged.report.error_before_cast < EXACT < low < merged.report.error < high
    assert merged.report.error == pytest.approx(gap, rel=1e-4)
    assert merged.adapter.dtype == dtype
    worst = merged.report.worst(1)[0]
    assert worst[1] == pytest.approx(max(relative(got[m], want[m]) for m in want), rel=1e-4)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_identity(rule):
    b = bank()
    for name in b:
        merged = merge(b, Weights({name: 1.0}), rule)
        got = delta(merged.adapter)
        assert set(got) == set(b[name]) and merged.adapter.max_rank == b[name].max_rank
        assert all(relative(got[m], b[name][m].dense()) < EXACT for m in got)


@settings(max_examples=20)
@given(st.permutations(["a", "b", "c"]), st.sampled_from(RULE_NAMES), st.sampled_from(["full", 3]))
def test_order_does_not_matter(order, rule, rank):
    b, w = bank(), {"a": 0.7, "b": -0.4, "c": 2.0}
    one = delta(merge(b, Weights(w), rule, rank=rank).adapter)
    two = delta(merge(b, Weights({n: w[n] for n in order}), rule, rank=rank).adapter)
    assert set(one) == set(two) and all(relative(two[m], one[m]) < EXACT for m in one)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_zero_weight_is_absence(rule):
    """Of dW, rank, modules and saved tensors alike: a router's 0.0 must not make the merge larger or refuse it."""
    b = bank()
    b = Bank(
        [
            *b.values(),
            adapter({"q": factors(14, 10, 9), "x": factors(3, 3, 3)}, "z", extra={"lm_head.weight": torch.ones(2)}),
        ]
    )
    with_zero = merge(b, Weights({"z": 0.0, "a": 1.5, "b": {"*": 0.0}}), rule)
    without = merge(b, Weights({"a": 1.5}), rule)
    one, two = delta(with_zero.adapter), delta(without.adapter)
    assert set(one) == set(two) and all(torch.equal(one[m], two[m]) for m in one)
    assert with_zero.adapter.max_rank == without.adapter.max_rank == 2
    assert with_zero.adapter.extra == []


def test_all_zero_is_a_zero_adapter(tmp_path):
    merged = merge(bank(), Weights({"a": 0.0, "b": 0.0}))
    assert all(float(d.norm()) == 0 for d in delta(merged.adapter).values()) and merged.report.error == 0
    merged.adapter.save(tmp_path / "zero")
    assert float(Adapter.load(tmp_path / "zero")["q"].dense().norm()) == 0


def test_equal_input_gives_equal_bytes(tmp_path):
    for i in (1, 2):
        merge(bank(), WEIGHTS[2], "svd").adapter.save(tmp_path / f"{i}" / "m")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "1" / "m" / name).read_bytes() == (tmp_path / "2" / "m" / name).read_bytes(), name


def test_gauge():
    b = bank(torch.float64)
    turned = []
    for a in b.values():
        parts = {}
        for m, f in a.items():
            g = torch.randn(f.rank, f.rank, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            parts[m] = LoraFactors(g @ f.A, f.B @ torch.linalg.inv(g), f.scaling)
        turned.append(adapter(parts, a.name, a.base))
    for rule, rank in (("linear", "full"), ("cat", 3), ("svd", 4)):
        one, two = (delta(merge(x, WEIGHTS[2], rule, rank=rank).adapter) for x in (b, Bank(turned)))
        assert all(relative(two[m], one[m]) < 1e-7 for m in one)


def test_float64_parents_are_merged_in_float64():
    b = bank(torch.float64)
    merged = merge(b, WEIGHTS[2])
    assert merged.adapter.dtype == torch.float64
    assert all(relative(delta(merged.adapter)[m], d) < 1e-13 for m, d in truth(b, WEIGHTS[2]).items())


def test_near_duplicates_in_sixteen_bits_report_honestly():
    f = factors(40, 30, 4, 1)
    g = LoraFactors(f.A + 1e-6, f.B, f.scaling)
    b = Bank([adapter({"m": f}, "a"), adapter({"m": g}, "b")])
    weights = Weights({"a": 1.0, "b": -1.0})  # what is left is 1e-6 of the parts
    merged = merge(b, weights, dtype=torch.float16)
    want = truth(b, weights)["m"]
    assert merged.report.error == pytest.approx(relative(delta(merged.adapter)["m"], want), rel=0.1)


@pytest.mark.parametrize("rule", ["linear", "svd"])
def test_weights_that_cancel_leave_nothing_and_no_error(rule):
    f = factors(40, 30, 4, 1)
    b = Bank([adapter({"m": f}, "a"), adapter({"m": f}, "twin")])
    report = merge(b, Weights({"a": 0.5, "twin": -0.5}), rule).report
    assert report.error == report.error_before_cast == 0.0


# -- factors space -----------------------------------------------------------------------------------------------------


def test_factors_space_of_different_ranks_is_refused():
    with pytest.raises(
        LoralloyError, match=r"module 'q' of a, b: .*ranks must be equal; they are \[2, 5\].*--space delta"
    ):
        merge(bank(), Weights({"a": 1, "b": 1}), "linear", "factors")


def test_spaces_and_rules_are_named():
    with pytest.raises(LoralloyError, match="rule 'svd' is defined on delta only; pass --space delta"):
        merge(bank(), WEIGHTS[1], "svd", "factors")
    with pytest.raises(LoralloyError, match="space 'both' is not known"):
        merge(bank(), WEIGHTS[1], "linear", "both")
    with pytest.raises(
        LoralloyError, match=r"rule 'tyes' is not known \(did you mean ties\?\); choose one of linear, cat, svd"
    ):
        get_rule("tyes")
    assert set(RULES) >= set(RULE_NAMES) and all(get_rule(n).name == n and get_rule(n).use_when for n in RULES)


def test_factors_space_reports_how_far_it_is_from_the_sum():
    """N=2 independent adapters, w=1/2: PEFT's linear is about 100% off; the report must say so."""
    parts = [adapter({"m": factors(40, 40, 8, i)}, n) for i, n in enumerate("ab")]
    report = merge(Bank(parts), Weights({"a": 0.5, "b": 0.5}), "linear", "factors").report
    assert 0.5 < report.error < 2 and report.space == "factors"


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -3, 2.5, "all", True])
def test_bad_ranks(rank):
    with pytest.raises(LoralloyError, match=r"rank .* is not valid; give a positive number, 'max' or 'full'"):
        merge(bank(), WEIGHTS[1], rank=rank)


def test_unknown_adapters_and_modules():
    with pytest.raises(LoralloyError, match="no adapter 'd' in this bank; it has a, b, c"):
        merge(bank(), Weights({"d": 1.0}))
    with pytest.raises(LoralloyError, match="adapter 'b' name module 'v'"):
        merge(bank(), Weights({"b": {"v": 1.0}}))


def test_fp16_overflow_names_module_and_way_out():
    with pytest.raises(LoralloyError, match=r"module 'q' of a.*overflows fp16; store it as bf16 or fp32"):
        merge(bank(), Weights({"a": 1e12}), dtype=torch.float16)


def test_saved_modules_equal_are_carried_and_conflicting_are_refused():
    head = torch.randn(4, 3)

    def two(a, b):
        return Bank([adapter({"m": factors()}, "a", extra={"head.weight": a}), adapter({"m": factors()}, "b", extra=b)])

    half = Weights({"a": 0.5, "b": 0.5})
    merged = merge(two(head, {"head.weight": head.clone()}), half)
    assert torch.equal(merged.adapter.extra_tensor("head.weight"), head) and merged.report.notes == ()
    merged = merge(two(head, None), half)
    assert torch.equal(merged.adapter.extra_tensor("head.weight"), head)
    assert "head.weight is carried whole from a" in merged.report.notes[0]
    with pytest.raises(
        LoralloyError, match=r"adapters 'a' and 'b' each saved their own 'head.weight' \(modules_to_save\)"
    ):
        merge(two(head, {"head.weight": head + 1e-3}), half)
    with pytest.raises(
        LoralloyError, match=r"tensor 'head.weight' is \[4, 3\] in adapter 'a' but \[5, 3\] in 'b'.*tokens added"
    ):
        merge(two(head, {"head.weight": torch.zeros(5, 3)}), half)


def test_fan_in_fan_out_must_agree(tmp_path):
    from dataclasses import replace

    a, b = adapter({"m": factors()}, "a"), adapter({"m": factors()}, "b")
    b.config = replace(b.config, fan_in_fan_out=True)
    with pytest.raises(LoralloyError, match=r"adapters a, b disagree on fan_in_fan_out"):
        merge(Bank([a, b]), Weights.uniform("ab"))


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_the_result_records_its_parents(tmp_path):
    b = bank()
    b["a"].licence, b["b"].licence = "mit", "mit"
    seen: list[str] = []
    merged = merge(
        b, Weights({"a": 0.6, "b": {"q": 0.4}}, "retrieved"), "svd", rank=2, dtype=torch.float16, on_module=seen.append
    )
    assert set(seen) == set(merged.adapter)
    merged.adapter.save(tmp_path / "m")
    record = Adapter.load(tmp_path / "m").provenance["merge"]
    assert [(p["name"], p["hash"], p["licence"]) for p in record["parents"]] == [
        (n, b[n].content_hash, "mit") for n in ("a", "b")
    ]
    assert [p["weight"] for p in record["parents"]] == [0.6, {"q": 0.4}]
    assert (record["rule"], record["space"], record["rank"], record["dtype"]) == ("svd", "delta", "2", "fp16")
    assert record["error"]["stored"] == pytest.approx(merged.report.error) and record["weights_source"] == "retrieved"
    card = (tmp_path / "m" / "README.md").read_text()
    for said in (b["a"].content_hash, b["b"].content_hash, "mit", "`svd`", "by module", "license: mit", BASE):
        assert said in card
    assert Adapter.load(tmp_path / "m").licence == "mit"


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_the_result_loads_in_peft_without_a_word(rule, tmp_path):
    """Modules that only some have, rsLoRA, patterns, per-module weights: PEFT's logits are those of W + sum w dW."""
    import copy

    base = tiny_llama()
    config = {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "r": 3,
        "rank_pattern": {"layers.0.self_attn.q_proj": 7},
    }
    peft_folder(base, tmp_path / "a", 1, **config)
    peft_folder(base, tmp_path / "b", 2, target_modules=PROJECTIONS, r=5, alpha_pattern={"up_proj": 1})
    b = Bank.load([tmp_path / "a", tmp_path / "b"])
    weights = Weights(
        {"a": 0.8, "b": {"*": -0.3, "model.layers.1.mlp.up_proj": 1.0, "model.layers.0.mlp.up_proj": 0.0}}
    )
    merge(b, weights, rule, rank="full", name="m").adapter.save(tmp_path / "m")
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for module, change in truth(b, weights).items():
            dense.get_submodule(module).weight += change.float()
    ids = torch.arange(3, 19).reshape(2, 8)
    assert close(logits(load_in_peft(base, tmp_path / "m"), ids), logits(dense, ids))
    assert float((logits(dense, ids) - logits(base, ids)).abs().max()) > 1e-2
