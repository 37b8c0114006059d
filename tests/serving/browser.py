"""A server on a port of its own, in a thread, and a headless Chromium that looks at its page."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from loralloy.serving.app import create_app


def chromium() -> str | None:
    """The browser's executable: LORALLOY_CHROMIUM, or what is on the path."""
    named = os.environ.get("LORALLOY_CHROMIUM")
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return named or next((path for path in found if path), None)


@contextlib.contextmanager
def listening(service: Any, key: str | None = None) -> Iterator[str]:
    """The service's address, for as long as the block lasts."""
    app = create_app(service, key, ["127.0.0.1", "localhost"])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        assert server.started
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def slowly(service: Any, seconds: float) -> None:
    """Make every step of the decoder take this much longer, and no answer end by itself."""
    scheduler = service.engine.scheduler
    step, scheduler.ends = scheduler.step, set()

    def slow() -> None:
        time.sleep(seconds)
        step()

    scheduler.step = slow


class Look:
    """A tab at the page, with the words its tests need. `errors`: of scripts; `elsewhere`: requests to any other host."""

    def __init__(self, browser: Any, url: str, service: Any, expect: Any, **options: Any) -> None:
        self.service, self.expect = service, expect
        self.url, self.errors, self.elsewhere, self.seen = url, [], [], []
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.context.set_default_timeout(10_000)
        self.context.route("**/*", self._only_here)
        self.context.on("weberror", lambda error: self.errors.append(str(error.error)))
        self.context.on("console", self._console)
        self.page = self.context.new_page()

    def _only_here(self, route: Any) -> None:
        self.seen.append(route.request.url)
        if route.request.url.startswith((self.url, "data:")):
            return route.continue_()
        self.elsewhere.append(route.request.url)
        return route.abort()

    def _console(self, message: Any) -> None:
        # an answer of 4xx is noted by the browser itself
        if message.type in ("error", "warning") and "the server responded with a status" not in message.text:
            self.errors.append(message.text)

    def open(self) -> Look:
        self.page.goto(self.url)
        self.tab("Ask").wait_for()
        return self

    def close(self) -> None:
        self.context.close()
        assert not self.errors and not self.elsewhere

    def tab(self, name: str) -> Any:
        return self.page.get_by_role("tab", name=name)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def field(self, label: str) -> Any:
        return self.page.get_by_label(label, exact=True)

    def compose(self, label: str, text: str) -> None:
        self.field(label).fill(text)
        self.field(label).press("Escape")

    def choose(self, label: str, option: str) -> None:
        self.field(label).click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def ask(self, question: str) -> None:
        self.field("Question or text").fill(question)
        self.button("Send").click()

    def answered(self) -> None:
        """Wait until nothing is under way."""
        self.page.locator(".state:visible").first.wait_for()
        self.button("Stop").wait_for(state="detached")

    def lane(self, number: int = 0) -> Any:
        return self.page.locator("article.lane:visible").nth(number)

    def bars(self, number: int = 0) -> list[tuple[str, str]]:
        rows = self.lane(number).locator(".bars li")
        return [(r.locator(".name").inner_text(), r.locator(".value").inner_text()) for r in rows.all()]

    @property
    def overflow(self) -> int:
        """Pixels that the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))
