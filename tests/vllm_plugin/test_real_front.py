"""`loralloy front` before a real vLLM: routed, merged by the plugin, answered; by OpenAI's own client."""

from __future__ import annotations

import json
import sys

import httpx
import openai
import pytest
from vllm_server import BASE, ROOT, free_port, running, vllm_python, vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(vllm_python() is None, reason="no vLLM here; run `make test-vllm`"),
]
SPAM = "WINNER!! You have been selected to receive a prize. Call now to claim it."


@pytest.fixture(scope="module")
def servers(real_model_folder, real_bank_folder, tmp_path_factory):
    """vLLM, and the front's address."""
    index = ROOT / ".assets" / "index"
    if not index.is_dir():
        pytest.skip(".assets/index is missing; run `make demo`")
    folder, port = tmp_path_factory.mktemp("front"), free_port()
    with vllm_server(real_model_folder, real_bank_folder, folder) as vllm:
        command = [sys.executable, "-m", "loralloy", "front", str(real_bank_folder), "--index", str(index),
                   "--vllm", vllm.url, "--port", str(port)]  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        with running(command, folder / "front.log", {"OMP_NUM_THREADS": "1"}, url, "/front/metrics", 120):
            yield vllm, url


@pytest.fixture
def client(servers):
    return openai.OpenAI(base_url=servers[1] + "/v1", api_key="-", timeout=300)


def test_auto(servers, client):
    vllm, _ = servers
    ask = {"prompt": SPAM, "max_tokens": 6, "temperature": 0}
    answer = client.completions.create(model="auto", **ask, extra_body={"loralloy": {"neighbours": 2}})
    said = answer.model_extra["loralloy"]
    assert max(said["weights"], key=said["weights"].get) == "sms_spam"
    assert answer.model == said["composition"] and len(said["route"]["neighbours"]) == 2
    assert answer.choices[0].text == vllm.ask(said["composition"], SPAM, max_tokens=6).json()["choices"][0]["text"]
    merged = vllm.merges
    again = client.completions.create(model="auto", **ask)
    assert again.choices[0].text == answer.choices[0].text and vllm.merges == merged


def test_streams_and_chats(servers, client):
    _, url = servers
    message = [{"role": "user", "content": SPAM}]
    whole = client.chat.completions.create(model="auto: svd", messages=message, max_tokens=6, temperature=0)
    parts = client.chat.completions.create(
        model="auto: svd", messages=message, max_tokens=6, temperature=0, stream=True
    )
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content
    body = {"model": "auto", "prompt": SPAM, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=300) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]" and "sms_spam" in json.loads(answer.headers["x-loralloy"])["weights"]


def test_all_else_passes(servers, client):
    vllm, url = servers
    assert client.models.list().data[0].id == BASE
    assert httpx.get(url + "/health").status_code == 200
    direct, through = (httpx.post(u + "/tokenize", json={"model": BASE, "prompt": SPAM}) for u in (vllm.url, url))
    assert through.json() == direct.json()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="0.5*nobody", prompt=SPAM)
    named = client.completions.create(model="0.5*sms_spam + 0.5*sarcasm", prompt=SPAM, max_tokens=3)
    assert named.model == "0.5*sarcasm + 0.5*sms_spam"  # vLLM is asked under one name, whatever the spelling


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/adapters"])
def test_no_client_loads_from_a_path(servers, path, real_bank_folder):
    body = {"lora_name": "mine", "lora_path": str(real_bank_folder / "sms_spam"), "name": "mine"}
    assert httpx.post(servers[1] + path, json=body).status_code == 403
    assert servers[0].ask("mine", SPAM).status_code == 404
