"""The browser fixture, on the report page and on pages with a fault each."""

from __future__ import annotations

import asyncio
from pathlib import Path

import synthetic_run
from browser import Chromium, PageOpener, faults

from r3rag_jax.reporting.report_page import write_report


def test_the_report_opens(tmp_path: Path, open_page: PageOpener) -> None:
    page = open_page(write_report(synthetic_run.build(tmp_path / "synthetic")), width=360)
    assert page.inner_text("h1") == "synthetic"
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is False


def test_a_fault_of_each_kind_is_found(open_page: PageOpener) -> None:
    pale = "<p style='color:%23eee;background:%23fff'>pale</p>"
    wide = "<p style='width:2000px;color:%23000;background:%23fff'>wide</p>"
    page = open_page(f"data:text/html,<html lang=en><title>t</title><main><h1>t</h1>{pale}<input>{wide}")
    assert [fault.partition(":")[0] for fault in faults(page)] == [
        "color-contrast", "label", "a page must not scroll sideways; it is 2008 px wide in a window of 1280",
    ]  # fmt: skip


def test_errors_of_a_page_are_noted(chromium: Chromium) -> None:
    with chromium.active() as browser:
        opener = PageOpener(browser)
        page = opener("about:blank")
        page.evaluate("console.error('broken'); queueMicrotask(() => { throw new Error('thrown') }); null")
        page.evaluate("null")
        page.context.close()
    assert [noted.partition("\n")[0] for noted in opener.errors] == ["console: broken", "uncaught: thrown"]


def test_other_event_loops_run_beside_the_browser(chromium: Chromium) -> None:
    asyncio.run(asyncio.sleep(0))
    with chromium.active() as browser:
        assert browser.is_connected()
