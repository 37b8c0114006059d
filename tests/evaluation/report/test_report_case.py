"""The case study on a small model: the bank's own weights and choices, and its place in the report."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from fake_cells import write_cells

from loralloy.adapter import Adapter
from loralloy.errors import LoralloyError
from loralloy.evaluation.report import case_study, load, summarise
from loralloy.evaluation.report.blocks import markdown
from loralloy.evaluation.report.case import OUR_OPTIONS, PAPER_OPTIONS, QUESTION, read_case, stale_parts
from loralloy.evaluation.report.pages import blocks
from loralloy.evaluation.suite import Suite


@pytest.fixture(scope="module")
def asked(small, write_suite, tmp_path_factory):
    """A suite of two tasks, one of them called commonsense_qa, its cells, and the case study."""
    root = tmp_path_factory.mktemp("case")
    for name, new in (("spam", "spam"), ("weather", "commonsense_qa")):
        data = yaml.safe_load((small / "tasks" / f"{name}.yaml").read_text()) | {"name": new}
        shutil.copy(small / "tasks" / data["source"]["path"], root)
        (root / f"{new}.yaml").write_text(yaml.safe_dump(data))
        a = Adapter.load(small / "suite_bank" / name)
        Adapter(new, {m: a[m] for m in a}, a.config, a.base).save(root / "bank" / new)
    ties = {"name": "ties", "kind": "routed", "rule": {"name": "ties", "density": 0.5}, "space": "factors"}
    methods = ["majority", "base", "perfect", {"name": "linear", "kind": "routed"}, ties]
    tasks = [str(root / "spam.yaml"), str(root / "commonsense_qa.yaml")]
    suite = Suite.load(write_suite(root, tasks=tasks, bank="bank", methods=methods, multitask=None))
    write_cells(suite)
    said: list[str] = []
    path = case_study(suite, advance=said.append)
    return suite, path, json.loads(path.read_text()), said


def test_what_is_asked(asked):
    suite, path, data, said = asked
    assert path == suite.out / "case.json" and data["question"] == QUESTION and QUESTION in data["prompt"]
    assert [f["options"] for f in data["forms"]] == [list(PAPER_OPTIONS), list(OUR_OPTIONS)]
    assert len(said) == 2 * (1 + 1 + 2 + 2)
    for form in data["forms"]:
        assert [(s["method"], s["query"]) for s in form["strategies"]] == [
            ("base", None), ("perfect", None), ("linear", "hinted"), ("ties", "hinted"), ("linear", "raw"), ("ties", "raw"),
        ]  # fmt: skip
        for s in form["strategies"]:
            assert s["choice"] == form["options"][s["scores"].index(max(s["scores"]))]
        for w in form["weights"]:
            assert sum(w["weights"].values()) == pytest.approx(1.0, abs=1e-3)


def test_scores_are_those_of_the_model(asked):
    """Linear's live composition against the merged adapter in a model of its own."""
    from loralloy.bank import Bank
    from loralloy.live import LiveModel
    from loralloy.live.base import load_base
    from loralloy.live.scoring import score_options
    from loralloy.merging import merge
    from loralloy.weights import Weights

    suite, _, data, _ = asked
    form = data["forms"][1]
    weights = next(w["weights"] for w in form["weights"] if w["query"] == "raw")
    merged = merge(Bank.load(suite.fields.bank), Weights(weights), "linear", "delta", "full").adapter
    model, tokenizer = load_base(suite.fields.model, "float32", "cpu")
    with LiveModel(model, Bank([merged]), assume_same_base=True).compose(Weights({merged.name: 1.0})):
        scores = score_options(model, tokenizer, [data["prompt"]], [form["options"]])[0]
    noted = next(s["scores"] for s in form["strategies"] if (s["method"], s["query"]) == ("linear", "raw"))
    assert noted == pytest.approx(scores.tolist(), abs=5e-3)


def test_what_it_was_made_of(asked):
    """A case study of the cells' base, bank, data, index and of the suite's methods is not remarked upon; another is."""
    from loralloy.bank import Bank
    from loralloy.evaluation.suite.workbench import ENGINE, short_hash

    suite, path, data, _ = asked
    made, index = data["made_of"], suite.fields.index
    assert set(made) == {"engine", "base", "bank", "data", "index", "methods"}
    assert (made["engine"], made["index"]) == (ENGINE, [index.rows, index.template, index.store])
    assert made["bank"] == short_hash({n: a.content_hash for n, a in Bank.load(suite.fields.bank).items()})
    cells = [{"made_of": {name: part for name, part in made.items() if name != "methods"}}, {}]
    assert stale_parts(data, suite, cells) == []
    assert stale_parts(data, Suite(suite.fields, suite.methods[:-1], suite.path), cells) == ["methods"]
    cells[0]["made_of"] |= {"bank": "another", "index": [1, "raw", "exact"]}
    assert stale_parts(data, suite, cells) == ["bank", "index"]
    evidence = load(suite, samples=100)
    assert not any("case study" in remark for remark in summarise(evidence, suite.out)["remarks"])
    text = path.read_text()
    try:
        path.write_text(json.dumps(data | {"made_of": made | {"methods": "others"}}))
        assert summarise(evidence, suite.out)["remarks"][-1] == (
            "The case study was made with other methods than the suite has; make it again with --case."
        )
        path.write_text(json.dumps({name: value for name, value in data.items() if name != "made_of"}))
        assert "does not say what it was made of" in summarise(evidence, suite.out)["remarks"][-1]
    finally:
        path.write_text(text)


def test_on_the_page(asked):
    suite, _, _, _ = asked
    summary = summarise(load(suite, samples=100), suite.out)
    text = markdown(blocks(summary, "r", set()))
    assert (
        "## Case study: where can I buy a tennis ball?" in text
        and "these five options are ours, not the paper's" in text
    )
    assert "| ties | factors | ties (density 0.5), max | hinted |" in text


def test_without_and_wrong(asked, tmp_path, whole):
    assert read_case(tmp_path) is None
    (tmp_path / "case.json").write_text("{")
    with pytest.raises(LoralloyError, match="make it again with --case"):
        read_case(tmp_path)
    (tmp_path / "case.json").write_text('{"version": 9}')
    with pytest.raises(LoralloyError, match="not a case study of version 1"):
        read_case(tmp_path)
    suite = asked[0]
    alone = Suite(suite.fields.model_copy(update={"tasks": suite.fields.tasks[:1]}), suite.methods, suite.path)
    with pytest.raises(LoralloyError, match="'commonsense_qa' with one text column"):
        case_study(alone, tmp_path)
