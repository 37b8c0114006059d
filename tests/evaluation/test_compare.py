"""The comparison: every column means what its line in SYSTEMS says, counted by hand."""

from __future__ import annotations

import io
import json
import math
import re

import pytest

from loralloy.answer import Answerer
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.evaluation import compare as module
from loralloy.evaluation.compare import SYSTEMS, Comparison, compare, pick_examples
from loralloy.evaluation.compare_page import difference_lines, markdown, plot, terminal_table, write
from loralloy.live.base import load_base
from loralloy.live.scoring import score_options
from loralloy.retrieval import HashEmbedder, Index
from loralloy.tasks import load_tasks
from loralloy.weighting import Router
from loralloy.weights import Weights
from world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def tasks(world):
    return load_tasks(world.tasks)


@pytest.fixture(scope="module")
def answerer(world):
    model, tokenizer = load_base(str(world.model), "float32", "cpu")
    with Index.open(world.index, HashEmbedder(128)) as index:
        yield Answerer(model, tokenizer, Bank.load(world.bank), Router(index, p=1.0))


@pytest.fixture(scope="module")
def examples(tasks):
    return pick_examples(tasks, 24)


@pytest.fixture(scope="module")
def compared(answerer, tasks, examples):
    return compare(answerer, tasks, examples, batch_size=5)


def by_hand(answerer, example, weights):
    """One example alone: its options scored under its own weights."""
    with answerer.live.compose(weights):
        scores = score_options(answerer.model, answerer.tokenizer, [example.prompt], [example.options])[0]
    return example.options[int(scores.argmax())] == example.answer


def test_columns_by_hand(compared, answerer, tasks, examples):
    assert list(compared.correct) == list(SYSTEMS)
    route = answerer.router.weigh
    want = {
        "base": lambda e: None,
        "own": lambda e: Weights({e.task: 1.0}),
        "uniform": lambda e: Weights({"spam": 1 / 3, "weather": 1 / 3, "cooking": 1 / 3}),
        "routed": lambda e: route(e.query),
        "routed_raw": lambda e: route(e.raw),
    }
    for system, weights in want.items():
        assert compared.correct[system] == [by_hand(answerer, e, weights(e)) for e in examples], system
    assert 0 < sum(compared.correct["own"]) < len(examples)  # a table of zeros would prove nothing


def test_majority_by_hand(compared, tasks, examples):
    commonest = {}
    for task in tasks:
        answers = [e.answer for e in task.examples("train")]
        commonest[task.name] = min(set(answers), key=lambda a: (-answers.count(a), a))
    assert compared.correct["majority"] == [e.answer == commonest[e.task] for e in examples]


def test_floor_by_hand():
    correct = {
        "majority": [True, True, False, False, False],
        "base": [True, False, False, True, True],
    }
    made = Comparison(("x", "y"), ("x", "x", "x", "y", "y"), correct)
    assert made.floor() == [True, True, False, True, True]
    assert made.of("base", "y") == [True, True] and made.of("majority") == correct["majority"]


def test_every_row_its_own_weights(answerer, tasks, examples, compared, monkeypatch):
    """Swap the weights of the rows and the outcome is that of the swapped weights, row by row."""
    real = Router.weigh_batch
    monkeypatch.setattr(Router, "weigh_batch", lambda self, texts: real(self, texts)[::-1])
    swapped = compare(answerer, tasks, examples, ["routed"], batch_size=5).correct["routed"]
    weights = real(answerer.router, [e.query for e in examples])[::-1]
    assert swapped == [by_hand(answerer, e, w) for e, w in zip(examples, weights, strict=True)]
    assert swapped != compared.correct["routed"]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_do_not_matter(answerer, tasks, examples, compared, batch_size):
    assert compare(answerer, tasks, examples, batch_size=batch_size).correct == compared.correct


def test_the_order_of_examples_does_not_matter(answerer, tasks, examples, compared):
    turned = compare(answerer, tasks, examples[::-1])
    assert {s: c[::-1] for s, c in turned.correct.items()} == compared.correct


