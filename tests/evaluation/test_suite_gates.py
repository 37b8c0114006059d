"""Methods that run a gate: option by option as one pass over the whole text, what is withheld is as if it were not there."""

from __future__ import annotations

import pytest
import torch

from loralloy.evaluation.suite.method import find_kind
from loralloy.live import LiveModel
from loralloy.live.gates import Arrow, LinearRouter, Logo
from loralloy.live.scoring import encode_answer, encode_prompt
from loralloy.weights import Weights

CLOSE = 2e-4  # of log-likelihoods in nats, float32, batched against alone
QUICK = {"steps": 6, "train_batch": 8, "rows": 8, "validation_rows": 2, "lr": 0.05}
ROUTED = [
    ("moe", QUICK),
    ("moe", QUICK | {"top_k": 1}),
    ("moe", QUICK | {"top_k": 2}),
    ("smear", QUICK),
    ("arrow", {"top_k": 2}),
]


@pytest.fixture(scope="module")
def examples(bench):
    return bench.examples(2)


def make(kind, **fields):
    return find_kind(kind).model_validate({"name": kind} | fields)


def whole(bench, live, gate, example):
    """The options' log-likelihoods, each from one pass over prompt and option without a cache."""
    scores, prompt = [], encode_prompt(bench.tokenizer, example.prompt)
    for option in example.options:
        answer = encode_answer(bench.tokenizer, option)
        ids = torch.tensor([[*prompt, *answer]])
        pooled = torch.arange(ids.shape[1])[None] < len(prompt)
        with live.gate(gate, pooled=pooled) as model, torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        scores.append(sum(float(logp[t - 1, ids[0, t]]) for t in range(len(prompt), ids.shape[1])))
    return scores


def rest_of(gate, names):
    """A router's part over some of its adapters."""
    keep = [gate.names.index(name) for name in names]
    widths = {group: w.shape[1] for group, w in zip(gate.groups, gate.weights, strict=True)}
    rest = LinearRouter(names, gate.groups, widths, gate.kind, gate.top_k).eval()
    with torch.no_grad():
        for mine, theirs in zip([*rest.weights, *rest.biases], [*gate.weights, *gate.biases], strict=True):
            mine.copy_(theirs[keep])
    return rest


@pytest.mark.parametrize("scope", ["in_domain", "leave_own_out"])
@pytest.mark.parametrize(("kind", "fields"), ROUTED)
def test_scores_are_those_of_the_whole_text(bench, run_of, examples, kind, fields, scope):
    method = make(kind, **fields)
    run = run_of(None, scope)
    rows = method.answer(run, examples)
    gate = None if kind == "arrow" else method.trained(run)
    for row, example in zip(rows, examples, strict=True):
        names = [n for n in bench.bank.names if scope == "in_domain" or n != example.task]
        live = LiveModel(bench.model, bench.bank.select(names))
        mine = Arrow(live, 2) if gate is None else rest_of(gate, names)
        assert torch.allclose(torch.tensor(row.scores), torch.tensor(whole(bench, live, mine, example)), atol=CLOSE)
        live.remove()
        assert row.answer == example.options[max(range(len(row.scores)), key=row.scores.__getitem__)]


def test_a_router_is_trained_once_a_seed(bench, run_of, examples):
    method = make("smear", **QUICK | {"steps": 3})
    files = lambda: sorted(bench.cache.glob("router-smear-*.safetensors"))  # noqa: E731
    before = set(files())
    method.answer(run_of(None, "in_domain"), examples[:1])
    made = [path for path in files() if path not in before]
    stamp = made[0].stat().st_mtime_ns
    method.answer(run_of(None, "leave_own_out"), examples[:1])
    assert [path for path in files() if path not in before] == made and made[0].stat().st_mtime_ns == stamp
    method.answer(run_of(None, "in_domain", 1), examples[:1])
    assert len([path for path in files() if path not in before]) == 2
    about = LinearRouter.load(made[0]).config
    assert about["rows"] == 24 and about["validation_rows"] == 6 and about["log"][-1]["step"] == 3


@pytest.mark.parametrize("scope", ["in_domain", "leave_own_out"])
def test_logo_answers_under_its_weights(bench, run_of, examples, scope):
    rows = make("logo", top_k=2).answer(run_of(None, scope), examples)
    for row, example in zip(rows, examples, strict=True):
        names = [n for n in bench.bank.names if scope == "in_domain" or n != example.task]
        live = LiveModel(bench.model, bench.bank.select(names))
        want = Logo(live, 2).weigh(bench.tokenizer, [example.prompt])[0]
        assert row.weights == pytest.approx(dict(want.items()), rel=1e-4) and len(row.weights) == 2
        with live.compose(Weights(row.weights)):
            scores = []
            for option in example.options:
                prompt, answer = encode_prompt(bench.tokenizer, example.prompt), encode_answer(bench.tokenizer, option)
                with torch.no_grad():
                    logp = bench.model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
                scores.append(sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(answer)))
        live.remove()
        assert torch.allclose(torch.tensor(row.scores), torch.tensor(scores), atol=CLOSE)


def test_what_tables_say():
    assert [make("moe", top_k=k).title() for k in (None, 1, 3)] == ["MoE soft", "MoE top 1", "MoE top 3"]
    assert make("logo").settings == {
        "kind": "logo", "top_k": 20, "signal": "norm", "attached": "sum", "input": "residual",
    }  # fmt: skip
    assert make("smear").space == "factors" and make("arrow").depends == {"scope"}
