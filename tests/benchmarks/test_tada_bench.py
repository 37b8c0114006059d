"""The harness of benchmarks/tada: its plan, and a tiny run stopped and started again."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks/tada"
PAIRS = """version: 1
seeds: [0, 1]
development_seeds: [0]
calibration: 6
vision:
  model: model
  dtype: float32
  images: {path: emoji.npz, layout: emoji, size: 28}
  rank: 2
  alpha: 4
  steps: 4
  batch_size: 8
  lr: 0.005
  masked: 0.5
  tasks: {a: a, b: b, c: c}
  domains: {a: a, b: b, c: c}
  final: [a>b, b>a]
  reserves: []
  development: [a>c]
designs: [default, activations]
"""


@pytest.fixture
def small(tada, tiny, tmp_path, monkeypatch):
    """Two final pairs of three tiny styles; three baselines."""
    for name in ("emoji.npz", "model"):
        (tmp_path / name).symlink_to(tiny / name)
    (tmp_path / "pairs.yaml").write_text(PAIRS)
    for module in (tada.plan, tada.site_images):
        monkeypatch.setattr(module, "HERE", tmp_path)
    some = tuple(m for m in tada.designs.BASELINES if m.name in ("linear", "ties", "pico"))
    monkeypatch.setattr(tada.plan, "BASELINES", some)
    return tada


def work(tada, out, *words, until=600.0):
    """One call's only process; the cells of the final pairs by name."""
    common = ["--half", "vision", "--device", "cpu", "--out", str(out)]
    options = tada.run.parser().parse_args(
        [*common, *words, "--worker", "0", str(time.time() + until), f"r{time.time()}"]
    )
    tada.worker.Worker(options).run()
    return {p.stem: json.loads(p.read_text()) for p in (out / "cells/vision-final").glob("*.json")}


@pytest.mark.parametrize("half", ["language", "vision"])
def test_the_committed_plan(tada, half):
    plan = tada.plan
    found = plan.load(half)
    assert (
        len(found.pairs("final")) == 6 and len(found.seeds) == 3 and found.calibration == 32 and len(found.designs) >= 3
    )
    domains = [plan.split(p)[1] for p in found.pairs("final")]
    assert len(set(domains)) == 6
    assert not set(domains) & {plan.split(p)[1] for p in found.pairs("development")}
    made, cells = set(), set()
    for group in plan.groups(found):
        assert {job.name for job in group.needs} <= made, group.name
        made |= {job.name for job in group.jobs}
        names = {(plan.folder(half, group.part), c.name) for c in group.cells}
        assert len(names) == len(group.cells) and not names & cells
        cells |= names
        if half == "vision":
            assert not any(
                (c.method.gate or {}).get("reference") == "general" and c.method.reference == "general"
                for c in group.cells
            )
    locks = [g.name for g in plan.groups(found)]
    assert len(locks) == len(set(locks)), "two groups share a lock"
    tuned = {
        part: {c.pair for g in plan.groups(found) if g.part == part for c in g.cells} for part in ("develop", "tried")
    }
    assert tuned["develop"] == set(found.pairs("development")) >= tuned["tried"]


