"""What is shown of a step while it is being written: parts that only grow, up to what the parser reads."""

from __future__ import annotations

import pytest

from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.types import Step

ANALYSIS = "I need the author: a < b, The retrieval was\nlong. "
STEPS = [Step(ANALYSIS, query="Who wrote <The> Queen? The"), Step("Then it is a city", answer="Paris</ans")]


@pytest.mark.parametrize("name", ["tags", "steps", "search_r1"])
@pytest.mark.parametrize("step", STEPS, ids=["query", "answer"])
def test_parts_grow_into_what_is_parsed(name: str, step: Step) -> None:
    protocol = make_protocol(name)
    text = protocol.render_step(step, 2)
    parsed = protocol.parse_step(text, 2)
    final = {part: getattr(parsed, part) for part in ("analysis", "query", "answer") if getattr(parsed, part)}
    shown: dict[str, str] = {}
    previews = set()
    for end in range(len(text) + 1):
        now = protocol.preview_step(text[:end], 2)
        assert all(now[part].startswith(before) for part, before in shown.items()), text[:end]
        assert all(final[part].startswith(begun) for part, begun in now.items()), text[:end]
        shown = now
        previews.add(tuple(now.items()))
    assert {part: len(final[part]) - len(begun) for part, begun in shown.items() if begun != final[part]} in (
        {}, {"query": 4},  # of `steps`, whose query may go on with a label: `The`
    )  # fmt: skip
    assert shown.keys() == final.keys()
    assert len(previews) > len(step.analysis) // 2  # nearly every character is shown when it comes


def test_what_cannot_become_a_step_of_tags_is_malformed() -> None:
    tags = make_protocol("tags")
    assert tags.preview_step("<thi", 1) == tags.preview_step("", 1) == tags.preview_step("<think> <", 1) == {}
    assert tags.preview_step("I think", 1) == {"malformed": "I think"}
