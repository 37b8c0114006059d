"""The front gives a composition one name, however a client writes it: in vLLM every name is an adapter of its own."""

from __future__ import annotations

import json
import threading

import pytest
from front_scenes import Fronted

from loralloy.vllm_plugin.front import Front


@pytest.fixture
def front():
    return Fronted(adapters=frozenset(("a", "b", "sms_spam", "odd one")))


@pytest.mark.parametrize("written", ["0.5*a + b", "0.50*a+b", "b + .5*a", '1.0*"b" + 0.5*"a"'])
def test_all_ways_to_write_it(front, written):
    answer = front.complete(written, max_tokens=2)
    assert answer.status_code == 200 and "loralloy" not in answer.json()
    assert front.sent == {"model": "0.5*a + b", "prompt": "WINNER", "max_tokens": 2}
    front.chat({"role": "user", "content": "x"}, **{"model": written})
    assert front.sent["model"] == "0.5*a + b"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/embeddings", "/v1/chat/completions/render"])
def test_on_every_path(front, path):
    front.call("POST", path, json={"model": "0.50*a", "input": "é", "seed": 12345678901234567890})
    assert front.sent == {"model": "0.5*a", "input": "é", "seed": 12345678901234567890}
    assert int(front.seen[-1]["headers"]["content-length"]) == len(front.seen[-1]["raw"])


@pytest.mark.parametrize(
    "model", ["odd one", "the-base", "org/other", "0.5*nobody", "0.50*a + nobody", "a +", "", None, 3]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
def test_other_names_pass_byte_for_byte(front, model, path):
    raw = b'{"model" :' + json.dumps(model).encode() + b', "prompt": "x\\u00e9",  "n": 1.50}'
    front.call("POST", path, content=raw)
    assert front.seen[-1]["raw"] == raw


@pytest.mark.parametrize("raw", [b"{no", b"\xff\xfe", b"", b"--boundary\r\nmodel=0.50*a"])
def test_what_is_no_json_object_passes(front, raw):
    front.call("POST", "/v1/audio/transcriptions", content=raw)
    assert front.seen[-1]["raw"] == raw


@pytest.mark.parametrize("raw", [b"[1]", b'"0.50*a"', b'{"a":' * 100_000, b"{}", b'{"model": {"model": "0.50*a"}}'])
def test_odd_json_is_left_to_vllm(front, raw):
    front.app()
    assert front.front.renamed(raw) is raw


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
def test_a_long_one_is_read_off_the_event_loop(front, path, monkeypatch):
    """Reading a quarter of a million characters takes half a second, in which nobody else would be answered."""
    where, rename = [], Front.rename
    monkeypatch.setattr(
        Front, "rename", lambda self, body: (where.append(threading.current_thread()), rename(self, body))
    )
    written = "[" + "0.50, " * 4000 + "1]*a"
    front.call("POST", path, json={"model": written, "prompt": "x"})
    assert front.sent["model"] == "[" + "0.5, " * 4000 + "1.0]*a"
    front.call("POST", path, json={"model": "0.50*a", "prompt": "x"})
    assert front.sent["model"] == "0.5*a"
    assert [thread is threading.main_thread() for thread in where] == [False, True]