def test_cells_are_right_resumed_and_failures_stay_alone(small, tmp_path, monkeypatch, capsys):
    import torch

    from loralloy.adapter import Adapter
    from loralloy.bank import Bank
    from loralloy.live import LiveModel
    from loralloy.weights import Weights

    out, words = tmp_path / "out", ["--seeds", "0", "--parts", "task", "domain", "alone", "design", "best", "learned"]
    real, asked = small.work.Site.cell, []

    def cell(site, one):
        asked.append(one.name)
        if one.method.name == "pico" and one.at == "even":
            raise RuntimeError("no such luck")
        return real(site, one)

    monkeypatch.setattr(small.work.Site, "cell", cell)
    cells = work(small, out, *words)
    said = capsys.readouterr().out
    assert said.count("FAILED: no such luck") == 2 and said.count("FAILED") == 2
    # 2 pairs: 3 alone, 2 designs at ones, free and best, 3 baselines four times less one, 3 learned
    assert len(cells) == 2 * (3 + 6 + 12 - 1 + 3)
    folder = out / "adapters/vision/r2/s0"
    half = small.plan.load("vision")
    site = small.work.Site(half, out, "cpu")
    site.inner.begin(0)
    bank = Bank([Adapter.load(folder / "task-a", "task"), Adapter.load(folder / "domain-b", "domain")])
    live = LiveModel(site.inner.model, bank)  # sums the adapters' outputs: neither terms nor merged weights
    for name, scale in (
        ("linear-ones", (1.0, 1.0)),
        ("linear-even", (0.5, 0.5)),
        ("task", (1.0, 0.0)),
        ("domain", (0.0, 1.0)),
    ):
        with torch.no_grad(), live.compose(Weights(dict(zip(bank.names, scale, strict=True)))):
            want = "".join("01"[r] for r in site.inner.answers("b", "test"))
        assert cells[f"a-on-b-s0-r2-{name}"]["correct"] == want
    sample = small.site_text.sample
    best = cells["a-on-b-s0-r2-ties-best"]
    assert best["validation"] == max(t["validation"] for t in best["tried"] if t["density"] == best["density"])
    assert len(best["tried"]) == 3 + len(small.designs.COEFFICIENTS) - 1
    free = cells["a-on-b-s0-r2-linear-free"]
    seen = {t["scale"][0]: t["information"] for t in free["tried"]}
    chosen = sample(site.inner.sets["b"].rows("train"), half.calibration, 0)
    for level in seen:
        with torch.no_grad(), live.compose(Weights(dict.fromkeys(bank.names, level))):
            p = site.inner.classifier(site.inner.sets["b"].load(chosen)).softmax(1)
        mean = p.mean(0)
        assert seen[level] == pytest.approx(float((p * (p.log() - mean.log())).sum(1).mean()), rel=1e-3, abs=1e-7)
    assert list(seen) == sorted(seen) and free["scale"] == [max(seen, key=seen.get)] * 2
    live.remove()
    ours = cells["a-on-b-s0-r2-activations-ones"]
    assert ours["conflicts"]["components"] > 0 and len(ours["slope"]) == 4 and len(ours["domain_share"]) == 3
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*/*.json")}
    asked.clear()
    monkeypatch.setattr(small.work.Site, "cell", lambda s, c: (asked.append(c.name), real(s, c))[1])
    assert len(work(small, out, *words)) == 2 * (3 + 6 + 12 + 3)
    assert asked == ["a-on-b-s0-r2-pico-even", "b-on-a-s0-r2-pico-even"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert work(small, tmp_path / "late", until=-1) == {}


def test_a_domains_text_has_no_label_and_no_hint(tada, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests/training"), *sys.path])
    tiny = importlib.import_module("tiny")

    from loralloy.tasks.task import Task
    from loralloy.training.data import encode_examples

    task = Task.load(tiny.save_task(tmp_path))
    texts = tada.texts.inputs(task)
    tested = {e.raw for split in ("validation", "test") for e in task.examples(split)}
    assert texts and not tested & set(texts)
    assert all(t in {" ".join(e.raw.split()) for e in task.examples("train")} for t in texts)
    rows = tada.texts.as_task("text", texts, tmp_path / "lm.jsonl").examples("train")
    assert {f"{e.prompt} {e.answer}" for e in rows} <= set(texts)
    tokenizer = tiny.make_tokenizer()
    encoded, _ = encode_examples(tokenizer, rows, "", 512)
    wanted = {tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts}
    skip = len(encoded[0].ids) - 1 - min(len(w) for w in wanted if w[-1] == encoded[0].ids[-2])
    assert skip in (0, 1)  # a BOS
    assert all(e.ids[skip:-1] in wanted or e.ids[:-1] in wanted for e in encoded)


def test_a_level_is_asked_of_the_texts_that_are_probed(tada, tmp_path, monkeypatch):
    """Also where some rows hold the same text, or one word, so that there are fewer texts than rows."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests/training"), *sys.path])
    tiny = importlib.import_module("tiny")
    from loralloy.tasks.task import Task
    from loralloy.weighting import levels

    task = Task.load(tiny.save_task(tmp_path))
    every = task.examples("train")
    rows = [every[0], every[1], every[0], *every[2:]]
    monkeypatch.setattr(Task, "examples", lambda self, split, limit=None: rows[:limit])
    monkeypatch.setattr(tada.site_text, "text_batches", lambda tokenizer, texts, *_: texts)
    monkeypatch.setattr(levels, "text_answers", lambda model, tokenizer, prompts, options, size: prompts)
    half = SimpleNamespace(fields={"domains": {"d": "d.yaml"}, "max_length": 512})
    site = object.__new__(tada.site_text.TextSite)
    site.half, site.model, site.tokenizer = half, SimpleNamespace(device="cpu"), tiny.make_tokenizer()
    site._tasks = {"d.yaml": task}
    for seed in range(3):
        probed, asked = site.unlabelled("domain", "d", 6, seed), site.unlabelled_answers("d", 6, seed)
        assert len(probed) == 6 and all(text in " ".join(p.split()) for text, p in zip(probed, asked, strict=True))
