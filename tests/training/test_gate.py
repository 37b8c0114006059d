"""Routers learn from answers over frozen adapters; nothing but the router changes, and the best check is kept."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tokenizer

from helpers import PROJECTIONS, close, peft_folder, tiny_llama
from loralloy.bank import Bank
from loralloy.errors import LoralloyError
from loralloy.live import LiveModel
from loralloy.live.gates import LinearRouter
from loralloy.tasks import Example
from loralloy.training import gate as gates
from loralloy.training.data import encode_examples
from loralloy.training.gate import RouterConfig, train_router

NAMES = ["one", "two"]


def rows(split, n):
    """Two tasks with answers of different length."""
    made = []
    for task, word, answer in (("one", "first", "yes"), ("two", "second", "not so")):
        for i in range(n):
            text = f"{word} {i} {'x' * (i % 5)}"
            made.append(Example(f"{task}/{split}/{i}", task, f"{text}\nAnswer:", text, text, answer, (answer, "maybe")))
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def live(tmp_path_factory, tokenizer):
    base = tiny_llama(vocab=len(tokenizer))
    root = tmp_path_factory.mktemp("bank")
    for i, name in enumerate([*NAMES, "three"]):
        peft_folder(base, root / name, i + 1, target_modules=PROJECTIONS, r=3, lora_alpha=12, spread=0.3)
    live = LiveModel(base, Bank.load(root))
    yield live
    live.remove()


def trained(live, tokenizer, **changes):
    config = RouterConfig(**{"steps": 24, "batch_size": 8, "check_every": 8, "warmup": 2, "lr": 0.01} | changes)
    return train_router(live, tokenizer, rows("train", 12), rows("validation", 5), {}, config, progress=False)


@pytest.mark.parametrize(("kind", "top_k"), [("token", None), ("token", 2), ("token", 1), ("smear", None)])
def test_validation_loss_falls(live, tokenizer, kind, top_k):
    router = trained(live, tokenizer, kind=kind, top_k=top_k)
    log = router.config["log"]
    assert [entry["step"] for entry in log] == [0, 8, 16, 24]
    best = min(log, key=lambda entry: entry["validation"])
    assert best["validation"] < log[0]["validation"] - 0.02 and router.config["step_kept"] == best["step"]
    encoded, _ = encode_examples(tokenizer, rows("validation", 5), "", 64)
    with torch.no_grad():
        again = gates._loss(live, router, encoded, 0).mean()
    assert float(again) == pytest.approx(best["validation"], rel=1e-4)
    assert not router.training


def test_only_the_router_changes(live, tokenizer):
    before = {k: v.clone() for k, v in live.model.state_dict().items()}
    factors = {name: (part.A.clone(), part.B.clone()) for name, part in live.parts.items()}
    wanted = [p.requires_grad for p in live.model.parameters()]
    trained(live, tokenizer, steps=3)
    assert all(torch.equal(v, before[k]) for k, v in live.model.state_dict().items())
    assert all(torch.equal(p.A, factors[n][0]) and torch.equal(p.B, factors[n][1]) for n, p in live.parts.items())
    assert [p.requires_grad for p in live.model.parameters()] == wanted and all(wanted)
    assert all(p.grad is None for p in live.model.parameters())


def test_the_gradient_reaches_every_layer_of_the_router(live, tokenizer):
    encoded, _ = encode_examples(tokenizer, rows("train", 2), "", 64)
    for kind, top_k in (("token", None), ("token", 1), ("smear", None)):
        router = LinearRouter.of(live, kind, top_k).train()
        gates._loss(live, router, encoded, 0).mean().backward()
        assert all(float(p.grad.abs().max()) > 0 for p in router.parameters())


def test_equal_seeds_give_equal_routers(live, tokenizer):
    one, two, other = (trained(live, tokenizer, steps=4, check_every=4, seed=s) for s in (0, 0, 1))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    differ = [torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert all(same) and not all(differ)


@pytest.mark.parametrize("kind", ["token", "smear"])
def test_the_loss_is_the_answer_s(live, tokenizer, kind):
    """Each row of a padded batch: minus the mean log-likelihood of answer and end, as of the row alone, the prompt pooled."""
    router = LinearRouter.of(live, kind)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
        router.eval()
        encoded, _ = encode_examples(tokenizer, rows("train", 3), "", 64)
        got = gates._loss(live, router, encoded, 0)
        for b, row in enumerate(encoded):
            ids = torch.tensor([row.ids])
            start = len(row.ids) - row.answer
            with live.gate(router, pooled=torch.arange(len(row.ids))[None] < start) as model:
                logp = model(ids).logits[0].log_softmax(-1)
            want = -sum(float(logp[t - 1, row.ids[t]]) for t in range(start, len(row.ids))) / row.answer
            assert close(got[b], torch.tensor(want))


def test_training_loss_does_not_see_the_answer_when_pooling(live, tokenizer):
    """The coefficients of a SMEAR row are those of its prompt: another answer leaves them as they are."""
    router = LinearRouter.of(live, "smear")
    with torch.no_grad():
        for w in router.weights:
            w.normal_(generator=torch.Generator().manual_seed(1))
    seen = []
    inner = router._coefficients
    router._coefficients = lambda *args: seen.append(inner(*args)) or seen[-1]
    example = rows("train", 1)[0]
    for answer in ("yes", "quite another answer"):
        changed = Example(*[answer if f == "answer" else getattr(example, f) for f in Example.__dataclass_fields__])
        encoded, _ = encode_examples(tokenizer, [changed], "", 64)
        with torch.no_grad():
            gates._loss(live, router, encoded, 0)
    assert close(seen[0], seen[2]) and not close(seen[0], torch.full_like(seen[0], 1 / 3))


def test_refusals(live, tokenizer):
    for wrong, says in (({"steps": 0}, "steps is 0"), ({"lr": 0.0}, "lr is 0"), ({"max_length": 4}, "max_length is 4")):
        with pytest.raises(LoralloyError, match=says):
            RouterConfig(**wrong)
    with pytest.raises(LoralloyError, match="needs training rows"):
        train_router(live, tokenizer, rows("train", 1), [], {}, RouterConfig(steps=1))
    with pytest.raises(LoralloyError, match="kind 'x' is unknown"):
        train_router(live, tokenizer, rows("train", 1), rows("train", 1), {}, RouterConfig(kind="x"))


def test_the_rate():
    config = RouterConfig(steps=10, warmup=2, lr=1.0)
    assert [config.rate(s) for s in (0, 1, 2)] == [0.5, 1.0, 1.0] and config.rate(9) < 0.1
