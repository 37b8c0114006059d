"""The API, in-process: answers are those of PEFT's merged adapter, and say what composed them."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from serving_scenes import PROMPT

from loralloy.merging import Ties
from loralloy.weights import Weights


def greedy(tiny, weights, text, tokens, rule="linear", **more):
    """PEFT's own continuation."""
    model = tiny.truth(Weights(weights), rule, **more)
    ids = torch.tensor([tiny.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tiny.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_completion(api, tiny):
    said = api.complete("0.6*spam - 0.5*weather", max_tokens=8)
    assert said.status_code == 200, said.text
    data = said.json()
    assert data["choices"][0]["text"] == greedy(tiny, {"spam": 0.6, "weather": -0.5}, PROMPT, 8)
    assert data["object"] == "text_completion" and data["model"] == "0.6*spam - 0.5*weather"
    assert data["usage"]["prompt_tokens"] == len(PROMPT)
    told = data["loralloy"]
    assert told["weights"] == {"spam": 0.6, "weather": -0.5} and told["cache"] == "live" and told["error"] == 0
    assert told["composition"] == "0.6*spam - 0.5*weather" and told["rule"] == "linear"


def test_what_a_model_may_be(api, tiny):
    for model, weights in (("spam", {"spam": 1.0}), ('"spam"', {"spam": 1.0}), ("base", {"spam": 0.0})):
        data = api.complete(model, max_tokens=6).json()
        assert data["choices"][0]["text"] == greedy(tiny, weights, PROMPT, 6)
    listed = api.call("GET", "/v1/models").json()["data"]
    assert [m["id"] for m in listed] == ["auto", "base", "cooking", "spam", "weather"]
    assert api.call("GET", "/v1/models/0.5*spam%20@%20svd").json()["id"] == "0.5*spam @ svd"
    assert api.call("GET", "/v1/models/music").status_code == 404


def test_a_merged_composition_is_merged_once(api, tiny):
    model = "0.6*spam + 0.4*weather @ ties(density=0.3, space=delta)"
    before = api.post("/v1/compositions", model=model).json()
    assert before["cache"] == "cold" and "error" not in before
    first, second = (api.complete(model, max_tokens=6).json() for _ in range(2))
    assert [d["loralloy"]["cache"] for d in (first, second)] == ["merged", "hit"]
    want = greedy(tiny, {"spam": 0.6, "weather": 0.4}, PROMPT, 6, Ties(density=0.3), space="delta")
    assert first["choices"][0]["text"] == second["choices"][0]["text"] == want
    assert first["loralloy"]["error"] > 0.01 and first["loralloy"]["rule"].startswith("ties(density=0.3, ")
    assert first["loralloy"]["key"] == before["key"]
    other = "0.4*weather + 0.6*spam @ ties(space=delta,density=0.30)"  # the same, said otherwise
    assert api.complete(other, max_tokens=2).json()["loralloy"]["cache"] == "hit"
    kept = api.call("GET", "/v1/compositions").json()
    assert [(k["uses"], k["users"], k["key"]) for k in kept["data"]] == [(3, 0, before["key"])]
    assert kept["bytes"] > 0


def test_many_ask_for_one_merge_at_once(api, tiny):
    async def go():
        async with api.client() as client:
            body = {"model": "spam - weather @ magnitude_prune", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(6)))

    said = [r.json() for r in api.run(go())]
    assert len({d["choices"][0]["text"] for d in said}) == 1
    assert api.service.compositions.kept[0][1].uses == 6 and len(api.service.compositions.kept) == 1


def test_a_mixed_batch_over_http(api, tiny):
    """Each answer is that of its own composition, whoever shares the batch."""
    asked = [
        ({"spam": 1.0}, "spam"),
        ({"weather": 0.7, "cooking": 0.7}, "0.7*weather + 0.7*cooking"),
        ({"spam": 0.0}, "base"),
        ({"cooking": -0.8}, "-0.8*cooking"),
    ]

    async def go():
        async with api.client() as client:
            calls = [
                client.post(
                    "/v1/completions",
                    json={"model": m, "prompt": PROMPT[: 3 + i % 20], "max_tokens": 2 + i % 7, "temperature": 0},
                )
                for i, (_, m) in enumerate(asked * 5)
            ]
            return await asyncio.gather(*calls)

    for i, (said, (weights, _)) in enumerate(zip(api.run(go()), asked * 5, strict=True)):
        want = greedy(tiny, weights, PROMPT[: 3 + i % 20], 2 + i % 7)
        assert said.json()["choices"][0]["text"] == want


def test_auto_routes_each_prompt(api, tiny):
    data = api.complete(
        "auto", [PROMPT, "rain cloud storm sunny wind"], max_tokens=5, loralloy={"neighbours": 3}
    ).json()
    routed = api.post("/v1/route", input=[PROMPT, "rain cloud storm sunny wind"], neighbours=3).json()["data"]
    for choice, route, prompt in zip(data["choices"], routed, [PROMPT, "rain cloud storm sunny wind"], strict=True):
        told = choice["loralloy"]
        assert told["weights"] == pytest.approx(route["weights"]) and sum(told["weights"].values()) == pytest.approx(1)
        assert len(told["route"]["neighbours"]) == 3 and told["route"]["neighbours"] == route["neighbours"]
        assert choice["text"] == greedy(tiny, told["weights"], prompt, 5)
    tops = [max(r["weights"], key=r["weights"].get) for r in routed]
    assert tops == ["spam", "weather"]
    assert (
        "neighbours" not in api.complete("auto", max_tokens=1).json()["loralloy"]["route"]
        or not (api.complete("auto", max_tokens=1).json()["loralloy"]["route"]["neighbours"])
    )


def test_auto_under_a_rule(api, tiny):
    told = api.complete("auto @ svd(rank=2)", max_tokens=3).json()["loralloy"]
    assert told["cache"] == "merged" and told["rank"] == "2" and told["composition"].endswith(" @ svd(rank=2)")
    again = api.complete(told["composition"], max_tokens=3).json()["loralloy"]  # what it says asks for the same
    assert again["cache"] == "hit" and again["key"] == told["key"]


def test_a_fallback_is_the_base_alone(serve, tiny):
    api = serve(threshold=1e-6)
    api.service.routing.weigher = _Unlike(api.service.routing.weigher)
    data = api.complete("auto @ ties", max_tokens=4).json()
    told = data["loralloy"]
    assert told["route"]["fallback"] and told["weights"] == {} and told["composition"] == "base"
    assert sum(told["route"]["weights"].values()) == pytest.approx(1)  # what was routed is told
    assert data["choices"][0]["text"] == greedy(tiny, {"spam": 0.0}, PROMPT, 4)


class _Unlike:
    """A weigher whose every text is unlike the index."""

    def __init__(self, weigher):
        self.weigher, self.index = weigher, weigher.index

    def weigh_batch(self, texts):
        made = self.weigher.weigh_batch(texts)
        return [Weights(w.coefficients, w.source, w.explain | {"unlike": 0.5}) for w in made]


def test_the_form_of_a_task(api, tiny):
    want = f"Which kind of spam is this?\nText: {PROMPT}\nAnswer:"
    for path, body in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    ):
        for wanted in ("auto", "spam"):
            data = api.post(
                path, model="auto", max_tokens=4, temperature=0, loralloy={"template": wanted}, **body
            ).json()
            assert data["loralloy"]["template"] == "spam" and data["usage"]["prompt_tokens"] == len(want)
            text = data["choices"][0].get("text") or data["choices"][0]["message"]["content"]
            assert text == greedy(tiny, data["loralloy"]["weights"], want, 4)
    refused = api.complete("spam", loralloy={"template": "music"})
    assert refused.status_code == 400 and "not a task of the index" in refused.json()["error"]["message"]


