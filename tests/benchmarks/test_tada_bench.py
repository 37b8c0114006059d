"""The harness of benchmarks/tada: its plan, a tiny run stopped and started again, and its report on made-up cells."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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
def tada(monkeypatch):
    """The harness's modules; gone again afterwards, since their names are plain words."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), str(FOLDER.parent), *sys.path])
    names = [path.stem for path in FOLDER.glob("*.py")]
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


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


# -- figures -----------------------------------------------------------------------------------------------------------


def test_answers_come_back_from_the_kept_file(tada):
    for text in ("0", "0010", "1" * 9, "0" * 300 + "1"):
        kept = tada.results.packed(text)
        assert tada.results.packed(kept) == kept
        assert tada.results.bits({"correct": kept}).tolist() == [int(c) for c in text]
    assert not len(tada.results.bits({}))


def test_intervals(tada):
    bootstrap = tada.results.bootstrap
    same = bootstrap([np.full((3, 50), 0.1)] * 4)
    assert [same.value, same.low, same.high] == pytest.approx([0.1] * 3)
    rng = np.random.default_rng(0)
    wide, crossed = [], []
    for _ in range(30):
        rows = rng.normal(0.05, 1.0, (6, 1, 200))
        crossed.append(bootstrap([np.repeat(r, 3, 0) for r in rows]))  # all seeds alike: they add nothing
        wide.append(bootstrap(list(rng.normal(0.05, 1.0, (6, 3, 200)))))
    width = [np.mean([i.high - i.low for i in some]) for some in (wide, crossed)]
    # variances, in units of 1 / 200: pairs 5/6 and rows 1 where seeds are alike; else pairs 5/18, rows 1/3, seeds 2/9 and both
    # together 2/9, so the ratio is sqrt(1.83 / 1.06) = 1.32
    assert 1.2 < width[1] / width[0] < 1.45
    assert (
        np.mean([i.low <= 0.05 <= i.high for i in crossed]) >= 0.9
    )  # on the wide side: pairs carry their rows' noise too
    between = bootstrap([np.full((3, 50), v) for v in (0.2, 0.2, -0.2, -0.2)])
    assert between.low < -0.1 and between.high > 0.1  # pairs that disagree


def made_up(tada, half):
    """Ours is 4 points above DARE-TIES on all pairs but one; removal adds nothing; the slope falls."""
    rng, found = np.random.default_rng(1), []
    level = {"dare_ties": 0.70, "ties": 0.73, "linear": 0.69, "iso_c": 0.66}

    def row(pair, seed, method, at, score, **more):
        order = np.random.default_rng(len(pair)).permutation(400)
        right = np.zeros(400, int)
        right[order[: round(400 * score)]] = 1
        cell = {"half": half.name, "pair": pair, "seed": seed, "rank": half.rank, "method": method, "at": at, "key": ""}
        text = "".join(map(str, right))
        return {"version": 1, "cell": cell, "title": method, "test": right.mean(), "validation": score, "correct": text,
                "device": "cpu", "seconds": {"all": 1.0, "merge": 0.2}, **more}  # fmt: skip

    ours = half.designs[0]
    for n, pair in enumerate(half.pairs("final")):
        for seed in half.seeds:
            noise = 0.01 * rng.uniform(-1, 1)
            for method, score in level.items():
                found += [
                    row(pair, seed, method, at, score - 0.02 * (at != "best") + noise)
                    for at in ("even", "ones", "best")
                ]
            mine = (0.745 if n else 0.60) + noise
            more = {"domain_share": [0.55, 0.5, 0.45], "slope": [-0.5, -0.6, -0.4, 0.9]}
            found += [row(pair, seed, ours, at, mine + d, **more) for at, d in (("ones", 0.0), ("best", 0.005))]
            for name, d in (("no_removal", 0.0), ("removal", -0.03), ("nothing", -0.03), ("uniform", -0.03)):
                found.append(row(pair, seed, f"{ours}~{name}", "ones", mine + d))
    return found


