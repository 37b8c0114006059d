"""Time to the first token of a vLLM with the plugin: its base, compositions that it holds, and new ones, in turn.

    python benchmarks/vllm_first_token.py sms_spam sarcasm question_type --url http://127.0.0.1:8000

The compositions are new ones as long as the cache has not seen the seed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import httpx


def first_token(client: httpx.Client, model: str, prompt: str) -> float:
    """Seconds from sending to the first event with text. Raises RuntimeError for another answer than a stream."""
    start = time.perf_counter()
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{model}: {answer.status_code} {answer.read().decode()[:300]}")
        next(line for line in answer.iter_lines() if line)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", help="Names of the bank's adapters; each composition has all of them.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=12, help="Compositions.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rule", default="", help="As in 'ties(density=0.3)'.")
    given = parser.parse_args()
    draw, seconds = random.Random(given.seed), {"base": [], "known": [], "new": []}  # type: ignore[var-annotated]
    with httpx.Client(base_url=given.url, timeout=600, trust_env=False) as client:
        cards = client.get("/v1/models").raise_for_status().json()["data"]
        base = next(card["id"] for card in cards if not card.get("parent"))

        def drawn() -> str:
            terms = " + ".join(f"{draw.randint(1, 999) / 1000}*{name}" for name in given.adapters)
            return f"{terms} @ {given.rule}" if given.rule else terms

        for model in (base, drawn()):  # what the first of each kind loads
            first_token(client, model, "warm")
        for i in range(given.count):
            model = drawn()
            # each prompt its own, or the prefix cache answers for the model
            seconds["new"].append(first_token(client, model, f"{i} a prompt of a few words"))
            seconds["known"].append(first_token(client, model, f"again {i} a prompt of a few words"))
            seconds["base"].append(first_token(client, base, f"base {i} a prompt of a few words"))
    for kind, all_ in seconds.items():
        print(f"{kind:6} median {statistics.median(all_):.3f} s, worst {max(all_):.3f} s")
    print(json.dumps({"url": given.url, "rule": given.rule, "seconds": seconds}))


if __name__ == "__main__":
    main()
