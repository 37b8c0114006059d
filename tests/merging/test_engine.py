"""Plans and the engine: groups, ranks, energy, batches, devices, dtypes, and every variant of LoRA through every rule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from helpers import (
    PROJECTIONS,
    ConvNet,
    adapter,
    as_weight,
    delta,
    factors,
    load_in_peft,
    peft_deltas,
    peft_folder,
    peft_model,
    relative,
    tiny_gpt2,
    tiny_llama,
)
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.merging import RULES, Rule, batches, get_rule, make_plan, merge, merge_factors
from loralloy.merging.entries import random_mask
from loralloy.weights import Weights

SHAPES = {"q": (14, 10), "k": (14, 10), "v": (6, 10), "mlp": (10, 22)}
HAVE = {"a": ["q", "k", "v", "mlp"], "b": ["mlp", "q", "x"], "c": ["k", "q", "v"]}
RANKS = {"a": 2, "b": 5, "c": 30}
WEIGHTS = Weights({"b": {"*": 0.7, "q": 0.0}, "a": -0.4, "c": {"v": 1.0, "q": 0.5}})
EVERYWHERE = [(name, space) for name, rule in RULES.items() for space in rule.spaces]


def bank(dtype: torch.dtype = torch.float32, ranks: dict[str, int] = RANKS) -> Bank:
    shapes = {**SHAPES, "x": (6, 10)}
    return Bank(
        adapter({m: factors(*shapes[m], ranks[n], 10 * i + j, 0.3 + i, dtype) for j, m in enumerate(have)}, n)
        for i, (n, have) in enumerate(HAVE.items())
    )


def alike() -> Bank:
    """Equal ranks, as factors space wants them."""
    return bank(ranks=dict.fromkeys(RANKS, 4))


# -- oracles: rules on dW, dense, float64 ------------------------------------------------------------------------------


def top(x: Tensor, density: float) -> Tensor:
    kept = x.flatten().abs().sort(descending=True, stable=True).indices[: int(density * x.numel())]
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.reshape(x.shape), x, 0)


def elect(parts: list[Tensor], weights: list[float]) -> Tensor:
    x, w = torch.stack(parts), torch.tensor(weights, dtype=torch.float64)[:, None, None]
    agrees = x * torch.where(x.sum(0) >= 0, 1.0, -1.0) > 0
    return (torch.where(agrees, x, 0) * w).sum(0) / agrees.sum(0).clamp(min=1)


def oracle(rule: Rule, parts: list[Tensor], weights: list[float], keys: list[int]) -> Tensor:
    v = rule.values
    total = sum((w * x for x, w in zip(parts, weights, strict=True)), torch.zeros_like(parts[0]))
    if rule.name in ("linear", "cat", "svd"):
        return total
    if rule.name == "magnitude_prune" and v["prune"] == "merged":
        return top(total, v["density"])
    if rule.name.startswith("dare"):
        kept = [random_mask(torch.tensor([k]), 0, parts[0].numel(), v["density"], v["seed"])[0] for k in keys]
        parts = [torch.where(m.reshape(x.shape), x / v["density"], 0) for x, m in zip(parts, kept, strict=True)]
    else:
        parts = [top(x, v["density"]) for x in parts]
    if rule.name.endswith("ties"):
        return elect(parts, weights)
    return sum((w * x for x, w in zip(parts, weights, strict=True)), torch.zeros_like(parts[0]))


ORACLES = ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
BOUND = [get_rule(n) for n in ORACLES] + [
    RULES["ties"](density=0.7),
    RULES["dare_ties"](density=0.9, seed=5),
    RULES["magnitude_prune"](density=0.4, prune="merged"),
]


def expected(rule: Rule, of: Bank, weights: Weights, dense: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a rule makes of dense[adapter][module]."""
    key = batches.keys_of(rule, [of[n] for n in weights.names])
    result = {}
    for m in dict.fromkeys(m for n in weights.names for m in dense[n]):
        who = [(i, n) for i, n in enumerate(weights.names) if m in dense[n] and weights.of(n, m)]
        if who:
            parts, w = [dense[n][m].double() for _, n in who], [weights.of(n, m) for _, n in who]
            result[m] = oracle(rule, parts, w, [key(i, m) for i, _ in who])
    return result


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_a_plan_is_what_is_done(rule, space, tmp_path):
    b = alike() if space == "factors" else bank()
    plan = make_plan(b, WEIGHTS, rule, space)
    merged = merge(b, WEIGHTS, rule, space, out=tmp_path / "m")
    assert sorted(plan.modules) == sorted(merged.adapter) == sorted(set(plan.modules))
    assert plan.top == merged.adapter.max_rank == max(g.rank for g in plan.groups)
    assert plan.bytes_out == sum(f.A.nbytes + f.B.nbytes for f in merged.adapter.values())
    assert [p.name for p in plan.parents] == WEIGHTS.names
    for g in plan.groups:
        for j, m in enumerate(g.modules):
            names = [plan.parents[i].name for i in g.who]
            assert [w[j] for w in g.weights] == [WEIGHTS.of(n, m) for n in names]
            assert [s[j] for s in g.scaling] == [b[n][m].scaling for n in names]
            assert [f.shape for f in g.outlines] == [b[n][m].shape for n in names] == [g.shape] * len(names)
            assert g.ranks == tuple(b[n][m].rank for n in names) and all(f.A.is_meta for f in g.outlines)
            votes = space == "factors" and space not in get_rule(rule).sums
            have = [n for n in WEIGHTS.names if m in b[n] and (votes or WEIGHTS.of(n, m))]
            assert names == have


