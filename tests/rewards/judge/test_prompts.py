"""The prompts of a judge: templates of ones own, and the built-in ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from judging import QUESTION, open_at

from r3rag_jax.errors import UserError
from r3rag_jax.rewards.judge.prompts import FIELDS, REQUIRED, Prompts
from r3rag_jax.types import Passage, Step


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text('{question} {"a": {query}}\n{passages}|{golds}')
    judge = open_at("http://x", tmp_path / "j", relevance_prompt=str(file))
    passages = Passage("a", "{query} {question}"), Passage("b", '"B"\nsecond')
    inquiry = judge.relevance(QUESTION, Step("hm", query="{passages}?", passages=passages))
    assert inquiry.prompt == 'Who wrote Origin? {"a": {passages}?}\n{query} {question}\n\n"B"\nsecond|{golds}'
    inquiry = judge.correctness(QUESTION, "{golds}")
    assert "Accepted answers: Charles Darwin / Darwin\nAnswer to judge: {golds}\n" in inquiry.prompt
    file.write_text("How relevant is {query}?")
    with pytest.raises(UserError, match=r"judge\.relevance_prompt must hold \{passages\}; .*mine\.txt does not"):
        open_at("http://x", tmp_path / "j", relevance_prompt=str(file))
    with pytest.raises(UserError, match=r"judge\.correctness_prompt must be a text file; nowhere\.txt cannot be read"):
        open_at("http://x", tmp_path / "j", correctness_prompt="nowhere.txt")


def test_the_built_in_prompts_show_all_there_is() -> None:
    for kind, fields in FIELDS.items():
        assert set(re.findall(r"\{(\w+)\}", getattr(Prompts(), kind))) == set(fields) >= set(REQUIRED[kind])
