"""Every method does what its paper's formula says, row by row, with PEFT and LiveModel as oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from suite_oracles import CLOSE, alone, make, same_scores

from helpers import load_in_peft
from loralloy.adapter import Adapter
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.evaluation.suite.method import KINDS, find_kind
from loralloy.live import LiveModel
from loralloy.live.base import load_base
from loralloy.live.scoring import score_options
from loralloy.merging import merge
from loralloy.retrieval.index import task_rows
from loralloy.weighting import Router
from loralloy.weights import Weights


@pytest.fixture(scope="module")
def examples(bench):
    return bench.examples(4)


def means_by_hand(bench, query, seed, rows=30):
    """Unit mean of each task's index rows."""
    result = {}
    for name, task in bench.tasks.items():
        mean = bench.embedder.encode(task_rows(task, rows, seed, query)[1]).mean(0)
        result[name] = mean / np.linalg.norm(mean)
    return result


def nearest_by_hand(bench, example, query, seed, scope):
    means = means_by_hand(bench, query, seed)
    q = bench.embedder.encode([example.query if query == "hinted" else example.raw])[0]
    names = [n for n in means if scope == "in_domain" or n != example.task]
    return sorted(names, key=lambda n: -float(means[n] @ q))


PROTOCOLS = [("hinted", "in_domain"), ("raw", "in_domain"), ("hinted", "leave_own_out"), ("raw", "leave_own_out")]


@pytest.mark.parametrize("query,scope", PROTOCOLS)
def test_routed_linear_is_the_live_composition_of_the_router(bench, run_of, examples, query, scope):
    run = run_of(query, scope)
    rows = make("routed").answer(run, examples)
    router = Router(run.index, only=bench.bank.names)
    weights = [
        router.weigh(e.query if query == "hinted" else e.raw, [e.task] if scope == "leave_own_out" else [])
        for e in examples
    ]
    for row, w in zip(rows, weights, strict=True):
        assert row.weights == pytest.approx(dict(w.items()))
    same_scores(rows, [alone(bench, e, w) for e, w in zip(examples, weights, strict=True)])
    answers = [e.options[int(np.argmax(r.scores))] for e, r in zip(examples, rows, strict=True)]
    assert [r.answer for r in rows] == answers


@pytest.mark.parametrize(
    "rule,space,rank",
    [("ties", "delta", None), ("ties", "factors", None), ("linear", "factors", None), ("linear", "delta", 2),
     ("cat", "factors", None), ("tsv_m", "delta", None), ("magnitude_prune", "core", None)],
)  # fmt: skip
def test_routed_by_any_rule_is_that_merge(bench, run_of, examples, rule, space, rank):
    """Each row equals a LiveModel of the one adapter that `merge` makes of its rounded weights."""
    some = examples[::3]
    method = make("routed", rule=rule, space=space, rank=rank, step=0.25)
    run = run_of("raw")
    rows = method.answer(run, some)
    assert {w % 0.25 for row in rows for w in row.weights.values()} == {0.0}
    assert all(sum(row.weights.values()) == pytest.approx(1) for row in rows)
    want = []
    for example, row in zip(some, rows, strict=True):
        merged = merge(bench.bank, Weights(dict(sorted(row.weights.items()))), rule, space, rank).adapter
        live = LiveModel(bench.model, Bank([merged]), assume_same_base=True)
        with live.compose(Weights({merged.name: 1.0})):
            want.append(score_options(bench.model, bench.tokenizer, [example.prompt], [example.options])[0])
        live.remove()
    same_scores(rows, want)
    assert run.misses == len(run.bytes) == len({tuple(sorted(r.weights.items())) for r in rows})
    assert run.hits + run.misses == len(some) and run.seconds["compose"] > 0


def test_cat_is_linear(run_of, examples):
    cat = make("routed", rule="cat", space="factors", step=0.0).answer(run_of("raw"), examples)
    linear = make("routed").answer(run_of("raw"), examples)
    same_scores(cat, [row.scores for row in linear])


def test_perfect_uniform_multitask(bench, small, run_of, examples):
    own = make("perfect").answer(run_of(None, "in_domain", None), examples)
    same_scores(own, [alone(bench, e, Weights({e.task: 1.0})) for e in examples])
    every = make("uniform").answer(run_of(None, "leave_own_out", None), examples)
    for e, row in zip(examples, every, strict=True):
        assert row.weights == {n: 0.5 for n in bench.bank.names if n != e.task}
    same_scores(every, [alone(bench, e, Weights(r.weights)) for e, r in zip(examples, every, strict=True)])

    joint = make("multitask").answer(run_of(None, "in_domain", None), examples)
    base, tokenizer = load_base(str(small / "model"), "float32", "cpu")
    model = load_in_peft(base, small / "all_tasks")
    same_scores(joint, score_options(model, tokenizer, [e.prompt for e in examples], [e.options for e in examples]))


