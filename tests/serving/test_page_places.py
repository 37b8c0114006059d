"""The page behind a key, on a phone, in the dark, read aloud, over a large bank, and with the real model."""

from __future__ import annotations

import json
import math

import pytest
from serving_scenes import PROMPT, Tiny


def test_with_a_key_nothing_is_told_without_it(start):
    look = start(key="open sesame")
    look.page.goto(look.url)
    look.page.get_by_role("heading", name="This server asks for a key").wait_for()
    assert "spam" not in look.page.content() and look.tab("Ask").count() == 0
    look.field("API key").fill("wrong")
    look.button("Continue").click()
    look.expect(look.page.get_by_role("alert")).to_have_text("The server does not know this key.")
    look.field("API key").fill("open sesame")
    look.button("Continue").click()
    look.tab("Ask").wait_for()
    look.ask(PROMPT)
    look.answered()
    assert look.bars()
    look.page.reload()
    look.tab("Ask").wait_for()  # the tab knows it still
    assert look.page.url == look.url + "/" and not any("sesame" in url for url in look.seen)
    assert look.context.cookies() == [] and look.page.evaluate("localStorage.length") == 0
    other = look.context.new_page()
    other.goto(look.url)
    other.get_by_role("heading", name="This server asks for a key").wait_for()
    look.ask(PROMPT)
    look.answered()
    look.expect(look.lane().locator(".near li").first).to_be_visible()
    look.button("Forget the key").click()
    look.page.get_by_role("heading", name="This server asks for a key").wait_for()
    assert "spam" not in look.page.content() and look.tab("Ask").count() == 0  # with the key goes what it has shown


def test_a_phone_s_width_and_the_system_s_dark_mode(start):
    look = start(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="dark").open()
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((s, x) => s + +x, 0) / 765"
    assert look.page.evaluate(light) < 0.3
    look.ask("w" * 300 + " " + PROMPT)
    look.answered()
    assert look.overflow <= 0
    look.tab("Compare").click()
    look.compose(
        "Second composition", "0.123456789*spam + 0.123456789*weather - 0.987654321*cooking @ ties(density=0.5)"
    )
    look.ask(PROMPT)
    look.answered()
    assert look.overflow <= 0
    look.tab("Layers").click()
    look.button("Show").click()
    look.page.get_by_role("table").wait_for()
    assert look.overflow <= 0
    look.page.emulate_media(color_scheme="light")
    assert look.page.evaluate(light) > 0.9


def test_everything_has_a_name(start):
    look = start().open()
    look.ask(PROMPT)
    look.answered()
    for tab in ("Ask", "Compare", "Layers"):
        look.tab(tab).click()
        nameless = look.page.locator(
            "input:visible, textarea:visible, button:visible, [role=checkbox]:visible"
        ).evaluate_all(
            "all => all.filter(e => !(e.getAttribute('aria-label') || e.innerText || e.labels?.[0]?.innerText)).length"
        )
        assert nameless == 0


def test_a_bank_of_a_thousand(start):
    """Only what is looked at is drawn; of the weights the largest, and the rest as one."""
    look = start(index=False)
    names = ["<img src=x onerror=alert(1)>", *(f"adapter-{i:04}" for i in range(1, 1000))]
    models = {"object": "list", "data": [{"id": name} for name in ["base", *names]]}
    look.context.route("**/v1/models", lambda route: route.fulfill(json=models))
    weights = {name: 1 / (i + 1) for i, name in enumerate(names)}
    told = '{"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}], "loralloy": %s}'
    own = json.dumps({"composition": "x", "weights": weights, "rule": "linear", "space": "delta", "cache": "live"})
    look.context.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {told % own}\n\ndata: [DONE]\n\n")
    )
    look.open()
    look.field("Composition").click()
    look.expect(look.page.get_by_role("option", name="adapter-0003")).to_be_visible()
    assert look.page.get_by_role("option").count() < 200
    look.field("Composition").fill("0.5*adapter-0077")
    look.field("Composition").fill("0.5*adapter-007")
    look.expect(look.page.get_by_role("option")).to_have_text([f"0.5*adapter-007{i}" for i in range(10)])
    look.field("Composition").press("Escape")
    look.ask(PROMPT)
    look.answered()
    bars = look.bars()
    assert len(bars) == 13 and bars[0] == (names[0], "1") and bars[-1][0] == "988 more"
    rest = math.fsum(1 / (i + 1) for i in range(12, 1000))
    assert float(bars[-1][1]) == pytest.approx(rest, rel=1e-2)


@pytest.mark.real
def test_the_real_model_and_bank(real_model_folder, real_bank_folder, start):
    from loralloy.bank import Bank
    from loralloy.live.base import load_base

    model, tokenizer = load_base(str(real_model_folder), "float32", "cpu")
    look = start(Tiny(model, tokenizer, Bank.load(real_bank_folder), None), index=False).open()
    look.compose("Composition", "0.8*sms_spam + 0.2*sarcasm")
    look.choose("Text is sent as", "as it is")
    look.ask("Is this text message spam or ham?\nMessage: You have WON a free cruise! Call 0800 to claim\nAnswer:")
    look.answered()
    look.expect(look.lane().locator(".text")).to_contain_text("spam")
    assert look.bars() == [("sms_spam", "0.8"), ("sarcasm", "0.2")]
    look.button("See its layers").click()
    look.expect(look.page.locator("tbody tr")).to_have_count(30)