def test_half_a_run_names_no_winner(tada):
    """A rival that lacks a pair of ours has its average over others, and a pair without all rivals is won from none of them."""
    half = tada.plan.load("language")
    hard, easy = half.pairs("final")[0], half.pairs("final")[1:]
    rows = made_up(tada, half)  # ours is weak on the first pair
    for row in rows:
        if row["cell"]["pair"] == hard and row["cell"]["method"] != half.designs[0]:
            row["test"] = 0.5
    free = [
        {**r, "cell": {**r["cell"], "at": "free"}}
        for r in rows
        if r["cell"]["at"] == "ones" and r["cell"]["method"] in (half.designs[0], "ties", "linear")
    ]

    def told(rows):
        return {v[0]: v for v in tada.claims.verdicts(half, tada.results.Cells(rows))}

    assert told(rows + free)["average above the best training-free rule (in hindsight)"][1].startswith("TIES")
    some = [
        r
        for r in rows + free
        if r["cell"]["pair"] != hard or r["cell"]["method"] not in ("linear", "iso_c", "dare_ties")
    ]
    said = [v for k, v in told(some).items() if "in hindsight" in k]
    assert len(said) == 2 and all(v[1].startswith("TIES") for v in said)
    less = [r for r in rows if r["cell"]["pair"] != easy[0] or r["cell"]["method"] == half.designs[0]]
    won = next(v for k, v in told(less).items() if "at least 4 pairs" in k)
    assert easy[0] not in won[1] and won[1].startswith("5 of 6")


def test_the_page_says_which_coefficients_were_tried(tada, tmp_path):
    half, now = tada.plan.load("language"), len(tada.designs.COEFFICIENTS)
    folder = tmp_path / "cells/language-final"
    folder.mkdir(parents=True)
    rows = [r for r in made_up(tada, half) if r["cell"]["at"] == "best"]
    for count in (now, 5):
        for n, row in enumerate(rows):
            tried = [{"scale": [k, 1.0], "validation": 0.5} for k in range(count if n < 3 else now)]
            (folder / f"{n}.json").write_text(json.dumps({**row, "tried": tried}))
        cells = tada.report.read(folder.parent, "language", "final", None)
        page = tada.report.page(half, *[tada.results.Cells([])] * 2, cells, [])
        said = f"Of {len(rows)} cells at their best by validation, 3 among 5 pairs"
        assert ("Other coefficients" in page) == (said in page) == (count != now)


def test_verdicts_and_the_page(tada, tmp_path, capsys):
    half = tada.plan.load("language")
    rows = made_up(tada, half)
    verdicts = {v[0]: v for v in tada.claims.verdicts(half, tada.results.Cells(rows))}
    won = next(v for k, v in verdicts.items() if "at least 4 pairs" in k)
    assert won[2] == "met" and won[1].startswith("5 of 6")
    assert next(v for k, v in verdicts.items() if "DARE-TIES" in k)[2] == "missed"  # five times 5, once -10: 2.5
    assert next(v for k, v in verdicts.items() if "gate alone" in k)[2] == "met"
    assert next(v for k, v in verdicts.items() if "removal alone" in k)[2] == "missed"
    assert next(v for k, v in verdicts.items() if "depth" in k)[2] == "it falls"
    assert next(v for k, v in verdicts.items() if "newer" in k)[1].startswith("Iso-C: +")
    cells = tmp_path / "cells/language-final"
    cells.mkdir(parents=True)
    for n, one in enumerate(rows):
        (cells / f"{n}.json").write_text(json.dumps(one))
    (tmp_path / "docs").mkdir()
    words = ["language", "--cells", str(cells.parent), "--docs", str(tmp_path / "docs"), "--write"]
    assert tada.report.main(words) == 0
    first = (tmp_path / "docs/tada-language.md").read_text()
    assert "| TIES, dW, uncut, best by validation | 7" in first and "never" not in first
    assert sorted(p.suffix for p in (tmp_path / "docs").iterdir()) == [".json", ".md", ".png"]
    assert tada.report.main([*words, "--again"]) == 0
    assert (tmp_path / "docs/tada-language.md").read_text() == first
    assert "language: domain dominance grows with depth: it falls" in capsys.readouterr().out