def test_base_is_the_base_in_its_best_format(bench, run_of, examples):
    from loralloy.live.base_format import FORMATS, best_base_format

    rows = make("base").answer(run_of(None, None, None), examples)
    want = []
    for e in examples:
        task = bench.tasks[e.task]
        with bench.live.compose(None):
            best = best_base_format(bench.model, bench.tokenizer, task, task.examples("validation", 50))
        assert bench.base_format(e.task) == best.name
        prompt = FORMATS[best.name](task, e, bench.tokenizer)
        want.append(score_options(bench.model, bench.tokenizer, [prompt], [e.options])[0])
    same_scores(rows, want)
    plain = make("base", own_format=False).answer(run_of(None, None, None), examples)
    same_scores(plain, [alone(bench, e, None) for e in examples])


@pytest.mark.parametrize("query,scope", PROTOCOLS)
def test_selection_and_mixture_retrieve_by_mean_embeddings(bench, run_of, examples, query, scope):
    top = [nearest_by_hand(bench, e, query, 1, scope) for e in examples]
    selected = make("selection").answer(run_of(query, scope, 1), examples)
    assert [r.weights for r in selected] == [{names[0]: 1.0} for names in top]
    same_scores(selected, [alone(bench, e, Weights({t[0]: 1.0})) for e, t in zip(examples, top, strict=True)])
    mixed = make("mixture", k=2).answer(run_of(query, scope, 1), examples)
    assert [r.weights for r in mixed] == [dict.fromkeys(names[:2], 0.5) for names in top]
    same_scores(mixed, [alone(bench, e, Weights(r.weights)) for e, r in zip(examples, mixed, strict=True)])


def average_in_peft(small, names):
    """A PEFT model whose A and B are the means of those of `names`: parameters averaged, nothing of ours."""
    base, tokenizer = load_base(str(small / "model"), "float32", "cpu")
    model = load_in_peft(base, small / "suite_bank" / names[0])
    others = [load_in_peft(base, small / "suite_bank" / n).state_dict() for n in names]
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "lora_" in key:
                tensor.copy_(sum(state[key] for state in others) / len(names))
    return model, tokenizer


def test_fusion_is_pefts_parameter_average(bench, small, run_of, examples):
    rows = make("fusion", k=2).answer(run_of(), examples)
    averaged = {}
    for e, row in zip(examples, rows, strict=True):
        names = tuple(row.weights)
        assert list(names) == nearest_by_hand(bench, e, "hinted", 0, "in_domain")[:2]
        assert set(row.weights.values()) == {0.5}
        if names not in averaged:
            averaged[names] = average_in_peft(small, names)
        model, tokenizer = averaged[names]
        same_scores([row], score_options(model, tokenizer, [e.prompt], [e.options]))
    mixed = make("mixture", k=2).answer(run_of(), examples)
    assert any(abs(m.scores[0] - r.scores[0]) > 10 * CLOSE for m, r in zip(mixed, rows, strict=True))


def test_adapter_soup_is_one_average_a_domain(bench, small, run_of, examples):
    run = run_of("hinted", "leave_own_out")
    rows = make("adapter_soup", k=2).answer(run, examples)
    means = means_by_hand(bench, "hinted", 0)
    for name, task in bench.tasks.items():
        domain = bench.embedder.encode([e.query for e in task.examples("validation")]).mean(0)
        want = sorted((n for n in means if n != name), key=lambda n: -float(means[n] @ domain))[:2]
        own = [(e, row) for e, row in zip(examples, rows, strict=True) if e.task == name]
        assert {tuple(row.weights) for _, row in own} == {tuple(want)}
        model, tokenizer = average_in_peft(small, want)
        same_scores(
            [r for _, r in own],
            score_options(model, tokenizer, [e.prompt for e, _ in own], [e.options for e, _ in own]),
        )


def test_task_average(run_of, examples):
    run = run_of("raw", "leave_own_out")
    routed = make("routed").answer(run, examples)
    averaged = make("task_average").answer(run, examples)
    for task in {e.task for e in examples}:
        mine = [r.weights for e, r in zip(examples, routed, strict=True) if e.task == task]
        want = {n: sum(w.get(n, 0) for w in mine) / len(mine) for n in {n for w in mine for n in w}}
        for e, row in zip(examples, averaged, strict=True):
            if e.task == task:
                assert row.weights == pytest.approx(want)


