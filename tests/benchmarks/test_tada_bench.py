"""The harness of benchmarks/tada: its plan, and a tiny run stopped and started again."""

from __future__ import annotations

import dataclasses
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
    ready: set[str] = set()  # "tuned" reads the cell at "best" of the same group
    for group in plan.groups(found):
        for c in group.cells:
            if c.at == "tuned":
                assert c.name.removesuffix("tuned") + "best" in ready, c.name
            ready.add(c.name)
        ready = set() if group.part in plan.TUNING else ready
    assert sum(c.at == "tuned" for g in plan.groups(found) for c in g.cells) == 6 * 3 * (15 + len(found.designs))
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

    out = tmp_path / "out"
    words = ["--seeds", "0", "--parts", "task", "domain", "alone", "design", "best", "learned", "free"]
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
    # 2 pairs: 3 alone and the task adapter balanced, 2 designs five times, 3 baselines six times less one, 3 learned
    assert len(cells) == 2 * (4 + 10 + 18 - 1 + 3)
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
    balanced_cells_are_right(small, cells, site, bank)
    ours = cells["a-on-b-s0-r2-activations-ones"]
    assert ours["conflicts"]["components"] > 0 and len(ours["slope"]) == 4 and len(ours["domain_share"]) == 3
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*/*.json")}
    asked.clear()
    monkeypatch.setattr(small.work.Site, "cell", lambda s, c: (asked.append(c.name), real(s, c))[1])
    assert len(work(small, out, *words)) == 2 * (4 + 10 + 18 + 3)
    assert asked == ["a-on-b-s0-r2-pico-even", "b-on-a-s0-r2-pico-even"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert work(small, tmp_path / "late", until=-1) == {}


def test_what_a_balance_and_a_freed_adapter_need(small, tmp_path, monkeypatch):
    import torch

    from loralloy.adapter import Adapter
    from loralloy.bank import Bank
    from loralloy.errors import LoralloyError
    from loralloy.live import LiveModel
    from loralloy.weighting.common import freed_bank
    from loralloy.weighting.probed import probe
    from loralloy.weights import Weights

    out, plan, methods = tmp_path / "out", small.plan, small.designs.METHODS
    work(small, out, "--seeds", "0", "--parts", "task", "domain")
    half = plan.load("vision")
    site = small.work.Site(half, out, "cpu")

    def cell(name, at):
        return plan.Cell("a>b", 0, half.rank, plan.of_half(methods[name], "vision"), at)

    # the coefficients are those of a cell that is there, and of these settings
    with pytest.raises(LoralloyError, match=r"linear-best.json, which is not there; make that cell first"):
        site.cell(cell("linear", "tuned"))
    file = small.kept.path(out, half, cell("linear", "best"))
    file.parent.mkdir(parents=True)
    told = {"cell": {"key": small.kept.key(half, cell("linear", "best"))}, "scale": [0.5, 0.25]}
    file.write_text(json.dumps(told))
    assert site.cell(cell("linear", "tuned"))["scale"] == [0.5, 0.25]
    file.write_text(json.dumps({**told, "cell": {"key": "other"}}))
    with pytest.raises(LoralloyError, match="other settings; remove it"):
        site.cell(cell("linear", "tuned"))

    # one common direction is taken from the domain adapter, and the whole of it is kept beside
    folder = out / "adapters/vision/r2/s0"
    bank = Bank([Adapter.load(folder / "task-a", "task"), Adapter.load(folder / "domain-b", "domain")])
    site.drop()
    readings = probe(site.inner.model, bank, site.inner.unlabelled("domain", "b", half.calibration, 0), common=16)
    live = LiveModel(site.inner.model, freed_bank(bank, readings.common, 1, ["domain"]))
    with torch.no_grad(), live.compose(Weights(dict.fromkeys(bank.names, 1.0))):
        want = "".join("01"[r] for r in site.inner.answers("b", "test"))
        logits = site.inner.classifier(site.inner._seen["b", "test"][0])
    live.remove()
    assert site.cell(cell("linear_freed", "ones"))["correct"] == want
    with site.set(methods["linear_freed"], (1.0, 1.0), {}):
        assert torch.allclose(site.inner.classifier(site.inner._seen["b", "test"][0]), logits, atol=1e-5)
    with site.set(methods["linear"], (1.0, 1.0), {}):
        assert not torch.allclose(site.inner.classifier(site.inner._seen["b", "test"][0]), logits, atol=1e-5)
    freed = site.cell(cell("freed", "balanced"))
    assert freed["conflicts"]["components"] > 0 and freed["balance"]["after"] <= freed["balance"]["before"]

    # where there is no balance the cell is scored as it is, with the reason
    def none(domain):
        raise LoralloyError("no direction")

    monkeypatch.setattr(site.inner, "directions", none)
    for name, at in (("linear", "ones"), ("task", "")):
        method = next((m for m in plan.ALONE if m.name == name), methods.get(name))
        plain = plan.Cell("a>b", 0, half.rank, method, at)
        left = site.cell(dataclasses.replace(plain, at="balanced"))
        assert left["balance"] == {"reason": "no direction"} and left["correct"] == site.cell(plain)["correct"]


def balanced_cells_are_right(small, cells, site, bank):
    """The balance of the task adapter and of merges that are made here in another way; what validation chose is carried on."""
    import torch

    from loralloy.adapter import Adapter
    from loralloy.bank import Bank
    from loralloy.live import LiveModel
    from loralloy.merging import get_rule, merge
    from loralloy.weighting.balance import balance, shift
    from loralloy.weights import Weights

    images = site.inner.sets["b"].load(small.site_text.sample(site.inner.sets["b"].rows("train"), 6, 0))
    backbone = site.inner.classifier.backbone

    def answers():
        return site.inner.classifier(images).log_softmax(1)

    tuned, best = cells["a-on-b-s0-r2-ties-tuned"], cells["a-on-b-s0-r2-ties-best"]
    assert (tuned["scale"], tuned["density"]) == (best["scale"], best["density"])
    assert "tried" not in tuned and "balance" not in best
    at = Weights(dict(zip(bank.names, tuned["scale"], strict=True)))
    made = {
        "task-balanced": bank["task"],
        "linear-balanced": merge(bank, Weights(dict.fromkeys(bank.names, 1.0)), "linear", rank="full").adapter,
        "ties-tuned": merge(bank, at, get_rule("ties")(density=tuned["density"]), rank="full").adapter,
    }
    for name, adapter in made.items():
        cell, seen = cells[f"a-on-b-s0-r2-{name}"], []
        done = balance(backbone, adapter, answers, site.inner.directions("b"), at=0)
        both = [Adapter(n, {m: a[m] for m in a}, a.config, a.base) for n, a in (("was", adapter), ("is", done.adapter))]
        live = LiveModel(backbone, Bank(both, assume_same_base=True))
        for one in live.bank.names:
            with torch.no_grad(), live.compose(Weights({n: float(n == one) for n in live.bank.names})):
                seen.append(float(shift(answers()).abs().max()))
                right = "".join("01"[r] for r in site.inner.answers("b", "test"))
        live.remove()
        assert cell["correct"] == right, name
        told = cell["balance"]
        assert [told["before"], told["after"]] == pytest.approx(seen, rel=0.02, abs=1e-4), name
        assert told["module"] == "encoder.layer.1.mlp.fc2" and 1 < told["passes"] <= 10
        assert told["after"] < 0.2 * told["before"] and {"balance", "all"} <= set(cell["seconds"])


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
