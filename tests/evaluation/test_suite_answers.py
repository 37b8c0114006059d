"""What need not be answered again, and what is left to the base."""

from __future__ import annotations

import pytest
from suite_oracles import alone, make, same_scores

from loralloy.weights import Weights


@pytest.fixture(scope="module")
def examples(bench):
    return bench.examples(4)


def test_nothing_is_answered_twice(write_suite, tmp_path, monkeypatch):
    """The same composition of an example again, in any method, is read from memory; another one, rule or step is not."""
    from loralloy.evaluation.suite import Suite
    from loralloy.evaluation.suite.run import Run
    from loralloy.evaluation.suite.workbench import Workbench

    own = Workbench(Suite.load(write_suite(tmp_path)))
    examples = own.examples(2)
    asked, told = [], []
    real = Run.predict
    monkeypatch.setattr(
        Run, "predict", lambda self, prompts, *a, **k: asked.append(len(prompts)) or real(self, prompts, *a, **k)
    )

    def ask(answer):
        asked.clear()
        run = Run(own, "raw", "in_domain", 0, told.append)
        rows = answer(run)
        assert run.reused == len(examples) - sum(asked)
        return rows, sum(asked)

    half = [{"spam": 0.5, "weather": 0.5}] * 6
    first, n = ask(lambda run: run.composed(examples, half))
    again, m = ask(lambda run: run.composed(examples, [{"weather": 0.5, "spam": 0.50000000001, "cooking": 0.0}] * 6))
    assert (n, m) == (6, 0) and [r._replace(weights=None) for r in first] == [r._replace(weights=None) for r in again]
    mixed = [half[0]] * 3 + [{"spam": 1.0}] * 3
    rows, n = ask(lambda run: run.composed(examples, mixed))
    assert n == 3 and rows[:3] == first[:3] and [r.weights for r in rows] == mixed
    how = make("routed", rule="ties", space="delta").how
    merged, n = ask(lambda run: run.merged(examples, half, how))
    assert n == 6 and any(a.scores != b.scores for a, b in zip(merged, first, strict=True))
    run = Run(own, "raw", "in_domain", 0)
    assert run.merged(examples, half, how) == merged and (run.hits, run.misses, run.reused) == (6, 0, 6)
    assert run.bytes and ask(lambda run: run.merged(examples, half, make("routed", rule="tsv_m").how))[1] == 6
    assert sum(told) == 5 * 6  # progress counts rows that were not asked again too
    same_scores(rows[3:], [alone(own, e, Weights({"spam": 1.0})) for e in examples[3:]])
    own.close()


@pytest.mark.parametrize("weigher", ["paper", "kernel", "probe"])
def test_what_is_unlike_is_left_to_the_base(bench, run_of, examples, weigher):
    run = run_of("raw", "in_domain")
    routed = make("routed", weigher=weigher).answer(run, examples)
    scores = [
        w.explain["unlike"]
        for w in run.weigh({"kind": weigher, **({"unlike": True} if weigher == "paper" else {})}, examples)
    ]
    middle = sorted(scores)[len(scores) // 2]
    rows = make("routed", weigher=weigher, unlike=middle).answer(run, examples)
    base = [alone(bench, e, None) for e in examples]
    assert 0 < sum(s > middle for s in scores) < len(scores)
    for row, plain, without, score in zip(rows, routed, base, scores, strict=True):
        if score > middle:
            assert row.weights == {}
            same_scores([row], [without])
        else:
            assert row.weights == pytest.approx(plain.weights) and row.scores == plain.scores