@pytest.mark.parametrize("among", ["all", "task"])
def test_shuffled_is_another_querys(run_of, examples, among):
    run = run_of("raw")
    routed = [tuple(sorted(r.weights.items())) for r in make("routed").answer(run, examples)]
    given = make("shuffled", among=among).weights(run, examples)
    handed = [tuple(sorted(w.items())) for w in given]
    assert sorted(handed) == sorted(routed)  # every query's weights, once each
    if among == "task":
        for task in {e.task for e in examples}:
            where = [i for i, e in enumerate(examples) if e.task == task]
            assert sorted(handed[i] for i in where) == sorted(routed[i] for i in where)
    else:
        assert handed != routed
    assert given == make("shuffled", among=among).weights(run, examples)
    assert given != make("shuffled", among=among).weights(run_of("raw", seed=1), examples)


@pytest.mark.parametrize("kind", ["routed", "uniform", "selection", "mixture", "fusion", "adapter_soup", "task_average",
                                  "shuffled"])  # fmt: skip
@pytest.mark.parametrize("query", ["hinted", "raw"])
def test_leave_own_out_never_weighs_the_own(run_of, examples, kind, query):
    method = make(kind, **({"k": 2} if kind in ("mixture", "fusion", "adapter_soup") else {}))
    for e, row in zip(examples, method.answer(run_of(query, "leave_own_out"), examples), strict=True):
        assert e.task not in row.weights and sum(row.weights.values()) == pytest.approx(1)


def test_a_method_that_cheats_is_caught(run_of, examples):
    run = run_of("raw", "leave_own_out")
    own = [{e.task: 0.5, "other": 0.5} for e in examples]
    with pytest.raises(LoralloyError, match="was given its own adapter 'cooking' in scope leave_own_out"):
        run.composed(examples, own)
    how = make("routed", rule="ties").how
    with pytest.raises(LoralloyError, match="was given its own adapter"):
        run.merged(examples, own, how)


def test_majority(bench, run_of, examples):
    rows = make("majority").answer(run_of(None, None, None), examples)
    for e, row in zip(examples, rows, strict=True):
        answers = [x.answer for x in bench.tasks[e.task].examples("train")]
        assert row == (min(set(answers), key=lambda a: (-answers.count(a), a)), None, None)


def test_no_weights_are_the_base(bench, run_of, examples):
    empty = [{} for _ in examples]
    want = [alone(bench, e, None) for e in examples]
    same_scores(run_of().composed(examples, empty), want)
    mixed = [{}, {"spam": 1.0}] * (len(examples) // 2)
    rows = run_of().merged(examples, mixed, make("routed", rule="linear", space="factors").how)
    want = [alone(bench, e, Weights(w) if w else None) for e, w in zip(examples, mixed, strict=True)]
    same_scores(rows, want)


def test_too_few_adapters(run_of, examples):
    with pytest.raises(LoralloyError, match=r"3 adapters are to be combined, but example cooking/test/0 may use 2"):
        make("mixture").answer(run_of("hinted", "leave_own_out"), examples)


def test_kinds_say_what_they_are():
    for kind in ("majority", "base", "perfect", "uniform", "routed", "selection", "fusion", "mixture", "adapter_soup",
                 "multitask", "task_average", "shuffled"):  # fmt: skip
        found = find_kind(kind)
        method = make(kind)
        assert found.source and found.__doc__ and method.space in ("-", "delta", "factors")
        assert method.settings["kind"] == kind
    with pytest.raises(LoralloyError, match="method kind 'best' is not known; choose from majority, base"):
        find_kind("best")
    assert set(KINDS) >= {"moe", "smear", "arrow", "logo"}


def test_single_adapter_bank_has_none_left(bench, write_suite, tmp_path, small):
    import shutil

    from loralloy.evaluation.suite import Suite
    from loralloy.evaluation.suite.run import Run
    from loralloy.evaluation.suite.workbench import Workbench

    shutil.copytree(small / "suite_bank" / "spam", tmp_path / "bank" / "spam")
    one = Workbench(Suite.load(write_suite(tmp_path, bank="bank", tasks=[str(small / "tasks" / "spam.yaml")])))
    with pytest.raises(LoralloyError, match="a bank of one adapter has none left in scope leave_own_out"):
        Run(one, "raw", "leave_own_out", 0).allowed(one.examples(1)[0])
    lost = Workbench(Suite.load(write_suite(tmp_path, bank="bank")))
    with pytest.raises(
        LoralloyError, match=r"task 'cooking' has no adapter in the bank .*\(spam\); train it, or leave"
    ):
        _ = lost.tasks
    assert Adapter.load(tmp_path / "bank" / "spam").name == "spam"
