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
    late = next((tmp_path / "cells/vision-develop").glob("freed-*-balanced.json"))
    kept = late.read_text()
    late.unlink()
    first = [n for n in names if n != choose.ALWAYS][:2]
    words = ["--cells", str(tmp_path / "cells")]
    assert choose.main(words) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith(f"designs: gated_iso_c, {', '.join(first)}, default") and "| nan |" in said
    with pytest.raises(LoralloyError, match="the development cells of freed are not all there"):
        choose.main([*words, "--write"])
    assert yaml.safe_load((tmp_path / "pairs.yaml").read_text()) == before
    late.write_text(kept)
    assert choose.main([*words, "--write"]) == 0
    want = ["freed", "gated_iso_c", first[0], "default"]
    assert yaml.safe_load((tmp_path / "pairs.yaml").read_text()) == {**before, "designs": want}


def test_cells_that_are_not_there_and_no_line_are_errors(tada, tmp_path):
    with pytest.raises(LoralloyError, match=r"the development cells of default, plain, .* are not all there"):
        tada.choose.main(["--cells", str(tmp_path), "--write"])
    with pytest.raises(LoralloyError, match="2 lines"):
        tada.choose.written("designs: [a]\ndesigns: [b]\n", ["c"])
