"""The demo's page in a browser: what a user sees and presses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import PageOpener, faults
from demos import HOSTILE, QUESTION, STEPS, Demo, make_codec, running
from hand_sampler import WAIT_S

from r3rag_jax.types import Step


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with running(make_codec(tmp_path_factory.mktemp("tokenizer"))) as found:
        yield found


def ask(page: Any, question: str = QUESTION.question) -> None:
    page.locator("#ask:enabled").wait_for()
    page.fill("#question", question)
    page.press("#question", "Enter")


def sees(page: Any, text: str, within: str = "#results") -> None:
    """Wait until the page shows a text."""
    page.locator(within).get_by_text(text, exact=True).first.wait_for()


def test_a_question_is_streamed_to_its_answer_and_its_link_asks_again(demo: Demo, open_page: PageOpener) -> None:
    page = open_page(demo.url)
    assert faults(page) == []
    ask(page)
    draft = demo.write(STEPS[0], upto=19)
    sees(page, "I need the author")
    assert page.locator(".writing").count() == 1
    demo.write(STEPS[0], draft=draft)
    demo.write(STEPS[1])
    page.locator("details.passage").wait_for()
    demo.write(STEPS[2])
    sees(page, "✓ right")
    assert page.locator(".answer .text").inner_text() == "Orvessa"
    assert page.locator(".passages .mark").count() == 2
    assert page.locator(".facts").inner_text().startswith("✓ right") and "2 of 2 supporting" in page.inner_text(
        ".facts"
    )
    assert page.locator(".writing").count() == 0 and faults(page) == []
    with page.expect_download() as download:
        page.click("#download")
    [result] = json.loads(Path(download.value.path()).read_text())
    assert (result["question"], result["answer"], len(result["steps"])) == (QUESTION.question, "Orvessa", 3)

    page.fill("#k", "2")
    page.select_option("#retriever", "less")
    ask(page)
    demo.write(STEPS[2])
    sees(page, "finished")
    other = open_page(page.locator("#link").evaluate("link => link.href"), width=360, height=740, dark=True)
    demo.write(STEPS[2])
    sees(other, "finished")
    other.reload()
    demo.write(STEPS[2])
    sees(other, "finished")
    assert (other.input_value("#question"), other.input_value("#k")) == (QUESTION.question, "2")
    assert other.input_value("#retriever") == "less" and faults(other) == []
    other.goto(f"{demo.url}/api")
    for opener in other.locator("summary").all():
        opener.click()
    sees(other, "passages", within="details")
    assert faults(other) == []


def test_a_user_who_leaves_frees_the_slot_for_another(demo: Demo, open_page: PageOpener) -> None:
    one, two = open_page(demo.url), open_page(demo.url)
    ask(one)
    draft = demo.write(STEPS[0], upto=15)
    sees(one, "writing step 1")
    ask(two, "Who?")
    sees(two, "waiting, next in turn")
    one.close()
    assert demo.hand.cancelled.get(timeout=WAIT_S) is draft
    demo.write(STEPS[2])
    sees(two, "answered")


def test_stop_and_single_steps(demo: Demo, open_page: PageOpener) -> None:
    page = open_page(demo.url)
    ask(page)
    draft = demo.write(STEPS[0], upto=15)
    sees(page, "writing step 1")
    page.keyboard.press("Escape")
    sees(page, "stopped")
    assert demo.hand.cancelled.get(timeout=WAIT_S) is draft and page.locator("#stop").is_disabled()
    page.check("#single")
    ask(page)
    demo.write(STEPS[0])
    sees(page, "paused")
    assert page.locator(":focus").inner_text() == "Next step" and faults(page) == []
    page.keyboard.press("n")
    demo.write(STEPS[1])
    sees(page, "paused")
    page.click("text=To the end")
    demo.write(STEPS[2])
    sees(page, "finished")


def test_policies_side_by_side_and_text_that_is_only_text(demo: Demo, open_page: PageOpener) -> None:
    """A script in the question, a query, a passage and an answer, and what is malformed; errors are shown."""
    page = open_page(demo.url)
    page.locator("#ask:enabled").wait_for()
    page.check("#compare")
    ask(page, f"Who? {HOSTILE}")
    for _ in range(2):  # one after the other: there is one slot
        demo.write(Step(HOSTILE, query=f"Who wrote this hostile harbour {HOSTILE}"))
        sees(page, "reading")
        if (draft := demo.hand.next()).policy == "sft":
            demo.write(Step(HOSTILE, answer=HOSTILE), draft=draft)
            sees(page, "answered")
        else:
            ids = demo.codec.tokenizer.encode(f"no step {HOSTILE}", allow_special=False)
            demo.hand.tell(draft, ids)
            page.locator(".malformed").wait_for()
            demo.hand.tell(draft, ValueError(HOSTILE))
            page.locator(".status.warning").wait_for()
    assert page.locator(".answer .text").inner_text() == HOSTILE
    assert page.locator(".status.warning").inner_text() == f"ValueError: {HOSTILE}"
    assert page.inner_text("#asked").endswith(HOSTILE)
    assert page.locator(".passages .title").first.inner_text() == HOSTILE
    assert [title.inner_text() for title in page.locator("article h2").all()] == ["Cold start", "R3-RAG"]
    assert page.evaluate("[window.hacked === undefined, document.querySelectorAll('img, main script').length]") == [
        True,
        0,
    ]
    assert faults(page) == []
