"""The page as a person uses it, in headless Chromium; every test also holds that no other host is asked and no script fails."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from serving_scenes import PROMPT

from loralloy.factors import norm
from loralloy.serving.engine import Busy


def complete(look, model, **body):
    """What the API says to the same question."""
    said = look.context.request.post(
        look.url + "/v1/chat/completions",
        data={"model": model, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, **body},
    )
    assert said.ok, said.text()
    return said.json()


def test_a_question_is_routed_answered_and_explained(start):
    look = start().open()
    look.expect(look.page).to_have_title("LoRAlloy")
    look.expect(look.page.get_by_text("3 adapters of")).to_be_visible()
    look.ask(PROMPT)
    look.answered()
    want = complete(look, "auto", max_tokens=64, loralloy={"template": "auto", "neighbours": 5})
    told = want["loralloy"]
    text = want["choices"][0]["message"]["content"].strip()
    assert look.lane().locator(".text").inner_text().strip() == text
    shown = look.bars()
    assert [name for name, _ in shown] == sorted(told["weights"], key=lambda n: -told["weights"][n])
    for name, value in shown:
        assert float(value) == pytest.approx(told["weights"][name], rel=1e-2)
    widths = [bar.bounding_box()["width"] for bar in look.lane().locator(".bar").all()]
    assert widths == sorted(widths, reverse=True)
    assert look.lane().locator(".near li").count() == 5
    first = told["route"]["neighbours"][0]
    look.expect(look.lane().locator(".near li").first).to_contain_text(first["task"])
    near = float(look.lane().locator(".similarity").first.inner_text())
    assert near == pytest.approx(1 - first["distance"], abs=0.006)
    facts = look.lane().locator(".facts").inner_text()
    for part in ("linear", "delta", "live, no merge needed", "0, exact", "spam's form"):
        assert part in facts
    look.expect(look.lane().locator(".again code")).to_have_text(told["composition"])


def test_the_answer_streams_and_stop_frees_the_row(start):
    look = start(slow=0.03).open()
    look.field("Most tokens").fill("400")
    look.ask(PROMPT)
    lengths = []
    for _ in range(4):
        look.page.wait_for_function(
            "n => (document.querySelector('.state')?.innerText.match(/(\\d+) token/) || [0, 0])[1] > n",
            arg=lengths[-1] if lengths else 0,
        )
        lengths.append(int(re.search(r"(\d+) token", look.page.locator(".state").inner_text())[1]))
    assert lengths == sorted(set(lengths)) and lengths[-1] < 100  # seen on the way, long before the end
    assert look.service.engine.running == 1
    look.button("Stop").click()
    look.expect(look.page.locator(".state")).to_contain_text("Stopped after")
    until = time.monotonic() + 5
    while look.service.engine.running and time.monotonic() < until:
        time.sleep(0.02)
    assert look.service.engine.running == 0 and look.service.engine.cancelled == 1
    assert look.bars()  # what came stays


def test_a_composition_that_cannot_be_read_says_where(start):
    look = start().open()
    look.field("Composition").fill("0.6*spam + @ ties")
    error = look.lane().locator(".reason")
    look.expect(error).to_have_text("Character 12: expected an adapter's name, found '@'")
    look.expect(look.lane().locator("mark")).to_have_text("@")
    look.compose("Composition", "music")
    look.expect(error).to_contain_text("there is no adapter 'music' in this bank; it has cooking, spam, weather")
    look.ask(PROMPT)
    look.expect(look.lane().locator(".error")).to_contain_text("no adapter 'music'")
    look.compose("Composition", "0.5*spam - weather @ ties(density=0.3)")
    look.expect(error).to_have_count(0)
    look.button("Send").click()
    look.answered()
    assert look.bars() == [("weather", "−1"), ("spam", "0.5")]
    look.expect(look.lane().locator(".minus")).to_have_count(1)
    look.expect(look.lane().locator(".facts")).to_contain_text("merged for this request")


def test_the_choice_is_filtered_and_completes_what_is_typed(start):
    look = start().open()
    look.field("Composition").click()
    options = look.page.get_by_role("option")
    look.expect(options).to_have_text(["auto", "base", "cooking", "spam", "weather"])
    look.field("Composition").fill("0.5*spam + we")
    look.expect(options).to_have_text(["0.5*spam + weather"])
    options.first.click()
    look.expect(look.field("Composition")).to_have_value("0.5*spam + weather")
    look.field("Composition").fill("0.5*spam + weather @ t")
    look.expect(options.first).to_contain_text("0.5*spam + weather @ t")
    look.field("Question or text").fill(PROMPT)
    look.field("Composition").fill("0.5*spam + weather")
    look.field("Composition").press("Enter")  # what is typed stands, and is sent
    look.answered()
    assert look.bars() == [("weather", "1"), ("spam", "0.5")]


def test_errors_of_the_api_are_shown_in_words(start):
    look = start(slow=0.01).open()
    look.ask("x" * 600)
    look.expect(look.page.get_by_role("alert")).to_contain_text("the server takes 512; shorten the prompt")

    def full(_):
        raise Busy("9 rows are waiting and the queue holds 8", 7)

    check, look.service.engine.check = look.service.engine.check, full
    look.ask(PROMPT)
    look.expect(look.page.get_by_role("alert")).to_have_text(
        "9 rows are waiting and the queue holds 8. Try again in 7 s."
    )
    look.service.engine.check = check
    look.service.engine.seconds = 0.2
    look.field("Most tokens").fill("300")
    look.ask(PROMPT)
    look.expect(look.page.get_by_role("alert")).to_have_text("the answer took too long")
    look.service.engine.seconds = 60
    look.field("Most tokens").fill("100000")
    look.ask(PROMPT)
    look.expect(look.field("Most tokens")).to_have_value("1024")  # the server's most


def test_a_text_unlike_the_index_is_answered_by_the_base(start, weigher, monkeypatch):
    look = start(options={"threshold": 0.99}).open()
    weigh = look.service.routing.weigher.weigh_batch
    monkeypatch.setattr(
        look.service.routing,
        "weigher",
        SimpleNamespace(
            index=weigher.index,
            weigh_batch=lambda texts: [replace(w, explain=w.explain | {"unlike": 0.9996}) for w in weigh(texts)],
        ),
    )
    look.ask("zzz qqq")
    look.answered()
    look.expect(look.lane().locator(".note")).to_contain_text("the base model answered alone")
    look.expect(look.lane().locator(".note")).to_contain_text("99.9 %")  # never rounded up to all
    look.expect(look.lane()).to_contain_text("Weights it would have had")
    assert look.bars()
    look.expect(look.lane().locator(".again code")).to_have_text("base")


def test_two_compositions_side_by_side(start):
    look = start(slow=0.02).open()
    look.tab("Compare").click()
    look.compose("First composition", "spam")
    look.compose("Second composition", "0.7*weather + 0.3*cooking")
    look.field("Most tokens").fill("40")
    look.ask(PROMPT)
    until, together = time.monotonic() + 8, 0
    while together < 2 and time.monotonic() < until:
        together = look.service.engine.running
    assert together == 2
    look.answered()
    assert look.bars(0) == [("spam", "1")] and look.bars(1) == [("weather", "0.7"), ("cooking", "0.3")]
    del look.service.engine.scheduler.step  # at full speed again
    for n, model in enumerate(("spam", "0.7*weather + 0.3*cooking")):
        want = complete(look, model, max_tokens=40, loralloy={"template": "auto"})["choices"][0]["message"]["content"]
        assert look.lane(n).locator(".text").inner_text().split() == want.split()
    a, b = (look.lane(n).bounding_box() for n in (0, 1))
    assert a["y"] == b["y"] and a["x"] + a["width"] <= b["x"]
    look.page.set_viewport_size({"width": 390, "height": 844})
    a, b = (look.lane(n).bounding_box() for n in (0, 1))
    assert a["x"] == b["x"] and a["y"] + a["height"] <= b["y"]


def test_layers_as_a_heat_map(start, tiny):
    look = start().open()
    look.tab("Layers").click()
    look.compose("Composition to measure", "0.5*spam - 2*weather @ ties")
    look.button("Show").click()
    look.expect(look.lane()).to_contain_text("has not been merged yet")
    head = look.page.get_by_role("columnheader")
    look.expect(head).to_have_text(["layer", "q", "k", "v", "o", "gate", "up", "down"])
    look.expect(look.field("Shown")).to_have_value("spam, weight 0.5")
    look.choose("Shown", "weather, weight −2")
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    rows = look.page.locator("tbody tr")
    for layer in range(rows.count()):
        for column, name in enumerate(names):
            want = 2 * norm(tiny.bank["weather"][f"model.layers.{layer}.{name}"])
            got = rows.nth(layer).locator("td").nth(column).inner_text()
            assert float(got) == pytest.approx(want, rel=0.06)
    heats = [float(re.search(r"(\d+)%", c.get_attribute("style"))[1]) for c in look.page.locator("td").all()]
    assert max(heats) == 100 and min(heats) < 80
    look.button("Merge it").click()
    look.expect(look.field("Shown")).to_have_value("the whole composition")
    look.compose("Composition to measure", "auto")
    look.button("Show").click()
    look.expect(look.page.get_by_role("alert")).to_contain_text("auto is composed for each request")


def test_layers_of_weights_by_module(start, tiny):
    look = start().open()
    look.tab("Layers").click()
    look.compose("Composition to measure", "[0.5, 2]*spam")
    look.button("Show").click()
    look.choose("Shown", "spam, mean weight 1.25")
    last = look.page.locator("tbody tr").last.locator("td").first.inner_text()
    assert float(last) == pytest.approx(2 * norm(tiny.bank["spam"]["model.layers.1.self_attn.q_proj"]), rel=0.06)
    look.tab("Ask").click()
    look.compose("Composition", "[0.5, 2]*spam")
    look.ask(PROMPT)
    look.answered()
    look.expect(look.lane()).to_contain_text("spam: the bar is the mean")


def test_from_an_answer_to_its_layers(start):
    look = start(index=False).open()
    look.expect(look.field("Composition")).to_have_value("cooking")  # there is no auto
    look.ask(PROMPT)
    look.answered()
    look.button("See its layers").click()
    look.expect(look.field("Composition to measure")).to_have_value("cooking")
    look.expect(look.page.get_by_role("table")).to_be_visible()


def test_a_composition_too_long_for_an_address_is_read_too(start):
    look = start().open()
    text = f"spam + weather @ ties(density=0.{'3' * 6000})"
    with look.page.expect_response("**/v1/compositions") as heard:
        look.field("Composition").fill(text)
    assert heard.value.status == 200
    with look.page.expect_response("**/v1/compositions") as heard:
        look.field("Composition").fill(text + "!")
    assert heard.value.status == 400
    look.expect(look.page.get_by_text("Character 6034:")).to_be_visible()


def test_a_late_word_on_what_stood_in_the_field_is_not_heard(start):
    look = start().open()
    held = []
    look.context.route("**/v1/models/*", lambda route: held.append(route))
    with look.page.expect_request("**/v1/models/spam"):
        look.field("Composition").fill("spam")
    look.field("Composition").fill("")
    look.expect(look.page.get_by_text("Give a composition.")).to_be_visible()
    for route in held:
        with contextlib.suppress(Exception):  # given up by the page
            route.fulfill(status=200, json={"id": "spam"})
    look.page.wait_for_timeout(200)
    look.expect(look.page.get_by_text("Give a composition.")).to_be_visible()