def test_routing_by_hand(compared, answerer, examples):
    weights = [answerer.router.weigh(e.query) for e in examples]
    top = [max(w.names, key=w.of) == e.task for w, e in zip(weights, examples, strict=True)]
    own = [w.of(e.task) for w, e in zip(weights, examples, strict=True)]
    assert compared.routing["routed top-1"] == pytest.approx(sum(top) / len(top))
    assert compared.routing["routed weight on own"] == pytest.approx(sum(own) / len(own))
    assert compared.routing["routed adapters used"] == pytest.approx(sum(len(w.names) for w in weights) / len(top))


def test_base_in_its_best_format(world, answerer, tasks, examples, tmp_path):
    """The format that training recorded in metrics.json is the one that the base is asked in."""
    import shutil

    shutil.copytree(world.bank, tmp_path / "bank")
    for name in ("spam", "weather"):
        (tmp_path / "bank" / name / "metrics.json").write_text(json.dumps({"base_format": {"name": "no_hint"}}))
    other = Answerer(answerer.model, answerer.tokenizer, Bank.load(tmp_path / "bank"), answerer.router)
    try:
        made = compare(other, tasks, examples, ["base"])
    finally:
        other.live.remove()
    assert made.settings["base_formats"] == {"spam": "no_hint", "weather": "no_hint", "cooking": "as_trained"}
    want = []
    for e in examples:
        prompt = e.prompt if e.task == "cooking" else e.prompt.split("\n", 1)[1]
        scores = score_options(answerer.model, answerer.tokenizer, [prompt], [e.options])[0]
        want.append(e.options[int(scores.argmax())] == e.answer)
    assert made.correct["base"] == want


def test_progress_and_refusals(answerer, tasks, examples):
    seen = dict.fromkeys(SYSTEMS, 0)

    def count(system, n):
        seen[system] += n

    compare(answerer, tasks, examples[:6], progress=count)
    assert set(seen.values()) == {6}
    with pytest.raises(LoralloyError, match="system 'oracle' is not known; choose from majority"):
        compare(answerer, tasks, examples, ["oracle"])
    alone = Answerer(answerer.model, answerer.tokenizer, answerer.bank.select(["spam"]), answerer.router)
    try:
        with pytest.raises(LoralloyError, match=r"task 'cooking' has no adapter in the bank \(spam\)"):
            compare(alone, tasks, examples)
    finally:
        alone.live.remove()


# -- which examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 10, 24])
def test_picked_evenly_in_hash_order(tasks, n):
    picked = pick_examples(tasks, n)
    counts = [sum(e.task == t.name for e in picked) for t in tasks]
    assert sum(counts) == len({e.id for e in picked}) == n and max(counts) - min(counts) <= 1
    for task, count in zip(tasks, counts, strict=True):
        assert [e for e in picked if e.task == task.name] == task.examples("test", count)


def test_skipped(tasks):
    first, rest = pick_examples(tasks, 9), pick_examples(tasks, 15, 3)
    assert not {e.id for e in first} & {e.id for e in rest} and len(first) + len(rest) == 24
    with pytest.raises(LoralloyError, match=r"task 'cooking' has 5 test rows left, not 6"):
        pick_examples(tasks, 16, 3)
    for given, n in [([], 3), (tasks, 0), (tasks, -1)]:
        with pytest.raises(LoralloyError, match="nothing to answer"):
            pick_examples(given, n)


# -- the summary and its pages -----------------------------------------------------------------------------------------


