"""The command on a real port, and OpenAI's own client, unchanged."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from serving_scenes import PROMPT

from loralloy.weights import Weights

SRC = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    """`loralloy serve` in a process of its own, without an index (its embedder would have to be there)."""
    log = tmp_path_factory.mktemp("log") / "log"
    flags = ["--model", world.model, "--port", "0", "--dtype", "float32", "--max-tokens", "400"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "loralloy", "serve", world.bank, *map(str, flags)],
            env=os.environ | {"PYTHONPATH": str(SRC), "LORALLOY_API_KEY": "key"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            found = None
            for _ in range(600):
                found = re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text(), re.I)
                if found or process.poll() is not None:
                    break
                time.sleep(0.1)
            assert found, log.read_text()
            yield found[1], process, log
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server[0] + "/v1", api_key="key", max_retries=0) as client:
        yield client


def test_models(client):
    assert [m.id for m in client.models.list()] == ["base", "cooking", "spam", "weather"]
    assert client.models.retrieve("spam + weather").id == "spam + weather"


def test_completions(client, tiny):
    made = client.completions.create(model="0.5*spam + weather", prompt=PROMPT, max_tokens=5, temperature=0)
    ids = tiny.tokenizer(PROMPT)["input_ids"]
    scores = tiny.scores(Weights({"spam": 0.5, "weather": 1.0}), ids)
    assert made.choices[0].text.startswith(tiny.tokenizer.decode([int(scores[-1].argmax())]).rstrip("\ufffd"))
    assert made.model_extra["loralloy"]["weights"] == {"spam": 0.5, "weather": 1.0}
    chunks = list(
        client.completions.create(model="0.5*spam + weather", prompt=PROMPT, max_tokens=5, temperature=0, stream=True)
    )
    assert "".join(c.choices[0].text for c in chunks) == made.choices[0].text
    assert chunks[0].model_extra["loralloy"]["composition"] == "0.5*spam + weather"


def test_chats(client):
    ask = {"model": "spam @ svd", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "seed": 1}
    made = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    assert made.usage.completion_tokens == len(made.choices[0].logprobs.content)
    assert len(made.choices[0].logprobs.content[0].top_logprobs) == 2
    with client.chat.completions.create(**ask, stream=True) as stream:
        text = "".join(c.choices[0].delta.content or "" for c in stream)
    assert text == made.choices[0].message.content
    own = client.chat.completions.create(**ask, extra_body={"loralloy": {"template": "none"}})
    assert own.model_extra["loralloy"]["cache"] == "hit"


def test_errors(client, server):
    with pytest.raises(openai.BadRequestError, match="character 8: expected an adapter's name"):
        client.completions.create(model="spam + @", prompt="x")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="music", prompt="x")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=server[0] + "/v1", api_key="no") as other:
        other.models.list()


def test_a_client_that_leaves_a_stream(client, server):
    import httpx

    stream = client.completions.create(model="spam", prompt=PROMPT, max_tokens=400, temperature=1, seed=3, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(200):
        text = httpx.get(server[0] + "/metrics", headers={"authorization": "Bearer key"}).text
        if "loralloy_rows_running 0.0" in text:
            break
        time.sleep(0.05)
    assert "loralloy_rows_running 0.0" in text and "loralloy_requests_open 1.0" in text


def test_zz_it_ends_when_told(client, server):
    """Last: a stream under way is finished, then the process is gone with no traceback."""
    _, process, log = server
    stream = client.completions.create(model="spam", prompt=PROMPT, max_tokens=200, temperature=1, seed=2, stream=True)
    events = iter(stream)
    next(events)
    process.send_signal(signal.SIGTERM)
    assert [e.choices[0].finish_reason for e in events][-1] in ("length", "stop")
    stream.close()
    assert process.wait(30) in (0, -signal.SIGTERM)
    assert "Traceback" not in log.read_text()