def test_modules_come_in_the_order_of_the_parents():
    order = list(merge(bank(), WEIGHTS, "ties").adapter)
    assert order == ["mlp", "q", "x", "k", "v"]  # b's, then what only a has, then c's: as weights name them
    assert list(merge(bank(), Weights({"c": 1.0, "a": 1.0})).adapter) == ["k", "q", "v", "mlp"]


def test_same_shapes_share_a_group_only_where_the_same_adapters_have_them():
    groups = {tuple(sorted(g.modules)) for g in make_plan(bank(), Weights({"a": 1.0, "b": 1.0, "c": 1.0})).groups}
    assert groups == {("q",), ("k",), ("v",), ("mlp",), ("x",)}
    groups = {tuple(sorted(g.modules)) for g in make_plan(bank(), Weights({"a": 1.0, "c": 1.0})).groups}
    assert groups == {("k", "q"), ("v",), ("mlp",)}
    zero_q = Weights({"a": 1.0, "c": {"*": 1.0, "q": 0.0}})
    groups = {tuple(sorted(g.modules)) for g in make_plan(bank(), zero_q).groups}
    assert groups == {("q",), ("k",), ("v",), ("mlp",)}  # weight 0 is absence


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_ranks(rule, space):
    b = alike() if space == "factors" else bank()
    w = Weights({"a": 1.0, "b": 0.5})
    parents = {m: [b[n][m].rank for n in "ab" if m in b[n]] for m in ("q", "k", "v", "mlp", "x")}
    for rank in (1, 3, 1000, "max"):
        merged = merge(b, w, rule, space, rank)
        assert set(merged.adapter) == set(parents)
        assert len({merged.adapter.rank(m) for m in merged.adapter}) == 1  # padded to one rank
        largest = {m: max(r) if rank == "max" else rank for m, r in parents.items()}
        for m, dense in delta(merged.adapter).items():
            assert int(torch.linalg.matrix_rank(dense, rtol=1e-6)) <= largest[m]
        if rank != 1000:
            assert merged.adapter.max_rank <= max(largest.values()) and merged.report.rank == str(rank)
        if rank == "max":
            assert merged.adapter.max_rank == max(largest.values())
            assert int(torch.linalg.matrix_rank(delta(merged.adapter)["mlp"], rtol=1e-6)) == largest["mlp"]
    full, uncut = merge(b, w, rule, space, "full"), merge(b, w, rule, space, 1000)
    assert full.report.cut == uncut.report.cut == 0.0
    assert max(relative(delta(uncut.adapter)[m], x) for m, x in delta(full.adapter).items()) < 1e-5