def test_summary_is_plain_means(compared):
    summary = compared.summary()
    mean = {s: sum(c) / len(c) for s, c in compared.correct.items()}
    assert {s: a["value"] for s, a in summary["accuracy"].items()} == pytest.approx(mean)
    floor = sum(compared.floor()) / len(compared.floor())
    want = {
        "routed - better of base and majority (by task)": mean["routed"] - floor,
        "routed - own": mean["routed"] - mean["own"],
        "routed - uniform": mean["routed"] - mean["uniform"],
        "routed_raw - own": mean["routed_raw"] - mean["own"],
    }
    assert {k: d["value"] for k, d in summary["difference"].items()} == pytest.approx(want)
    assert all(d["low"] <= d["value"] <= d["high"] for d in summary["difference"].values())
    for task, row in summary["by_task"].items():
        assert {s: a["n"] for s, a in row.items()} == dict.fromkeys(SYSTEMS, 8)
        assert row["own"]["value"] == sum(compared.of("own", task)) / 8
    assert json.loads(json.dumps(summary)) == summary and compared.summary() == summary


def test_summary_of_some_systems_and_tasks(answerer, tasks, examples):
    made = compare(answerer, tasks, examples[:3], ["own", "routed"])  # one task's rows alone
    assert made.tasks == (examples[0].task,)
    summary = made.summary()
    assert set(summary["difference"]) == {"routed - own"} and summary["n"] == 3
    assert len(terminal_table(made, summary).rows) == 4


def test_page_has_every_number(compared, tmp_path):
    summary = compared.summary()
    page = markdown(compared, summary, "Title", "loralloy evaluate -n 24", ["A note."])
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for task, row in summary["by_task"].items():
        line = next(r for r in rows if r.startswith(f"| {task} |"))
        assert re.findall(r"\d\.\d{3}", line) == [f"{row[s]['value']:.3f}" for s in SYSTEMS]
    total = [f"{a[k]:.3f}" for a in summary["accuracy"].values() for k in ("value", "low", "high")]
    assert re.findall(r"\d\.\d{3}", rows[-1]) == total and "n = 24" in rows[-1]
    assert len({row.count("|") for row in rows}) == 1
    for line in difference_lines(summary):
        assert f"- {line}" in page
    for name, value in summary["routing"].items():
        assert f"- {name}: {value:.3f}" in page
    for text in ("# Title", "`loralloy evaluate -n 24`", "A note.", "k 100", "index_rows 144", *SYSTEMS.values()):
        assert text in page


def test_terminal_table_fits_in_80_columns(compared):
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    summary = compared.summary()
    rows = zip(("sentiment_editorials", "phrase_language", "spam"), summary["by_task"].values(), strict=True)
    console.print(terminal_table(compared, summary | {"by_task": dict(rows)}))
    text = console.export_text()
    assert "…" not in text and "sentiment_editorials" in text and "majority" in text
    shown = re.findall(r"\d\.\d{3}", text)
    total = compared.summary()["accuracy"]
    for end in ("value", "low", "high"):
        assert {f"{a[end]:.3f}" for a in total.values()} <= set(shown)


def test_written(compared, tmp_path):
    pytest.importorskip("matplotlib")
    summary = compared.summary()
    write(compared, summary, tmp_path / "a" / "b", "r", "Title", "command", [])
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["r.json", "r.md", "r.png"]
    assert (tmp_path / "a/b/r.png").read_bytes()[:4] == b"\x89PNG" and "(r.png)" in (tmp_path / "a/b/r.md").read_text()
    assert json.loads((tmp_path / "a/b/r.json").read_text()) == summary
    plot(summary, ["own"], tmp_path / "one.png")


def test_interval_is_of_pairs(monkeypatch):
    """Two systems that fail on the same rows differ by nothing, however often they fail."""
    flips = [bool(n % 2) for n in range(40)]
    correct = dict.fromkeys(("majority", "base", "own", "routed", "uniform"), flips)
    made = Comparison(("t",), ("t",) * 40, correct)
    for difference in made.summary()["difference"].values():
        assert (difference["low"], difference["value"], difference["high"]) == (0, 0, 0)
    low, high = (made.summary()["accuracy"]["own"][k] for k in ("low", "high"))
    assert math.isclose(low + high, 1.0) and module.SYSTEMS.keys() >= correct.keys()