def test_chat(api, tiny):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    data = api.post(
        "/v1/chat/completions", model="cooking", messages=messages, temperature=0, max_completion_tokens=5
    ).json()
    choice = data["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": greedy(tiny, {"cooking": 1.0}, "Be short.\nhi", 5)}
    assert choice["finish_reason"] == "length" and data["object"] == "chat.completion"
    assert data["loralloy"]["template"] == "plain"  # this tokenizer has no chat form


CHAT_FORM = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ raise_exception('no') if messages|length > 2 }}>"


def test_the_chat_form_of_the_tokenizer(api, tiny, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", CHAT_FORM)
    ask = {"model": "cooking", "temperature": 0, "max_tokens": 4}
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}]
    data = api.post("/v1/chat/completions", messages=messages, **ask).json()
    assert data["choices"][0]["message"]["content"] == greedy(tiny, {"cooking": 1.0}, "<system>a<user>b>", 4)
    refused = api.post("/v1/chat/completions", messages=messages * 2, **ask)
    assert refused.status_code == 400 and "chat form" in refused.json()["error"]["message"]


def events(text):
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@pytest.mark.parametrize("chat", [False, True])
def test_streams_say_what_whole_answers_say(api, chat):
    path = "/v1/chat/completions" if chat else "/v1/completions"
    ask = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    ask |= {"model": "spam + weather", "max_tokens": 9, "temperature": 0.9, "seed": 5, "n": 2}
    ask |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    whole = api.post(path, **ask).json()
    got = events(api.post(path, stream=True, stream_options={"include_usage": True}, **ask).text)
    assert got[-1]["usage"] == whole["usage"] and got[-1]["choices"] == []
    for choice in whole["choices"]:
        mine = [e for e in got[:-1] if e["choices"][0]["index"] == choice["index"]]
        assert "loralloy" in mine[0] and all("loralloy" not in e for e in mine[1:])
        parts = [e["choices"][0] for e in mine]
        if chat:
            assert parts[0]["delta"]["role"] == "assistant"
            assert "".join(p["delta"]["content"] for p in parts) == choice["message"]["content"]
            assert [t for p in parts for t in p["logprobs"]["content"]] == [
                {**t, "logprob": pytest.approx(t["logprob"], abs=1e-4), "top_logprobs": _near(t["top_logprobs"])}
                for t in choice["logprobs"]["content"]
            ]
        else:
            assert "".join(p["text"] for p in parts) == choice["text"]
            assert [t for p in parts for t in p["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    first, second = whole["choices"]
    assert first != second | {"index": 0}  # two draws, not one twice


def _near(top):
    return [{**t, "logprob": pytest.approx(t["logprob"], abs=1e-4)} for t in top]


def test_logprobs_are_the_models(api, tiny):
    ask = {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True, "top_logprobs": 4, "max_tokens": 1}
    said = api.post("/v1/chat/completions", model="spam", temperature=0, **ask).json()["choices"][0]["logprobs"][
        "content"
    ]
    want = tiny.scores(Weights({"spam": 1.0}), tiny.tokenizer(PROMPT)["input_ids"]).log_softmax(-1)[-1].topk(4)
    assert said[0]["logprob"] == pytest.approx(float(want.values[0]), abs=1e-4)
    assert [t["logprob"] for t in said[0]["top_logprobs"]] == pytest.approx(want.values.tolist(), abs=1e-4)
    assert [t["token"] for t in said[0]["top_logprobs"]] == [tiny.tokenizer.decode([i]) for i in want.indices.tolist()]
    assert said[0]["bytes"] == list(said[0]["token"].encode())


def test_stop_strings(api, tiny):
    text = greedy(tiny, {"spam": 1.0}, PROMPT, 12)
    stop = text[4:6]
    cut = text[: text.index(stop)]
    data = api.complete("spam", max_tokens=12, stop=stop).json()
    assert data["choices"][0]["text"] == cut and data["choices"][0]["finish_reason"] == "stop"
    got = events(api.complete("spam", max_tokens=12, stop=[stop], stream=True).text)
    assert "".join(e["choices"][0]["text"] for e in got) == cut


def test_token_ids_as_a_prompt(api):
    ids = api.service.tokenizer(PROMPT)["input_ids"]
    assert (
        api.complete("spam", ids, max_tokens=4).json()["choices"]
        == api.complete("spam", max_tokens=4).json()["choices"]
    )
    assert api.complete("spam", [5, 100000]).status_code == 400


def test_metrics(api):
    api.complete("spam @ svd", max_tokens=3)
    api.complete("music")
    while api.service.engine.running:
        pass
    text = api.call("GET", "/metrics").text
    for line in (
        'loralloy_requests_total{path="/v1/completions",status="200"} 1.0',
        'loralloy_requests_total{path="/v1/completions",status="404"} 1.0',
        "loralloy_completion_tokens_total 3.0",
        f"loralloy_prompt_tokens_total {len(PROMPT)}.0",
        'loralloy_compositions_total{cache="merged"} 1.0',
        "loralloy_rows_running 0.0",
    ):
        assert line in text, line
