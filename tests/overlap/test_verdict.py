"""What is printed, drawn and said of an overlap."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from overlap_scenes import made, measured, one, text

import loralloy.overlap.measure as measuring
from helpers import adapter
from loralloy.bank import Bank
from loralloy.factors import LoraFactors
from loralloy.overlap import Overlap, Remark, candidates, draw, overlap, verdict

DOCS = Path(__file__).resolve().parents[2] / "docs"


# -- what the numbers say ----------------------------------------------------------------------------------------------


def said(found: Overlap) -> dict[str, Remark]:
    remarks = verdict(found)
    assert remarks[-1].kind == "caution" and "no measurement of accuracy" in remarks[-1].text
    return {r.kind: r for r in remarks}


def mixed(share: float, seed: int, out: int = 60, inside: int = 50, rank: int = 4, common: int = 99) -> LoraFactors:
    """dW with a share of its energy in a common part."""
    own, shared = made(out, inside, rank, seed), made(out, inside, rank, common)
    b = torch.cat([own.B * math.sqrt(1 - share), shared.B * math.sqrt(share)], 1)
    return LoraFactors(torch.cat([own.A, shared.A]), b)


def test_orthogonal_adapters_are_told_to_add():
    kinds = said(one(made(200, 150, 4, 1), made(200, 150, 4, 2)))
    assert kinds.keys() - {"cut"} == {"orthogonal", "signs", "caution"}
    assert kinds["orthogonal"].rules == ("linear", "svd") and kinds["orthogonal"].pairs == (("a0", "a1"),)


def test_aligned_adapters_are_told_to_sum_to_one():
    kinds = said(one(mixed(0.6, 1), mixed(0.6, 2)))
    assert "aligned" in kinds and "orthogonal" not in kinds and "ties" not in candidates(list(kinds.values()))
    assert "shared_outputs" not in kinds  # said already
    assert {"iso_c", "tsv_m", "svc"} < set(kinds["aligned"].rules) and "sum to 1" in kinds["aligned"].text


def test_opposed_adapters_are_told_of_ties():
    f, g = mixed(0.3, 1), mixed(0.3, 2)
    kinds = said(one(f, LoraFactors(g.A, g.B, -1.0)))
    assert kinds["opposed"].rules == ("ties",) and "aligned" not in kinds and "signs" not in kinds


def test_a_duplicate_and_a_large_one():
    f = made(40, 30, 3, 1)
    kinds = said(one(f, LoraFactors(f.A, f.B, 10.0), made(40, 30, 3, 2)))
    assert kinds["duplicate"].pairs == (("a0", "a1"),)
    assert kinds["norms"].pairs[0][0] == "a1" and "drowns" in kinds["norms"].text
    weights = kinds["norms"].weights
    assert sum(weights.values()) == pytest.approx(1) and weights["a0"] == pytest.approx(10 * weights["a1"], rel=1e-6)


def test_outputs_shared_while_inputs_differ():
    f, g = made(60, 80, 3, 1), made(60, 80, 3, 2)
    kinds = said(one(f, LoraFactors(g.A, f.B)))
    assert kinds["shared_outputs"].rules == ("pico", "svc") and "shared_inputs" not in kinds
    kinds = said(one(f, LoraFactors(f.A, g.B)))
    assert "shared_outputs" not in kinds and "one initialisation of A" in kinds["shared_inputs"].text


def test_ranks_modules_and_whole_tensors():
    x, y = made(6, 8, 2, 1), made(6, 8, 3, 2)
    extra = adapter({"layers.0.q": y, "layers.0.k": y}, "y", extra={"lm_head.weight": torch.ones(2, 2)})
    kinds = said(overlap(Bank([adapter({"layers.0.q": x}, "x"), extra])))
    assert "x 2, y 3" in kinds["ranks"].text and "delta space" in kinds["ranks"].text
    assert "of 2" in kinds["modules"].text and "lm_head.weight" in kinds["extra"].text
    same_ranks = said(one(x, made(6, 8, 2, 3)))
    assert not {"ranks", "modules", "extra", "norms", "zero"} & same_ranks.keys()


def test_what_a_cut_merge_reaches():
    several = said(one(*(made(200, 150, 4, s) for s in range(5))))
    assert "rank 4" in several["cut"].text
    assert "cut" not in said(one(mixed(0.99, 1), mixed(0.99, 2)))


def test_thresholds_and_kinds_are_those_of_the_page():
    page = (DOCS / "inspect.md").read_text(encoding="utf-8")
    source = Path(measuring.__file__).with_name("verdict.py").read_text(encoding="utf-8")
    thresholds = re.findall(r"^([A-Z_]+) = ([0-9.]+)  #", source, re.M)
    assert len(thresholds) == 10
    for name, value in thresholds:
        assert re.search(rf"`{name}` *\| *{re.escape(f'{float(value):g}')} ", page), name
    kinds = set(re.findall(r'Remark\(\s*"(\w+)"', source))
    assert len(kinds) == 14 and all(f"`{kind}`" in page for kind in kinds), kinds


# -- in print ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 14])
def test_every_adapter_is_printed_and_drawn(n, tmp_path):
    found = measured(*({f"layers.{k}.q": made(30, 20, 2, 40 * i + k) for k in range(3)} for i in range(n)))
    printed = text(found, "projection")
    assert all(f"a{i} " in printed for i in range(n)) and "…" not in printed
    want = float(found.all.cosine[0, 1])
    assert f"{want:.{3 if n == 2 else 2}f}" in printed
    if n < 14:  # one line a pair, then a band
        draw(found, tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 20_000


def test_matrices_hold_each_pair_once():
    found = measured(*({"layers.0.q": mixed(0.2 * i, i)} for i in range(4)))
    rows = [
        line.split() for line in text(found).split("cosine of dW")[1].split("output directions")[0].splitlines()[2:6]
    ]
    for i, row in enumerate(rows):
        assert row == [str(i + 1), f"a{i}", *(f"{float(found.all.cosine[i, j]):.2f}" for j in range(i))]


def test_a_sample_is_said():
    found = measured({"q": made(300, 12, 2, 1)}, {"q": made(300, 12, 3, 2)}, exact_entries=600)
    assert "sampled by rows (seed 0)" in text(found) and " ± 0." in text(found)
