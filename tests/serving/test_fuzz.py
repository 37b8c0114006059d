"""No request, however made, gets a 500 or hangs: schemathesis over the API, and good requests with some things changed."""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_scenes import PROMPT

from loralloy.serving.service import Limits

FUZZ = settings(max_examples=25, suppress_health_check=list(HealthCheck))
OPERATIONS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/route"),
    ("GET", "/v1/compositions"),
    ("POST", "/v1/compositions"),
    ("POST", "/v1/layers"),
    ("GET", "/v1/server"),
    ("GET", "/healthz"),
    ("GET", "/metrics"),
]


@pytest.fixture
def small(serve):
    return serve(limits=Limits(seconds=20, max_tokens=12), max_bytes=100_000)


def sound(said):
    """An answer, or an error in the one shape."""
    assert said.status_code < 500, said.text
    if said.status_code >= 400:
        error = said.json()["error"]
        assert error["message"] and error["type"] and len(said.content) < 20_000
    elif said.headers["content-type"].startswith("text/event-stream"):
        assert said.text.endswith("data: [DONE]\n\n")
    return said.status_code


def test_these_are_the_operations(small):
    found = {(m.upper(), p) for p, item in small.app.openapi()["paths"].items() for m in item}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_schemathesis_makes_of_the_schema(small, method, path):
    operation = schemathesis.openapi.from_dict(small.app.openapi())[path][method]

    @FUZZ
    @given(operation.as_strategy())
    def run(case):
        sent = case.as_transport_kwargs(base_url="http://127.0.0.1")
        known = ("json", "content", "data", "headers", "params")
        more = {k: v for k, v in sent.items() if k in known and v is not None}
        body = more.pop("json", None)
        sound(small.call(sent["method"], sent["url"], body, **more))

    run()
    assert small.service.engine.alive


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
models = st.one_of(
    st.sampled_from(
        [
            "[0.2, 0.8]*spam",
            "[{filter: q_proj, value: 1}, {value: 0}]*spam",
            "spam",
            "auto",
            "base",
            "0.5*spam + weather",
            "auto @ svd(rank=1)",
            "spam - cooking @ ties(density=0.1)",
        ]
    ),
    st.text('spam"*+-@.()=, 019_[]{}:', max_size=20),
)
prompts = st.one_of(
    st.text(min_size=1, max_size=30),
    st.lists(st.text(min_size=1, max_size=9), max_size=3),
    st.lists(st.integers(0, 258), min_size=1, max_size=9),
)
fields = {
    "model": models,
    "prompt": prompts,
    "max_tokens": st.integers(1, 12),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "n": st.integers(1, 9),
    "seed": st.integers(-(2**63), 2**63),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=4),
    "stream": st.booleans(),
    "logprobs": st.integers(0, 6),
    "loralloy": st.fixed_dictionaries(
        {}, optional={"neighbours": st.integers(0, 21), "template": st.sampled_from(["auto", "none", "spam", "x"])}
    ),
}


@st.composite
def bodies(draw):
    body = {"model": "spam", "prompt": PROMPT, "max_tokens": 3}
    for name in draw(st.lists(st.sampled_from(list(fields)), max_size=3, unique=True)):
        body[name] = draw(fields[name])
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from([*fields, "anything", "stream_options"]))] = draw(json_values)
    return body


def test_good_requests_with_something_changed(small):
    codes = []

    @settings(FUZZ, max_examples=150)
    @given(bodies())
    def run(body):
        raw = json.dumps(body).encode()
        codes.append(
            sound(small.call("POST", "/v1/completions", content=raw, headers={"content-type": "application/json"}))
        )

    run()
    assert small.service.engine.alive and {200, 400} <= set(codes)
    assert codes.count(200) > 40  # the decoder was reached, not the checks alone


specs = st.one_of(
    st.floats(-2, 2),
    st.lists(st.floats(-2, 2), max_size=4),
    st.lists(
        st.fixed_dictionaries(
            {"value": st.floats(-2, 2) | st.lists(st.floats(-2, 2), min_size=1, max_size=3)},
            optional={
                "filter": st.sampled_from(["q_proj", "*.mlp.*", "nowhere"]),
                "layers": st.sampled_from([0, "0-1", "1-0"]),
            },
        ),
        max_size=3,
    ),
    st.dictionaries(st.sampled_from(["*", "model.layers.0.self_attn.q_proj", "q_proj"]), st.floats(-2, 2), max_size=2),
    st.sampled_from(
        [
            {"\udfff": 1},
            [{"\udfff": 1}],
            [{"filter": "*[\ud800q]_proj", "value": 1}, {"value": 0}],
            [{"layers": "9" * 5000, "value": 1}, {"value": 0}],
        ]
    ),
    json_values,
)


def test_weights_by_module(small):
    codes = []

    @settings(FUZZ, max_examples=200)
    @given(
        st.dictionaries(st.sampled_from(["spam", "cooking", "weather"]), specs, max_size=2),
        st.sampled_from([None, "ties", {"name": "svd"}, {"name": "ties", "density": 0.5}]) | json_values,
        st.sampled_from(["/v1/compositions", "/v1/layers"]),
    )
    def run(weights, rule, path):
        body = {"weights": weights} | ({} if rule is None else {"rule": rule})
        raw = json.dumps(body).encode()  # with halves of surrogate pairs, as JSON may write them
        codes.append(sound(small.call("POST", path, content=raw, headers={"content-type": "application/json"})))

    run()
    assert {200, 400} <= set(codes) and codes.count(200) > 20


@settings(FUZZ, max_examples=60)
@given(
    st.binary(max_size=60),
    st.integers(0, 80),
    st.sampled_from(["application/json", "text/plain", "multipart/form-data", ""]),
)
def test_any_bytes(small, junk, at, kind):
    good = json.dumps({"model": "spam", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}).encode()
    raw = good[:at] + junk + good[at:]
    sound(small.call("POST", "/v1/chat/completions", content=raw, headers={"content-type": kind}))