def test_a_rank_above_the_width_is_not_padded():
    """Ranks 2 and 30 side by side in modules of width 10: a cut to 20 has nothing to put there."""
    merged = merge(bank(), Weights({"a": 1.0, "c": 0.5}), "linear", rank=20)
    assert merged.adapter.max_rank == 10 and merged.report.error < 1e-5
    assert merge(bank(), Weights({"a": 1.0, "c": 0.5}), "linear").adapter.max_rank == 32


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize(
    ("rule", "space"), [("linear", "delta"), ("svd", "delta"), ("ties", "delta"), ("ties", "knots"), ("ties", "core")]
)
def test_energy_gives_the_smallest_rank_that_keeps_it(rule, space, energy, tmp_path):
    """Over all modules together, whatever their shapes and own ranks."""
    b = bank()
    whole = delta(merge(b, WEIGHTS, rule, space, "full").adapter)
    squares = [torch.linalg.svdvals(x) ** 2 for x in whole.values()]
    total = float(sum(s.sum() for s in squares))
    kept = [float(sum(s[:k].sum() for s in squares)) / total for k in range(1, 23)]
    want = next(k for k, share in enumerate(kept, 1) if share >= energy)
    assert want == 1 or kept[want - 2] < energy - 1e-6 < energy + 1e-6 < kept[want - 1]  # no tie decides
    merged = merge(b, WEIGHTS, rule, space, energy=energy)
    assert merged.adapter.max_rank == want and merged.report.rank == f"{want} (energy {energy:g})"
    lost = sum(float((delta(merged.adapter)[m] - x).norm()) ** 2 for m, x in whole.items())
    assert lost / total == pytest.approx(1 - kept[want - 1], rel=1e-3, abs=1e-9)
    assert merged.report.cut == pytest.approx(math.sqrt(lost / total), rel=1e-3, abs=1e-6)
    again = merge(b, WEIGHTS, rule, space, energy=energy, out=tmp_path / "m").adapter
    assert all(torch.equal(again[m].A, merged.adapter[m].A) for m in whole)


def test_all_of_the_energy_is_the_rank_of_dW_and_no_more():
    """The same adapter three times has rank 15 side by side, and rank 5."""
    b = bank()
    triple = Bank(adapter(dict(b["b"]), n) for n in ("b1", "b2", "b3"))
    w = Weights.uniform(triple.names)
    merged = merge(triple, w, energy=1.0)
    assert merged.adapter.max_rank == 5 and merge(triple, w).adapter.max_rank == 15
    assert merged.report.error < 1e-5
    nothing = merge(b, Weights({"a": 0.0}), energy=0.9)
    assert nothing.adapter.max_rank == 1 and nothing.report.error == 0.0


def test_energy_or_rank():
    for rank in (3, "max", "full"):
        with pytest.raises(LoralloyError, match=f"rank {rank} and energy 0.9 are both given; .*drop the other"):
            merge(bank(), WEIGHTS, rank=rank, energy=0.9)
    for energy in (0, -0.5, 1.01, math.nan, math.inf, "0.9", True):
        with pytest.raises(LoralloyError, match=r"energy .* is not valid; give a fraction"):
            merge(bank(), WEIGHTS, energy=energy)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_batching_changes_nothing(rule, space, monkeypatch):
    b = alike() if space == "factors" else bank()
    variants = [get_rule(rule)]
    if "trim" in variants[0].parameters:
        variants.append(variants[0](trim="all"))
    for bound in variants:
        results = []
        for budget in (1, 40_000, 1 << 40):
            monkeypatch.setattr(batches, "_BUDGET", {"cpu": budget})
            results.append(merge(b, Weights({"a": 0.8, "c": -0.3, "b": 0.6}), bound, space))
        for other in results[1:]:
            for m, want in delta(results[0].adapter).items():
                assert relative(delta(other.adapter)[m], want) < 1e-5
            assert other.report.error == pytest.approx(results[0].report.error, abs=1e-6)


