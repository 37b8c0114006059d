"""The designs are chosen by the development pairs' balanced cells, and by nothing else."""

from __future__ import annotations

import json

import pytest
import yaml

from loralloy.errors import LoralloyError


def test_the_best_balanced_on_both_halves_are_written(tada, tmp_path, monkeypatch, capsys):
    choose, names = tada.choose, tada.designs.BALANCED
    assert choose.ALWAYS in names and all(tada.designs.METHODS[n].rank == "max" for n in names)
    (tmp_path / "pairs.yaml").write_text((choose.HERE / "pairs.yaml").read_text())
    before = yaml.safe_load((tmp_path / "pairs.yaml").read_text())
    monkeypatch.setattr(choose, "HERE", tmp_path)
    level = {name: 0.70 - 0.01 * n for n, name in enumerate(n for n in names if n != choose.ALWAYS)}
    level[choose.ALWAYS] = 0.1
    level["gated_iso_c"] = 0.72
    language = {**level, "freed": 0.99}  # but the other half lacks one of its cells
    for half, scores in (("language", language), ("vision", level)):
        found = tada.plan.load(half)
        folder = tmp_path / f"cells/{half}-develop"
        folder.mkdir(parents=True)
        for name, score in scores.items():
            for pair in found.pairs("development"):
                for seed in found.development_seeds:
                    cell = {"pair": pair, "seed": seed, "rank": found.rank, "method": name, "at": "balanced"}
                    for at, right in (("balanced", score), ("ones", 1.0 - score)):
                        file = folder / f"{name}-{pair.replace('>', '-')}-{seed}-{at}.json"
                        file.write_text(json.dumps({"cell": {**cell, "at": at}, "test": right}))
    next((tmp_path / "cells/vision-develop").glob("freed-*-balanced.json")).unlink()
    assert choose.main(["--cells", str(tmp_path / "cells")]) == 0
    assert yaml.safe_load((tmp_path / "pairs.yaml").read_text()) == before
    first = [n for n in names if n != choose.ALWAYS][:2]
    assert capsys.readouterr().out.rstrip().endswith(f"designs: gated_iso_c, {', '.join(first)}, default")
    assert choose.main(["--cells", str(tmp_path / "cells"), "--write"]) == 0
    assert yaml.safe_load((tmp_path / "pairs.yaml").read_text()) == {
        **before,
        "designs": ["gated_iso_c", *first, "default"],
    }


def test_no_whole_design_and_no_line_are_errors(tada, tmp_path):
    with pytest.raises(LoralloyError, match="no design has all its development cells"):
        tada.choose.main(["--cells", str(tmp_path)])
    with pytest.raises(LoralloyError, match="2 lines"):
        tada.choose.written("designs: [a]\ndesigns: [b]\n", ["c"])
