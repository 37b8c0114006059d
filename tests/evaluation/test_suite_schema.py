"""A suite file: what is read, and every wrong line named with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from loralloy.errors import LoralloyError
from loralloy.evaluation.suite import Suite
from loralloy.evaluation.suite.runner import overridden

GOOD = """version: 1
model: models/tiny
bank: bank
tasks: [tasks]
rows: {default: 100, ties: 40}
index: {rows: 400, seeds: [0, 1, 2]}
methods:
  - majority
  - {name: mixture, k: 2}
  - {name: ties, kind: routed, rule: {name: ties, density: 0.5}, space: factors, seeds: [0], weigher: {kind: kernel, k: 20}}
out: out
"""


def load(folder: Path, text: str) -> Suite:
    (folder / "s.yaml").write_text(text)
    return Suite.load(folder / "s.yaml")


def test_read(tmp_path):
    suite = load(tmp_path, GOOD)
    assert [(m.kind, m.name) for m in suite.methods] == [
        ("majority", "majority"), ("mixture", "mixture"), ("routed", "ties"),
    ]  # fmt: skip
    assert [suite.rows_of(m) for m in suite.methods] == [100, 100, 40]
    ties = suite.methods[2]
    assert ties.settings["weigher"].items() >= {"kind": "kernel", "k": 20}.items() and ties.space == "factors"
    assert ties.rule == "ties(density=0.5, majority=total, normaliser=count, vote=unweighted, trim=tensor)"
    assert suite.fields.queries == ("hinted", "raw") and suite.fields.scopes == ("in_domain", "leave_own_out")
    assert suite.fields.bank == str(tmp_path / "bank") and suite.out == tmp_path / "out"  # relative to the file
    assert suite.fields.tasks == (str(tmp_path / "tasks"),)
    assert [m.name for m in suite.only(["ties"]).methods] == ["ties"]
    assert overridden(suite, batch_size=3, out=None).fields.batch_size == 3 and overridden(suite) is suite
    pinned = load(tmp_path, GOOD.replace("models/tiny", "org/name@abc123"))
    assert pinned.fields.model == "org/name@abc123"


@pytest.mark.parametrize(
    "old,new,says",
    [
        ("version: 1\n", "", "no `version`; add `version: 1`"),
        ("version: 1\n", "version: 2\n", "s.yaml:1:10: `version`: 2 is not known"),
        ("bank: bank\n", "", "the field `bank` is missing"),
        ("bank: bank", "bank: 3", "s.yaml:3:7: `bank`: 3 cannot stand here; give text"),
        ("bank: bank", "bnak: bank", "3:1: `bnak`: unknown field (did you mean `bank`?)"),
        ("rows: 400", "rowz: 400", "s.yaml:6:9: `index.rowz`: unknown field (did you mean `rows`?)"),
        ("ties: 40", "tise: 40", "`rows.tise`: there is no method 'tise' (did you mean `ties`?)"),
        ("ties: 40", "ties: 0", "s.yaml:5:28: `rows.ties`: input should be greater than or equal to 1, not 0"),
        ("- majority", "- majorty", "s.yaml:8:5: `methods[0]`: method kind 'majorty' is not known"),
        ("- majority", "- 3", "`methods[0]`: 3 cannot stand here; give a method's kind"),
        ("- majority", "- {k: 3}", "`methods[0]`: the field `kind` is missing"),
        ("- majority", "- mixture", "s.yaml:9:5: `methods[1]`: two methods are called 'mixture'"),
        ("k: 2", "kk: 2", "s.yaml:9:21: `methods[1].kk`: unknown field of a mixture method (did you mean `k`?)"),
        ("k: 2", "k: two", "`methods[1].k`"),
        ("density: 0.5", "density: 2", "density 2 of ties is not valid; give a number from 0 to 1"),
        ("density: 0.5", "denisty: 0.5", "ties has no parameter 'denisty'; its parameters: density"),
        ("rule: {name: ties, density: 0.5}", "rule: tise", "rule 'tise' is not known (did you mean ties?)"),
        ("space: factors", "space: fctors", "space 'fctors' is not known"),
        ("rule: {name: ties, density: 0.5}", "rule: tsv_m", "rule 'tsv_m' is defined on delta"),
        ("seeds: [0],", "seeds: [7],", "`methods[2].seeds`: 7 is not among the suite's 0, 1, 2"),
        (
            "kind: kernel",
            "kind: kernle",
            "`methods[2].weigher.kind`: 'kernle' is not known; give paper, kernel, probe or auto",
        ),
        ("k: 20", "kk: 20", "`methods[2].weigher.kk`: unknown field"),
        ("out: out", "queries: [hint]\nout: out", "`queries[0]`: 'hint' is not known; give hinted or raw"),
        ("tasks: [tasks]", "tasks: []", "`tasks`"),
        ("methods:\n", "methods: []\nother:\n", "`methods`"),
        ("bank: bank", "bank: bank\nbank: other", "`bank` is given twice, on lines 3 and 4"),
        ("space: factors", "space: factors, rank: big", "`methods[2].rank`: 'big' is not a rank"),
    ],
)
def test_refused(tmp_path, old, new, says):
    assert old in GOOD
    with pytest.raises(LoralloyError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_not_a_suite(tmp_path):
    with pytest.raises(LoralloyError, match="no such suite"):
        Suite.load(tmp_path / "none.yaml")
    with pytest.raises(LoralloyError, match="a suite file is a mapping"):
        load(tmp_path, "- 1\n")
    with pytest.raises(
        LoralloyError, match=r"--only tied: .* \(did you mean `ties`\?\); it has majority, mixture, ties"
    ):
        load(tmp_path, GOOD).only(["tied"])


@pytest.mark.parametrize("name", ["suite", "demo-suite", "paper-preset"])
def test_the_shipped_suites(name):
    folder = Path(__file__).resolve().parents[2] / "examples" / "suite"
    suite = Suite.load(folder / f"{name}.yaml")
    assert suite.methods and all(Path(entry).exists() for entry in suite.fields.tasks)
