"""Screenshots of a run's report in headless Chromium, light, dark and on a phone.

    python benchmarks/report_screenshots.py runs/quickstart --out docs/images

Needs playwright and a Chromium (`tests/browser.py` says which).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

from browser import EXECUTABLES, FLAGS  # noqa: E402

from r3rag_jax.reporting.report_page import write_report  # noqa: E402

# name -> width and height of the window, dark, what is shown, keys that are pressed first
SHOTS = {
    "report-curves": ((1180, 800), False, "#rl", ""),
    "report-group": ((1180, 1000), True, "#explorer", "gs"),
    "report-phone": ((360, 760), False, "#detail", "s"),
}


def take(page: Page, selector: str, keys: str, path: Path) -> None:
    """The window from an element on, after keys were pressed."""
    for key in keys:
        page.keyboard.press(key)
    page.evaluate("(selector) => document.querySelector(selector).scrollIntoView()", selector)
    page.screenshot(path=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument(
        "--show", default="", help="a trajectory to open, as the address of the page's link has it: rl.16"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = write_report(options.run_dir).resolve().as_uri() + (f"#show={options.show}" if options.show else "")
    executable = next(path for name in EXECUTABLES if (path := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        for name, ((width, height), is_dark, selector, keys) in SHOTS.items():
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme="dark" if is_dark else "light"
            )
            page = context.new_page()
            page.goto(report)
            take(page, selector, keys, options.out / f"{name}.png")
            print(options.out / f"{name}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