@pytest.mark.parametrize(("rule", "space"), EVERYWHERE, ids=lambda x: x)
def test_merge_factors_is_the_merge(rule, space):
    b = alike() if space == "factors" else bank()
    bound = get_rule(rule)
    if "seed" in bound.parameters:
        bound = bound(density=1.0)  # masks are keyed by content in one, by place in the other
    w = {"a": 0.8, "b": -0.6, "c": 0.0}
    want = merge(b, Weights(w), bound, space, measure="none").adapter
    got = merge_factors([dict(b[n]) for n in w], list(w.values()), bound, space)
    assert set(got) == set(want)
    assert all(relative(f.dense(), want[m].dense()) < 1e-6 and f.scaling == 1.0 for m, f in got.items())
    low = merge_factors([dict(b[n]) for n in w], list(w.values()), bound, space, rank=2, dtype=torch.float16)
    assert {f.rank for f in low.values()} == {2} and {f.A.dtype for f in low.values()} == {torch.float16}
    with pytest.raises(LoralloyError, match="2 adapters but 1 weights"):
        merge_factors([b["a"], b["b"]], [1.0], bound, space)


def test_bare_factors_that_do_not_fit_are_refused():
    f = factors(6, 10, 4)
    for other in (factors(6, 11, 4), factors(7, 10, 4), LoraFactors(f.A, f.B, 1.0, "embedding")):
        with pytest.raises(LoralloyError, match=r"module 'm' is linear \[6, 10\] in one adapter but .* in another"):
            merge_factors([{"m": f}, {"m": other}], [1.0, 1.0], RULES["linear"])


# -- devices and dtypes ------------------------------------------------------------------------------------------------


def test_devices():
    for device in (
        "gpu",
        "cuda:nine",
        "",
        "meta",
        *([] if torch.cuda.is_available() else ["cuda", torch.device("cuda:1")]),
    ):
        with pytest.raises(LoralloyError, match=r"device '.*' cannot be used \(.*\); give cpu, or cuda"):
            merge(bank(), WEIGHTS, device=device)
    same = merge(bank(), WEIGHTS, device=torch.device("cpu")).adapter
    assert all(torch.equal(f.B, same[m].B) for m, f in merge(bank(), WEIGHTS).adapter.items())


