"""The plugin in a real vLLM: its answers are PEFT's with the merged adapter, and nothing is merged twice."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from vllm_server import BASE, compositions, vllm_python, vllm_server

from helpers import load_in_peft
from loralloy.bank import Bank
from loralloy.live.base import load_base
from loralloy.merging import merge
from loralloy.serving.grammar import parse
from loralloy.weights import Weights

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(vllm_python() is None, reason="no vLLM here; run `make test-vllm`"),
]
PROMPTS = [
    "WINNER!! You have been selected to receive a prize. Call now to claim it. Label:",
    "The film was dull and far too long, though its last scene is lovely. Sentiment:",
]
TOP = 20  # tokens whose log-probabilities are compared, by prompt; the most that vLLM gives
WITHIN = 5e-4  # of a log-probability, float32 against float32 by other kernels


@pytest.fixture(scope="module")
def asked(real_bank_folder):
    return compositions(Bank.load(real_bank_folder).names, 50)


@pytest.fixture(scope="module")
def server(real_model_folder, real_bank_folder, tmp_path_factory):
    with vllm_server(real_model_folder, real_bank_folder, tmp_path_factory.mktemp("vllm")) as made:
        yield made


@pytest.fixture(scope="module")
def truth(asked, real_model_folder, real_bank_folder, tmp_path_factory):
    """By composition, from PEFT with the merged adapter: the next token's log-probabilities [prompt, vocabulary], and
    eight greedy tokens of each prompt as text."""
    folder, bank, found = tmp_path_factory.mktemp("truth"), Bank.load(real_bank_folder), {}
    model, tokenizer = load_base(str(real_model_folder), "float32", "cpu")
    for i, text in enumerate(asked):
        made = parse(text)
        weights, rank = Weights(dict(made.terms)), made.rank or 16
        merge(bank, weights, made.bound, made.space, rank, torch.float32).adapter.save(folder / str(i))
        peft = load_in_peft(model, folder / str(i))
        scores, texts = [], []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                made = peft.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
            scores.append(made.logits[0][0].log_softmax(-1))
            texts.append(tokenizer.decode(made.sequences[0, ids.shape[1] :], skip_special_tokens=True))
        found[text] = torch.stack(scores), texts
        model = peft.unload()
    return found, tokenizer


def ask_all(server, models):
    """Eight clients, in this order. By model: each prompt's {token: log-probability} of the next token, and the text."""

    def one(model):
        answer = server.ask(model, PROMPTS, logprobs=TOP)
        assert answer.status_code == 200, answer.text
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        return model, ([c["logprobs"]["top_logprobs"][0] for c in choices], [c["text"] for c in choices])

    with ThreadPoolExecutor(8) as clients:
        return dict(clients.map(one, models))


class Compared:
    """Answers against the truth of every composition."""

    def __init__(self, truth):
        found, tokenizer = truth
        self.names = list(found)
        self.scores = torch.stack([scores for scores, _ in found.values()])  # [composition, prompt, vocabulary]
        self.tokens = {}
        for token in range(self.scores.shape[-1]):  # several may read the same: bytes that are no text alone
            self.tokens.setdefault(tokenizer.decode([token]), []).append(token)

    def distances(self, tops):
        """The largest difference of a log-probability to each composition's truth, [compositions]."""
        worst = torch.zeros(len(self.names))
        for prompt, top in enumerate(tops):
            assert len(top) >= TOP
            for text, value in top.items():
                if len(found := self.tokens.get(text, ())) == 1:
                    worst = torch.maximum(worst, (self.scores[:, prompt, found[0]] - value).abs())
        return worst

    def own(self, name, tops):
        return float(self.distances(tops)[self.names.index(name)])


@pytest.fixture(scope="module")
def compared(truth):
    return Compared(truth)


def test_fifty_compositions_by_eight_clients(server, asked, truth, compared):
    order = random.Random(1).sample(asked, len(asked))
    first = ask_all(server, order)
    merged, files = list(server.merges), stamps(server)
    assert sorted(merged) == sorted(asked)
    assert len(server.kept) == len(asked)

    worst, margin, alike = 0.0, float("inf"), 0
    for i, model in enumerate(asked):
        tops, texts = first[model]
        distances = compared.distances(tops)
        nearest = asked[int(distances.argmin())]
        assert nearest == model, f"{model} was answered as {nearest}"
        worst = max(worst, float(distances[i]))
        margin = min(margin, float(distances[torch.arange(len(asked)) != i].min()))
        alike += sum(got == want for got, want in zip(texts, truth[0][model][1], strict=True))
    print(f"\nlog-probabilities within {worst:.1e} of PEFT's; the nearest other composition is {margin:.1e} away; "
          f"{alike} of {len(asked) * len(PROMPTS)} greedy texts equal")  # fmt: skip
    assert worst < WITHIN
    assert margin > 0.1  # another composition's answer would not pass
    assert alike >= 0.97 * len(asked) * len(PROMPTS)  # two tokens may be as good as equal

    again = ask_all(server, random.Random(2).sample(asked, len(asked)))
    assert server.merges == merged
    assert stamps(server) == files
    assert all(compared.own(m, again[m][0]) < WITHIN for m in asked)


def stamps(server):
    return {f: f.stat().st_mtime_ns for p in server.kept for f in p.iterdir()}


def test_what_is_merged_says_so(server, asked):
    ask_all(server, asked[:1] + asked[9:10])
    said = [json.loads((p / "loralloy.json").read_text()) for p in server.kept]
    by_name = {s["composition"]: s for s in said}
    assert by_name[asked[9]]["rank"] == 5 and by_name[asked[9]]["cut"] > 0.01
    assert all(s["dtype"] == "fp32" for s in said)
    exact = [s for s in said if s["rule"].startswith("linear")]
    assert exact and all(s["error"] < 1e-6 for s in exact)


def test_an_adapter_of_the_bank_is_served_as_it_is(server):
    before = server.kept
    assert server.ask("sms_spam", PROMPTS[0]).status_code == 200
    assert server.kept == before


@pytest.mark.parametrize(
    "model", ["0.5*sms_spam + ", "auto", "0.5*nobody", "/etc/passwd", "../sms_spam", "sms_spam @ svd(rank=64)", "base"]
)
def test_what_is_no_composition_is_not_found(server, model):
    answer = server.ask(model, PROMPTS[0])
    assert answer.status_code == 404, answer.text
    assert server.ask(BASE, PROMPTS[0]).status_code == 200
    log = server.log.read_text()
    assert f"{model!r} is not served: " in log and "Traceback" not in log


def test_a_small_cache_lets_go_of_old_ones_and_vllm_lives(
    real_model_folder, real_bank_folder, asked, compared, tmp_path
):
    some = [m for m in asked if "@" not in m][:16]
    size = 20 << 20  # the largest of them: rank 16 in float32
    limit = 6 * size
    with vllm_server(
        real_model_folder, real_bank_folder, tmp_path, LORALLOY_CACHE_GIB=str(limit / 2**30), LORALLOY_GRACE="1"
    ) as server:  # fmt: skip
        for _ in range(2):
            for model in some:  # one after the other: those before are not under way, and their time of grace is over
                time.sleep(1.1)
                tops, _ = ask_all(server, [model])[model]
                assert compared.own(model, tops) < WITHIN
                assert sum(f.stat().st_size for p in server.kept for f in p.iterdir()) <= limit
        assert len(server.merges) > len(some)  # some had gone, and came back
        assert server.ask(BASE, PROMPTS[0]).status_code == 200
