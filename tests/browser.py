"""Pages in headless Chromium, for tests of what people look at; skipped where there is no Chromium or no playwright.

    def test_it(open_page):                       # the fixture, see `PageOpener`
        page = open_page(url, width=360, dark=True)
        assert faults(page) == []                 # contrast, labels, horizontal scroll

A test that opens a page fails at its end if a page has written an error to its console, has raised one, or has asked
for anything that is not on this machine. Fixtures that train must come before `open_page` in a test's arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# As root there is no sandbox; a small /dev/shm would end the browser.
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
LOCAL = ("file", "data", "blob", "about")  # schemes that ask no other machine
TIMEOUT_MS = 30_000  # of every wait for something on a page


class Chromium:
    """A running browser. Its driver's event loop is the main thread's inside `active`, and only there.

    Otherwise whatever runs an event loop of its own, as orbax does, would find one running.
    """

    def __init__(self, executable: str):
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        self._loop = asyncio._get_running_loop()
        self.browser = self._playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        asyncio._set_running_loop(None)

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """The browser, to be used inside the `with` block."""
        asyncio._set_running_loop(self._loop)
        try:
            yield self.browser
        finally:
            asyncio._set_running_loop(None)

    def close(self) -> None:
        with self.active():
            self.browser.close()
            self._playwright.stop()


class PageOpener:
    """Opens pages and notes what goes wrong in them."""

    def __init__(self, browser: Any):
        self._browser = browser
        self.errors: list[str] = []  # of all pages, in the order in which they came

    def __call__(
        self, address: str | Path, *, width: int = 1280, height: int = 800, dark: bool = False, **options: Any
    ) -> Any:
        """A new page (playwright's `Page`) of a new user, at an address.

        Args:
            address: a URL, or a file.
            width, height: of the window, in CSS pixels.
            options: others of playwright's `Browser.new_context`.
        """
        context = self._browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light",
            reduced_motion="reduce", **options,
        )  # fmt: skip
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("console", lambda message: self._note("console", message.text, message.type == "error"))
        page.on("pageerror", lambda error: self._note("uncaught", str(error), True))
        page.on("request", lambda request: self._note("foreign", request.url, not _is_local(request.url)))
        page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
        return page

    def _note(self, kind: str, text: str, is_error: bool) -> None:
        if is_error:
            self.errors.append(f"{kind}: {text}")


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in LOCAL or parts.hostname in ("127.0.0.1", "localhost")


def faults(page: Any) -> list[str]:
    """What axe-core finds wrong with a page as it is now (WCAG 2.1 AA and best practices), and horizontal scroll."""
    from axe_playwright_python.sync_playwright import Axe

    found = [
        f"{violation['id']}: {node['html'][:160]} | {node['failureSummary']}"
        for violation in Axe().run(page).response["violations"]
        for node in violation["nodes"]
    ]
    page_width, window_width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    if page_width > window_width:
        found.append(f"a page must not scroll sideways; it is {page_width} px wide in a window of {window_width}")
    return found


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """The browser of all tests of a process."""
    pytest.importorskip("playwright", reason="needs the package playwright: pip install 'r3rag_jax[test]'")
    executable = next((path for name in EXECUTABLES if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"needs a browser: apt-get install chromium, or another of {', '.join(EXECUTABLES)} on the PATH")
    running = Chromium(executable)
    yield running
    running.close()


@pytest.fixture
def open_page(chromium: Chromium) -> Iterator[PageOpener]:
    """Opens pages; the test fails at its end if one of them has an error."""
    with chromium.active() as browser:
        opener = PageOpener(browser)
        try:
            yield opener
        finally:
            for context in browser.contexts:
                context.close()
    assert opener.errors == []