@pytest.mark.parametrize("rule", ["linear", "svd", "ties"])
def test_dtypes(rule):
    want = delta(merge(bank(), WEIGHTS, rule).adapter)
    for dtype, within in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-7), (torch.float64, 1e-6)):
        merged = merge(bank(), WEIGHTS, rule, dtype=dtype)
        assert {f.A.dtype for f in merged.adapter.values()} == {f.B.dtype for f in merged.adapter.values()} == {dtype}
        assert max(relative(x, want[m]) for m, x in delta(merged.adapter).items()) < within
    halves = merge(bank(torch.float16), WEIGHTS, rule)
    assert halves.adapter.dtype == torch.float16 and halves.report.dtype == "fp16"
    mixed = Bank([bank(torch.float16)["a"], bank(torch.bfloat16)["b"]])
    assert merge(mixed, Weights({"a": 1.0, "b": 1.0}), rule).adapter.dtype == torch.float32
    sure = merge(bank(torch.float64), WEIGHTS, rule)
    assert sure.adapter.dtype == torch.float64 and max(relative(delta(sure.adapter)[m], want[m]) for m in want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_hold_no_factors_are_refused(dtype):
    with pytest.raises(LoralloyError, match=f"{dtype} cannot be merged to; store the result as fp16, bf16 or fp32"):
        merge(bank(), WEIGHTS, dtype=dtype)


def test_overflow_names_the_module_of_the_batch():
    """Ten modules in one batch; the eighth alone is too large for fp16."""
    b = Bank(adapter({f"m{i}": factors(9, 8, 3, i + 10 * s) for i in range(10)}, n) for s, n in enumerate("ab"))
    w = Weights({"a": {"*": 1.0, "m7": 1e12}, "b": 0.5})
    assert [len(g.modules) for g in make_plan(b, w).groups] == [10]
    for rule in ("linear", "svd", "ties"):
        with pytest.raises(LoralloyError, match=r"^module 'm7' of a, b: . overflows fp16; store it as bf16 or fp32"):
            merge(b, w, rule, dtype=torch.float16)
        assert merge(b, w, rule, dtype=torch.bfloat16).report.error < (1.5 if rule == "ties" else 1)


def test_weights_beyond_float32_are_an_error():
    b = Bank([adapter({"m": factors(9, 8, 3, 1)}, "a"), adapter({"m": factors(9, 8, 3, 2)}, "b")])
    for rule in ("linear", "cat", "svd", "ties"):
        with pytest.raises(LoralloyError, match=r"^module 'm' of a, b: .*overflows fp32"):
            merge(b, Weights({"a": 1e80, "b": 1.0}), rule)


# -- every variant of LoRA ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Three adapters by PEFT (rsLoRA, rank_pattern, alpha_pattern, modules that differ), and PEFT's own dW of each."""
    base, folder = tiny_llama(), tmp_path_factory.mktemp("variants")
    configs = {
        "rs": {
            "r": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
            "rank_pattern": {"layers.0.self_attn.q_proj": 7},
        },
        "pattern": {"r": 5, "target_modules": PROJECTIONS, "alpha_pattern": {"up_proj": 1, "q_proj": 31}},
        "both": {
            "r": 2, "target_modules": ["q_proj", "up_proj"], "use_rslora": True,
            "alpha_pattern": {"layers.1.mlp.up_proj": 64}, "rank_pattern": {"q_proj": 4},
        },
    }  # fmt: skip
    dense = {}
    for i, (name, config) in enumerate(configs.items()):
        peft_folder(base, folder / name, i + 1, **config)
        dense[name] = peft_deltas(peft_model(base, i + 1, **config))
    return base, Bank.load(folder), dense


@pytest.mark.parametrize("rule", BOUND, ids=str)
def test_rslora_and_patterns_through_every_rule(variants, rule, tmp_path):
    base, b, dense = variants
    w = Weights({"rs": 0.8, "pattern": {"*": -0.3, "model.layers.0.mlp.up_proj": 0.9}, "both": 0.5})
    want = expected(rule, b, w, dense)
    merged = merge(b, w, rule, rank="full", out=tmp_path / "m").adapter
    got = delta(merged)
    assert set(got) == set(want) and max(relative(got[m], want[m]) for m in want) < 1e-5
    loaded = peft_deltas(load_in_peft(base, tmp_path / "m"))
    assert set(loaded) == set(want) and max(relative(loaded[m], want[m]) for m in want) < 1e-5


def placed(x: Tensor, f: LoraFactors, transposed: bool) -> Tensor:
    """dW as a matrix, in the shape of the module's weight."""
    if f.kind == "conv":
        return x.reshape(f.B.shape[0], *f.A.shape[1:])
    return x.T if transposed or f.kind == "embedding" else x


@pytest.mark.parametrize("rule", BOUND, ids=str)
@pytest.mark.parametrize("kind", ["conv", "gpt2"])
def test_convolutions_embeddings_and_conv1d_through_every_rule(kind, rule, tmp_path):
    base = ConvNet() if kind == "conv" else tiny_gpt2()
    names = ["one", "two", "point", "three", "out"] if kind == "conv" else ["c_attn", "c_proj", "wte"]
    more = {} if kind == "conv" else {"fan_in_fan_out": True}
    for i, r in enumerate((2, 3)):
        peft_folder(base, tmp_path / "bank" / f"p{i}", i + 1, r=r, target_modules=names, **more)
    b, w = Bank.load(tmp_path / "bank"), Weights({"p0": 0.9, "p1": -0.6})
    dense = {n: {m: f.dense() for m, f in a.items()} for n, a in b.items()}
    for n, a in b.items():  # the matrices are PEFT's own dW
        theirs = peft_deltas(load_in_peft(base, tmp_path / "bank" / n))
        assert max(relative(as_weight(f, bool(more)), theirs[m]) for m, f in a.items()) < 1e-6
    want = expected(rule, b, w, dense)
    merged = merge(b, w, rule, rank="full", out=tmp_path / "m")
    got = delta(merged.adapter)
    assert set(got) == set(want) and max(relative(got[m], want[m]) for m in want) < 1e-5
    assert {f.kind for f in merged.adapter.values()} == {f.kind for f in b["p0"].values()}
    loaded = peft_deltas(load_in_peft(base, tmp_path / "m"))
    assert max(relative(loaded[m], placed(x, merged.adapter[m], bool(more))) for m, x in want.items()) < 1e-5
    low = merge(b, w, rule, rank=2, out=tmp_path / "low").adapter
    assert low.max_rank == 2
    for m, x in want.items():
        s = torch.linalg.svdvals(x)
        assert relative(delta(low)[m], x) == pytest.approx(float(s[2:].norm() / s.norm()), rel=2e-3, abs=1e-5)


def test_every_rule_is_here():
    """A rule that is new needs an oracle of its own: here, or in a test of its own file."""
    assert set(ORACLES) <= set(RULES)
    assert [r for r, s in itertools.product(RULES, ["delta"]) if s in RULES[r].spaces]


def test_adapters_in_memory_and_on_disk_merge_alike(tmp_path):
    b = bank()
    for n, a in b.items():
        a.save(tmp_path / n)
    disk = Bank(Adapter.load(tmp_path / n) for n in b)
    for rule in ("ties", "dare_ties", "svd"):
        one, two = (merge(x, WEIGHTS, rule).adapter for x in (b, disk))
        assert list(one) != [] and all(torch.equal(one[m].A, two[m].A) and torch.equal(one[m].B, two[m].B) for m in one)


# -- found in review ---------------------------------------------------------------------------------------------------


def test_energy_does_not_depend_on_what_is_measured():
    """The same bf16 adapter three times has its own rank, whether the sum is rounded first or not."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 24, generator=g).bfloat16(), torch.randn(20, 4, generator=g).bfloat16()
    same = Bank(adapter({"m": LoraFactors(a, b, 1.0)}, n) for n in ("a", "b", "c"))
    w = Weights({"a": 0.6, "b": 0.37, "c": -0.21})
    ranks = {m: merge(same, w, energy=1.0, measure=m).adapter.max_rank for m in ("exact", "none")}
    assert ranks == {"exact": 4, "none": 4}


def test_overflow_on_the_way_to_a_rank_names_modules():
    b = Bank([adapter({"m": factors(9, 8, 3, 1)}, "a"), adapter({"m": factors(9, 8, 3, 2)}, "b")])
    for rule in ("linear", "ties"):
        with pytest.raises(LoralloyError, match=r"^modules like 'm': dW overflows fp32"):
            merge(b, Weights({"a": 1e80, "b": 1.0}), rule, energy=0.9)


def test_modules_of_two_dtypes_are_stored_as_float32():
    mixed = adapter({"m": factors(9, 8, 3, 1, dtype=torch.float16), "n": factors(9, 8, 3, 2)}, "a")
    assert merge(Bank([mixed]), Weights({"a": 1.0})).adapter.dtype == torch.float32


def test_cat_has_no_use_for_an_adapter_of_weight_0():
    b = Bank([adapter({"m": factors(9, 8, 3, 1)}, "a"), adapter({"m": factors(9, 8, 3, 2)}, "b")])
    for space in ("delta", "factors"):
        assert merge(b, Weights({"a": 1.0, "b": 0.0}), "cat", space).adapter.max_rank == 3


def test_a_vote_at_weight_0_is_said_by_module():
    parts = [{m: factors(9, 8, 3, i + j) for j, m in enumerate("mn")} for i in (1, 5)]
    b = Bank([adapter(parts[0], "a"), adapter(parts[1], "b")])
    notes = make_plan(b, Weights({"a": 1.0, "b": {"m": 1.0, "n": 0.0}}), "ties", "factors").notes
    assert any("b: weight 0 still votes" in note and "1 of 2 modules" in note for note in notes)


def test_global_trimming_where_modules_have_different_directions():
    """In KnOTS's space one module's B is zero for both adapters; equals at the limit are shared out piece by piece."""
    parts = [{m: factors(9, 8, 2, 10 * i + j) for j, m in enumerate("abc")} for i in (1, 2)]
    for part in parts:
        part["c"] = LoraFactors(part["c"].A, torch.zeros_like(part["c"].B), 0.5)
    b = Bank([adapter(part, str(i)) for i, part in enumerate(parts)])
    for rule in (get_rule("ties"), get_rule("magnitude_prune")):
        merged = merge(b, Weights.uniform(b.names), rule(trim="all", density=0.95), "knots")
        assert math.isfinite(merged.report.error) and float(merged.adapter["a"].dense().norm()) > 0
