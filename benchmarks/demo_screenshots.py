"""Screenshots of the demo in headless Chromium, and of `ask` in a terminal, for README and docs.

    python benchmarks/demo_screenshots.py runs/quickstart --out docs/images

Needs the extra `test` and a Chromium (`tests/browser.py` says which).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from browser import EXECUTABLES, Chromium, PageOpener

from r3rag_jax.data.trajectories import trajectory_from_dict
from r3rag_jax.live.terminal import QuestionView
from r3rag_jax.rollout.events import Ended, PassagesFound, StepWritten

QUESTION = "Where was the author of The Silver Harbor born?"
COLUMNS = 88  # of the terminal


@contextlib.contextmanager
def running(run_dir: Path) -> Iterator[str]:
    """The URL of a demo of the run."""
    command = [sys.executable, "-m", "r3rag_jax.demo", "--checkpoint", str(run_dir), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if line.startswith("ready at "))
        yield line.split()[2].rstrip(":")
    finally:
        process.terminate()
        process.wait()


def shoot(opener: PageOpener, address: str, path: Path, num_answers: int, **look: Any) -> None:
    """The whole page when all answers have come."""
    page = opener(address, **look)
    page.locator(".badge").nth(num_answers - 1).wait_for()
    page.locator("#question").blur()
    page.screenshot(path=path, full_page=True)
    colours = Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3)  # keeps the rare ones
    colours.save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1024:.0f} KiB")


def ask(url: str, question: str, **settings: Any) -> dict[str, Any]:
    reply = httpx.post(f"{url}/v1/ask", json={"question": question, "stream": False} | settings, timeout=60)
    return reply.raise_for_status().json()


def learnt(url: str) -> str:
    """The first of the examples that the cold start gets wrong and R3-RAG right, or else the first."""
    examples = httpx.get(f"{url}/v1/settings").json()["examples"]
    is_learnt = (
        [ask(url, one, policy=name)["outcome"] for name in ("sft", "rl")] == ["wrong", "right"] for one in examples
    )
    return next((one for one, found in zip(examples, is_learnt, strict=True) if found), examples[0])


def terminal(url: str, path: Path) -> None:
    """What `ask` prints of the question, as an SVG that asks for no font."""
    result = ask(url, QUESTION)
    scores = {p["id"]: p["score"] for step in result["steps"] for p in step.get("passages", ())}
    trajectory = trajectory_from_dict(result | {"golden_answers": ["?"]})
    trajectory = dataclasses.replace(trajectory, question=dataclasses.replace(trajectory.question, golden_answers=()))
    console = Console(file=io.StringIO(), record=True, width=COLUMNS, force_terminal=False, color_system="truecolor")
    console.print(f'$ python -m r3rag_jax.ask --checkpoint runs/quickstart "{QUESTION}"', style="bold", highlight=False)
    view = QuestionView(console, trajectory.question)
    for number, step in enumerate(trajectory.steps, 1):
        view.hear(StepWritten(number, step))
        if step.query is not None:
            view.hear(PassagesFound(number, step.passages, tuple(scores[passage.id] for passage in step.passages)))
    view.hear(Ended(trajectory))
    svg = console.export_svg(title="r3rag_jax.ask")
    path.write_text(re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL))
    print(path, f"{path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chromium = Chromium(next(path for name in EXECUTABLES if (path := shutil.which(name))))
    with running(options.run_dir) as url:
        compared, alone = (f"{url}/#{urlencode({'q': learnt(url)} | more)}" for more in ({"compare": 1}, {}))
        with chromium.active() as browser:
            opener = PageOpener(browser)
            shoot(opener, compared, options.out / "demo.png", 2, width=1180, height=800)
            shoot(opener, alone, options.out / "demo-phone.png", 1, width=360, height=760, dark=True)
            assert opener.errors == []
        chromium.close()
        terminal(url, options.out / "ask.svg")


if __name__ == "__main__":
    main()
