"""Overlap against dense float64 computations, and the laws it keeps."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from overlap_scenes import dense_overlap, made, measured, one, same, text
from torch import Tensor

import loralloy.overlap.measure as measuring
from helpers import BASE, adapter, generator
from loralloy.bank import Bank
from loralloy.base_ref import BaseRef
from loralloy.errors import LoralloyError
from loralloy.factors import LoraFactors
from loralloy.overlap import Overlap, draw, overlap, verdict
from loralloy.overlap.measure import projection


@st.composite
def banks(draw_) -> list[dict[str, LoraFactors]]:
    """Two to four adapters: any ranks and scalings, modules that only some have, zero dW, embeddings and convolutions."""
    kinds = {"layers.0.q": "linear", "layers.1.q": "linear", "layers.1.conv": "conv", "embed": "embedding"}
    shapes = {m: (draw_(st.integers(1, 12)), 2 * draw_(st.integers(1, 7))) for m in kinds}
    parts = []
    for i in range(draw_(st.integers(2, 4))):
        has = draw_(st.sets(st.sampled_from(sorted(kinds)), min_size=1)) | {"layers.0.q"}
        part = {}
        for k, m in enumerate(sorted(has)):
            scaling = draw_(st.sampled_from([1.0, 0.02, -2.0, 30.0, 0.0]))
            part[m] = made(
                *shapes[m], draw_(st.integers(1, 16)), 100 * i + 7 * k + draw_(st.integers(0, 5)), scaling, kinds[m]
            )
            if draw_(st.booleans()):  # entries that are exactly zero have no sign
                part[m].B[::2] = 0
        parts.append(part)
    return parts


@settings(deadline=None, max_examples=40)
@given(banks())
def test_equals_dense(parts):
    found = measured(*parts)
    same(found.all, dense_overlap(parts, [str(p.name) for p in found.parts]))
    for group in found.groups("layer"):
        same(group, dense_overlap(parts, list(group.modules)))
    assert not found.sampled and float(found.all.sign_error().nan_to_num().abs().max()) == 0.0


def test_every_block_of_rows_is_counted(monkeypatch):
    """More rows than a block holds, and rows that do not divide into blocks."""
    monkeypatch.setattr(measuring.signs, "BLOCK", 150)
    parts = [{"q": made(53, 20, r, r)} for r in (2, 3, 5)]
    same(measured(*parts).all, dense_overlap(parts, ["q"]))


# -- laws --------------------------------------------------------------------------------------------------------------

PAIRWISE = ("cosine", "out", "in", "out_plain", "in_plain", "signs")


def pairwise(found: Overlap) -> dict[str, Tensor]:
    g = found.all
    values = (g.cosine, g.alignment("out"), g.alignment("in"), g.alignment("out", False), g.alignment("in", False),
              g.sign_conflict())  # fmt: skip
    return dict(zip(PAIRWISE, values, strict=True))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5))
def test_gauge(seed, r, q):
    f, g = made(14, 10, r, seed), made(14, 10, q, seed + 1)
    turn = torch.linalg.qr(torch.randn(r, r, generator=generator(seed + 2))).Q * torch.logspace(-1, 2, r)
    turn = turn.double()
    turned = LoraFactors(turn @ f.A.double(), f.B.double() @ torch.linalg.inv(turn), f.scaling)
    left, right = one(f, g), one(turned, g)
    for name in PAIRWISE:
        torch.testing.assert_close(pairwise(left)[name], pairwise(right)[name], atol=1e-4, rtol=0)
    torch.testing.assert_close(left.all.sar, right.all.sar, atol=1e-4, rtol=0)


@pytest.mark.parametrize("c", [1e-9, 0.1, 1e6])
def test_scale(c):
    f, g = made(14, 10, 3, 1), made(14, 10, 4, 2)
    scaled = LoraFactors(f.A, f.B, c * f.scaling)
    for name, value in pairwise(one(f, g)).items():
        torch.testing.assert_close(pairwise(one(scaled, g))[name], value, atol=1e-6, rtol=0)
    both = one(scaled, LoraFactors(g.A, g.B, c * g.scaling)).all
    torch.testing.assert_close(both.sar_cut, one(f, g).all.sar_cut)
    assert float(both.norm[0]) == pytest.approx(c * float(one(f, g).all.norm[0]), rel=1e-9)


def test_the_same_adapter_twice_and_its_opposite():
    f = made(14, 10, 3, 1)
    opposite = LoraFactors(f.A, f.B, -f.scaling)
    found = one(f, f, opposite)
    at = {name: value[0, 1].item() for name, value in pairwise(found).items()}
    assert at == pytest.approx({"cosine": 1, "out": 1, "in": 1, "out_plain": 1, "in_plain": 1, "signs": 0}, abs=1e-6)
    at = {name: value[0, 2].item() for name, value in pairwise(found).items()}
    assert at == pytest.approx({"cosine": -1, "out": 1, "in": 1, "out_plain": 1, "in_plain": 1, "signs": 1}, abs=1e-6)
    assert one(f, f).all.gain == pytest.approx(2) and one(f, opposite).all.gain == pytest.approx(0, abs=1e-12)
    assert one(f, opposite).all.sar.tolist() == [0, 0]  # their merge is zero and reaches nothing


def test_orthogonal():
    """Outputs on other rows: nothing in common but the inputs."""
    f, g = made(14, 10, 3, 1), made(14, 10, 3, 2)
    top, low = f.B.clone(), g.B.clone()
    top[7:], low[:7] = 0, 0
    found = one(LoraFactors(f.A, top), LoraFactors(f.A, low)).all
    assert float(found.cosine[0, 1]) == pytest.approx(0, abs=1e-12)
    assert float(found.alignment("out")[0, 1]) == pytest.approx(0, abs=1e-12)
    assert float(found.alignment("in", False)[0, 1]) == pytest.approx(1)
    assert math.isnan(found.sign_conflict()[0, 1])  # no entry where both are there
    assert found.gain == pytest.approx(1)


def test_chance_is_what_random_directions_have():
    """Fixed singular values, random directions: the mean over draws is the chance that is stated."""
    sums: dict[str, list[float]] = {}
    sigma = (torch.tensor([3.0, 1.0, 0.5]), torch.tensor([2.0, 2.0, 1.0, 0.1, 0.1]))
    for seed in range(300):
        g = generator(seed)
        f, h = (
            LoraFactors(
                s[:, None] * torch.linalg.qr(torch.randn(30, len(s), generator=g)).Q.T,
                torch.linalg.qr(torch.randn(40, len(s), generator=g)).Q,
            )
            for s in sigma
        )
        group = one(f, h).all
        for side in ("out", "in"):
            for weighted in (True, False):
                key = f"{side} {weighted}"
                value, chance = group.alignment(side, weighted)[0, 1], group.chance(side, weighted)[0, 1]
                sums.setdefault(key, []).append(float(value / chance))
        sums.setdefault("signs", []).append(2 * float(group.sign_conflict(False)[0, 1]))
    for key, ratios in sums.items():
        error = torch.tensor(ratios).std() / math.sqrt(len(ratios))
        assert abs(sum(ratios) / len(ratios) - 1) < 4 * float(error) < 0.2, key


def test_near_duplicates_keep_their_digits():
    """Inner products of Gram matrices, squared, would lose this difference."""
    f = made(40, 30, 4, 1).to(torch.float64)
    nudged = LoraFactors(f.A, f.B + 1e-6 * torch.randn(40, 4, generator=generator(2), dtype=torch.float64))
    want = dense_overlap([{"q": f}, {"q": nudged}], ["q"])
    got = measured({"q": f}, {"q": nudged}).all
    assert 1 - float(got.cosine[0, 1]) == pytest.approx(1 - float(want["cosine"][0, 1]), rel=1e-3, abs=1e-15)
    assert 0 < 1 - float(want["cosine"][0, 1]) < 1e-11


# -- signs of large modules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [50, 300])
def test_sampled_signs_have_the_error_they_state(rows):
    parts = [{"layers.0.q": made(400, 12, 2, 1), "layers.0.k": made(20, 12, 2, 5)},
             {"layers.0.q": made(400, 12, 3, 2), "layers.0.k": made(20, 12, 3, 6)}]  # fmt: skip
    truth = measured(*parts).all
    estimates: dict[bool, list[float]] = {True: [], False: []}
    errors: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(150):
        found = measured(*parts, exact_entries=rows * 12, seed=seed)
        assert found.sampled == ["layers.0.q"]
        for weighted in (True, False):
            estimates[weighted].append(float(found.all.sign_conflict(weighted)[0, 1]))
            errors[weighted].append(float(found.all.sign_error(weighted)[0, 1]))
    for weighted in (True, False):
        spread = torch.tensor(estimates[weighted], dtype=torch.float64)
        assert spread.std() > 0.001
        assert float(torch.tensor(errors[weighted]).mean() / spread.std()) == pytest.approx(1, abs=0.2)
        off = float(spread.mean() - truth.sign_conflict(weighted)[0, 1])
        assert abs(off) < 4 * float(spread.std()) / math.sqrt(150)


def test_a_sample_is_the_seed_s_and_only_signs_change():
    parts = [{"q": made(300, 12, 2, 1)}, {"q": made(300, 12, 3, 2)}]
    first, again, other = (measured(*parts, exact_entries=600, seed=s) for s in (3, 3, 4))
    assert json.dumps(first.to_dict()) == json.dumps(again.to_dict())
    assert float(first.all.sign_conflict()[0, 1]) != float(other.all.sign_conflict()[0, 1])
    torch.testing.assert_close(first.all.cosine, measured(*parts).all.cosine, atol=0, rtol=0)


def test_threads_are_left_as_they_were_and_change_nothing():
    parts = [{f"layers.{i}.q": made(60, 20, r, i + 9 * r) for i in range(5)} for r in (2, 3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(json.dumps(measured(*parts).to_dict("module")))
            assert torch.get_num_threads() == threads
            bad = {"layers.0.q": made(60, 20, 2, 1)}
            with pytest.raises(RuntimeError, match="stop"):
                measured(bad, bad, on_module=stop)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_stopping_does_not_measure_the_rest(monkeypatch):
    real, seen = measuring._measure, []

    def slow(module, *rest):
        seen.append(module)
        time.sleep(0.01)
        return real(module, *rest)

    monkeypatch.setattr(measuring, "_measure", slow)
    part = {f"layers.{i}.q": made(4, 4, 1, i) for i in range(60)}
    with pytest.raises(RuntimeError, match="stop"):
        measured(part, part, on_module=stop)
    assert len(seen) < 60


def stop(module: str) -> None:
    raise RuntimeError("stop")


# -- groups ------------------------------------------------------------------------------------------------------------


def test_groups_and_names():
    names = [
        "model.layers.10.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.mlp.experts.3.w1",
        "lm_head",
    ]
    part = {m: made(6, 8, 2, i) for i, m in enumerate(names)}
    seen: list[str] = []
    found = measured(part, {m: made(6, 8, 2, 50 + i) for i, m in enumerate(names)}, on_module=seen.append)
    assert sorted(seen) == sorted(names)
    assert [g.name for g in found.groups("layer")] == [2, 10, "lm_head"]
    assert [g.name for g in found.groups("module")] == [names[3], names[2], names[1], names[0]]
    assert {g.name: len(g.modules) for g in found.groups("projection")} == {
        "lm_head": 1, "mlp.experts.*.w1": 1, "self_attn.q_proj": 2,
    }  # fmt: skip
    assert projection("transformer.h.0.attn.c_proj") == "attn.c_proj" and projection("0.lin") == "lin"
    same(
        found.groups("projection")[-1],
        dense_overlap([part, {m: made(6, 8, 2, 50 + i) for i, m in enumerate(names)}], names[:2]),
    )


# -- refusals and what is undefined ------------------------------------------------------------------------------------


def test_refusals():
    f = made(6, 8, 2, 1)
    with pytest.raises(LoralloyError, match="two adapters or more; only 'a0'"):
        measured({"q": f})
    with pytest.raises(
        LoralloyError, match=r"no two of these adapters have a module in common.*a0 has q.*a1 has k and 1 more"
    ):
        measured({"q": f}, {"k": f, "v": f})
    two = [adapter({"q": f}, "x", BaseRef(BASE)), adapter({"q": f}, "y", BaseRef("other/model"))]
    with pytest.raises(LoralloyError, match="different base models"):
        overlap(Bank(two))
    assert float(overlap(Bank(two, assume_same_base=True)).all.cosine[0, 1]) == pytest.approx(1)


def test_zero_and_absent_are_undefined_and_said(tmp_path):
    f, zero = made(6, 8, 2, 1), LoraFactors(torch.randn(2, 8), torch.zeros(6, 2))
    cancels = LoraFactors(torch.cat([f.A, f.A]), torch.cat([f.B, -f.B], 1))
    found = measured({"layers.0.q": f}, {"layers.0.q": zero}, {"layers.0.q": cancels}, {"layers.0.k": f})
    for name, value in pairwise(found).items():
        assert [i for i in range(4) if value[0, i] == value[0, i]] == [0], name
    data = found.to_dict("module")
    assert "NaN" not in json.dumps(data)
    assert data["all"]["cosine"][0] == [pytest.approx(1), None, None, None]
    assert data["all"]["norm"][1] == 0 and data["groups"][0]["norm"][0] is None  # zero here, absent there
    assert [r.kind for r in verdict(found)][:3] == ["zero", "zero", "modules"]
    printed = text(found)
    assert "–" in printed and "nan" not in printed.lower()
    draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
