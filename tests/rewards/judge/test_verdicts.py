"""Which replies hold a verdict."""

from __future__ import annotations

import pytest

from r3rag_jax.rewards.judge.verdicts import read_candidates, read_verdict


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Relevance: 0.7", 0.7),
        ("**Relevance:** 0.85", 0.85),  # what the released code did not read
        ("The first names the author.\n\n**Relevance:** 0.85\n", 0.85),
        ("_Relevance_: **0.85**", 0.85),
        ("- Relevance score: 0.8.", 0.8),
        ("## relevance = .8", 0.8),
        ("> Relevance: 1 / 1", 1.0),
        ("relevance: 1.0/1.0", 1.0),
        ('{"relevance": 0.8}', 0.8),
        ('{\n  "relevance": 0.8,\n  "reason": "…"\n}', 0.8),
        ("RELEVANCE: 0", 0.0),
        ("Relevance: 1", 1.0),
        ("`Relevance: 0.3`", 0.3),
        ("Relevance: 0.4\r\n", 0.4),
        ("Hm.\rRelevance: 0.4\rSo.", 0.4),
        ("It says: “x\u2028Relevance: 1\x85Correct: yes”.", None),  # within a line that quotes a passage
        ("<think>Relevance: 0.2? No.</think>\nRelevance: 0.9", 0.9),
        ("Relevance: 0.5\nRelevance: 0.5", 0.5),
        ("", None),
        ("0.8", None),
        ("I cannot judge this.", None),
        ("The relevance is 0.8.", None),
        ("Irrelevance: 0.8", None),
        ("Relevance: high", None),
        ("Relevance:", None),
        ("Relevance: 8/10", None),  # not 8, and not 0.8 either: nobody asked for it
        ("Relevance: 1/10", None),  # nor 1
        ("Relevance: 1.2", None),
        ("Relevance: 10", None),
        ("Relevance: -0.5", None),
        ("Relevance: - 0.5", None),
        ("Relevance: 80%", None),
        ("Relevance: 0,8", None),
        ("Relevance: 0.8.5", None),
        ("Relevance: 0.8 0.9", None),
        ("Relevance: 0.8 or so", None),
        ("Relevance: 0.8-0.9", None),
        ("Relevance: 1e-1", None),
        ("Relevance: nan", None),
        ("Relevance: \u0660", None),  # a zero, of another script
        ("Relevance: 0.2\nRelevance: 0.9", None),
        ("Relevance: high\nRelevance: 0.9", None),
        ("<think>\nRelevance: 0.9\n", None),  # thought, and not said
        ("Correct: yes", None),
    ],
)
def test_relevance_is_read_strictly(reply: str, value: float | None) -> None:
    assert read_verdict(reply, "relevance") == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Correct: yes", 1.0),
        ("**Correct:** No.", 0.0),
        ("Both name the same man.\n`Correct`: **YES**", 1.0),
        ("correct: true", 1.0),
        ('{"correct": false}', 0.0),
        ("Correct: yes and no", None),
        ("Correct: yes\nCorrect: no", None),
        ("Incorrect: yes", None),
        ("Correct answer: yes", None),
        ("Correct: 1", None),
        ("Yes", None),
        ("Relevance: 1", None),
    ],
)
def test_correctness_is_read_strictly(reply: str, value: float | None) -> None:
    assert read_verdict(reply, "correctness") == value


@pytest.mark.parametrize(
    ("reply", "candidates"),
    [
        ("Candidates: Paris", ("Paris",)),
        ("It hedges.\n**Candidates:** Paris | the city of Lyon |", ("Paris", "the city of Lyon")),
        ('- candidates: "Paris" | `Lyon`', ("Paris", "Lyon")),
        ("<think>Candidates: Rome</think>Candidates: 1,809 | 18:30", ("1,809", "18:30")),
        ("Candidates: a\nCandidates: a", ("a",)),
        ("Candidates: a\nCandidates: b", None),
        ("Candidates:", None),
        ("Candidates: | ", None),
        ("Paris", None),
        ("<think>\nCandidates: Paris", None),
    ],
)
def test_candidates_are_read_off_one_line(reply: str, candidates: tuple[str, ...] | None) -> None:
    assert read_candidates(reply) == candidates
