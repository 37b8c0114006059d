"""The front before a stand-in for vLLM: what is routed, what passes unchanged, and what a broken upstream looks like."""

from __future__ import annotations

import json

import httpx
import pytest
from front_scenes import SPAM, Fronted
from hypothesis import given
from hypothesis import strategies as st

from loralloy.serving.grammar import parse

KEYS = st.sampled_from(("model", "prompt", "messages", "role", "content", "type", "text", "loralloy", "neighbours"))


@pytest.fixture
def front():
    return Fronted()


def test_auto_becomes_a_composition(front):
    answer = front.complete(max_tokens=3, logit_bias={"1": 2}, loralloy={"neighbours": 2})
    assert answer.status_code == 200
    assert front.sent == {
        "model": "0.1*question_type + 0.2*sarcasm + 0.7*sms_spam", "prompt": "WINNER", "max_tokens": 3, "logit_bias": {"1": 2},
    }  # fmt: skip
    said = answer.json()["loralloy"]
    assert said["weights"] == {"question_type": 0.1, "sarcasm": 0.2, "sms_spam": 0.7}
    assert said["composition"] == front.sent["model"] == answer.json()["model"]
    assert said["route"]["weights"] == SPAM and len(said["route"]["neighbours"]) == 2
    in_header = json.loads(answer.headers["x-loralloy"])
    assert in_header["weights"] == said["weights"] and "text" not in in_header["route"]["neighbours"][0]
    assert dict(parse(said["composition"]).terms) == said["weights"]


def test_step_and_top(front):
    front = Fronted(step=0.25, top=1)
    assert front.complete().json()["loralloy"]["weights"] == {"sms_spam": 1.0}
    assert front.sent["model"] == "sms_spam"


def test_a_rule_goes_along(front):
    front.complete("auto: ties(density=0.3)")
    assert front.sent["model"] == "0.1*question_type + 0.2*sarcasm + 0.7*sms_spam @ ties(density=0.3)"


def test_unlike_anything_is_the_base(front):
    said = front.complete(prompt="unlike it all").json()["loralloy"]
    assert front.sent["model"] == "the-base"
    assert (said["composition"], said["weights"], said["route"]["fallback"]) == ("base", {}, True)
    assert said["route"]["weights"] == SPAM


def test_chats_are_routed_by_the_last_user_message(front):
    parts = [{"type": "text", "text": "unlike"}, {"type": "image_url", "image_url": {"url": "x"}}]
    front.chat({"role": "user", "content": parts}, {"role": "assistant", "content": "hm"})
    assert front.sent["model"] == "the-base"
    front.chat({"role": "user", "content": "unlike"}, {"role": "user", "content": "WINNER"})
    assert front.sent["model"].endswith("0.7*sms_spam")


def test_streams_pass_as_they_come(front):
    answer = front.complete(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == "".join(f'data: {{"n": {i}}}\n\n' for i in range(3)) + "data: [DONE]\n\n"
    assert json.loads(answer.headers["x-loralloy"])["weights"]["sms_spam"] == 0.7


def test_other_models_pass_byte_for_byte(front):
    raw = b'{"model":"0.5*a",  "prompt": "x\\u00e9", "seed": 12345678901234567890}'
    answer = front.call(
        "POST", "/v1/completions?x=%20y", content=raw, headers={"authorization": "Bearer k", "x-my": "1"}
    )
    assert answer.status_code == 200 and "loralloy" not in answer.json() and "x-loralloy" not in answer.headers
    seen = front.seen[-1]
    assert (seen["raw"], seen["query"], seen["path"]) == (raw, "x=%20y", "/v1/completions")
    assert (seen["headers"]["authorization"], seen["headers"]["x-my"], seen["headers"]["host"]) == (
        "Bearer k",
        "1",
        "vllm",
    )


def test_other_paths_pass(front):
    answer = front.call("GET", "/version")
    assert (answer.status_code, answer.content, answer.headers["x-odd"]) == (418, b"\x00\xff", "1")
    assert front.call("GET", "/load").status_code == 404
    assert front.call("POST", "/v1/embeddings", json={"model": "auto"}).json()["model"] == "auto"
    assert front.call("POST", "/v1/completions", content=b"{no").json() == {"error": {"message": "no JSON"}}


@pytest.mark.parametrize(
    "body, says",
    [
        ({"prompt": ["a", "b"]}, "one text a request"),
        ({"prompt": [1, 2]}, "one text a request"),
        ({}, "one text a request"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": "x", "model": "auto @ nosuch"}, "nosuch"),
        ({"prompt": "x", "loralloy": 3}, "has to be an object"),
        ({"prompt": "x", "loralloy": {"path": 1}}, "no 'path'"),
        ({"prompt": "x", "loralloy": {"neighbours": 99}}, "from 0 to 20"),
        ({"prompt": "x", "loralloy": {"template": "auto"}}, "template"),
    ],
)
def test_what_cannot_be_routed_is_400(front, body, says):
    answer = front.call("POST", "/v1/completions", json={"model": "auto"} | body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text
    assert not front.seen


@pytest.mark.parametrize("messages", [[], "x", [{"role": "system", "content": "a"}], [{"role": "user", "content": []}]])
def test_a_chat_without_a_user_is_400(front, messages):
    answer = front.call("POST", "/v1/chat/completions", json={"model": "auto", "messages": messages})
    assert answer.status_code == 400 and "role user" in answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(("auto", "user", "WINNER")),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), part, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, JSON, max_size=5), st.booleans(), st.sampled_from(("completions", "chat/completions")))
def test_no_body_breaks_it(body, auto, kind):
    body |= {"model": "auto"} if auto else {}
    answer = Fronted().call("POST", f"/v1/{kind}", content=json.dumps(body).encode())
    assert answer.status_code in (200, 400), answer.text


def test_limits(front):
    assert front.call("POST", "/v1/completions", content=b"x" * (9 << 20)).status_code == 413
    assert front.call("POST", "/tokenize", content=b"x" * (9 << 20)).status_code == 413
    deep = b'{"model": "auto", "prompt": ' + b"[" * 100 + b"]" * 100 + b"}"
    assert front.call("POST", "/v1/completions", content=deep).status_code == 400
    assert not front.seen


def test_a_composition_that_has_just_left_is_asked_for_again(front):
    assert front.complete(prompt="missing once").status_code == 200
    assert len(front.seen) == 2


def failing(error):
    def answer(request):
        raise error

    return httpx.MockTransport(answer)


@pytest.mark.parametrize(
    "error, status, says",
    [
        (httpx.ConnectError("refused"), 502, "vLLM does not answer at http://vllm; is it running?"),
        (httpx.ReadTimeout("slow"), 504, "silent for too long"),
        (httpx.ConnectTimeout("slow"), 504, "silent for too long"),
        (httpx.RemoteProtocolError("gone"), 502, "broke"),
    ],
)
def test_an_upstream_that_fails(error, status, says):
    for answer in (
        Fronted(transport=failing(error)).complete(),
        Fronted(transport=failing(error)).call("GET", "/v1/models"),
    ):
        assert answer.status_code == status and says in answer.json()["error"]["message"]


def test_an_upstream_that_lists_no_models():
    front = Fronted(transport=httpx.MockTransport(lambda _: httpx.Response(401, json={"error": "key"})))
    answer = front.complete(prompt="unlike")
    assert answer.status_code == 502 and "does not list its models (401)" in answer.json()["error"]["message"]


def test_metrics(front):
    front.complete()
    assert "loralloy_route_seconds" in front.call("GET", "/front/metrics").text
