"""Metrics: typed-out numbers, and independent implementations on generated cases."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import string
from typing import Any

import numpy as np
import pytest
from attempts import BORN, DARWIN, attempt, attempts, question

from r3rag_jax.evaluation.answer_texts import hotpot_overlap
from r3rag_jax.evaluation.metrics import (
    METRICS,
    RATIOS,
    definitions,
    measure_each,
    metric_of,
    of_questions,
    summary,
)
from r3rag_jax.types import Passage, Sample, Status, Trajectory

# ------------------------------------------------------------------------------------------ rows


def row_of(trajectories: list[Trajectory], **judged: np.ndarray) -> dict[str, Any]:
    return summary(measure_each(trajectories, recall_k=(1,), judged=judged))


def test_a_row_is_arithmetic() -> None:
    assert row_of(attempts()) == {
        "num": 4,
        "em": 50.0,
        "f1": pytest.approx(100 * (1 + 1 + 2 / 3 + 0) / 4),
        "cover_em": 75.0,
        "f1_hotpot": pytest.approx(100 * (1 + 1 + 2 / 3 + 0) / 4),
        "precision": pytest.approx(100 * (1 + 1 + 1 / 2 + 0) / 4),
        "recall": pytest.approx(100 * (1 + 1 + 1 + 0) / 4),
        "sub_em": 75.0,
        "retrievals": 0.75,
        "steps": 1.75,
        "support_found": 75.0,  # 1/2 and 1/1, of the two questions that say
        "output_tokens": pytest.approx((10 + 20 + 10 + 33) / 4),
        "input_tokens": 200.0,
        "no_answer": 25.0,
        "context_full": 0.0,
        "answer_recall@1": 25.0,  # "Darwin" is in a passage of the third; "Shrewsbury" in none of the first
        "tokens_per_correct": pytest.approx((10 + 20 + 10 + 33) / 2),
        "input_tokens_per_correct": 400.0,
    }


def test_full_contexts_are_counted_among_those_without_an_answer() -> None:
    full = dataclasses.replace(attempts()[3], status=Status.CONTEXT_FULL)
    row = row_of([*attempts(), full, full, *attempts()[:2]])
    assert (row["context_full"], row["no_answer"]) == (25.0, 37.5)


def test_what_nothing_is_known_of_is_none() -> None:
    unknown = dataclasses.replace(attempt(question("4", "1809"), "1859"), num_input_tokens=None)
    row = row_of([unknown])
    assert [row[name] for name in ("tokens_per_correct", "input_tokens", "support_found")] == [None] * 3
    assert (row["em"], row["retrievals"], row["no_answer"]) == (0.0, 0.0, 0.0)
    row = row_of([unknown, attempts()[1]])
    assert row["input_tokens"] == 200.0 and row["input_tokens_per_correct"] is None


def test_tokens_are_counted_in_the_samples_where_no_number_is_given() -> None:
    mask = np.array([False, True, True])
    sample = Sample(np.arange(3, dtype=np.int32), mask, np.zeros(3, np.float32), np.where(mask, 0, -1).astype(np.int32))
    trajectory = dataclasses.replace(attempt(question("2", "x"), "x"), num_tokens=None, samples=(sample, sample))
    assert row_of([trajectory])["tokens_per_correct"] == 4.0


def test_judged_accuracy_is_of_what_was_judged() -> None:
    row = row_of(attempts(), acc=np.asarray([1, 1, np.nan, 0], np.float32))
    assert row.pop("tokens_per_acc") is None  # of an unknown number
    assert row_of(attempts(), acc=np.asarray([1, 1, 1, 0]))["tokens_per_acc"] == pytest.approx(73 / 3)
    assert (row.pop("acc"), row.pop("judge_failures")) == (pytest.approx(200 / 3), 1)
    assert row == row_of(attempts())
    assert row_of(attempts()[:1], acc=np.asarray([np.nan], np.float32))["acc"] is None


def test_a_question_has_the_mean_of_its_samples() -> None:
    values = {"em": np.asarray([1.0, 0.0, 1.0, 1.0]), "support_found": np.asarray([np.nan, np.nan, np.nan, 0.5])}
    assert {name: list(map(str, v)) for name, v in of_questions(values, 2).items()} == {
        "em": ["0.5", "1.0"], "support_found": ["nan", "0.5"],
    }  # fmt: skip


def test_every_number_of_a_row_has_a_definition() -> None:
    row = row_of(attempts(), acc=np.ones(4), candidate_em=np.ones(4))
    for name in row.keys() - {"num", "judge_failures"}:
        metric = metric_of(name)
        assert metric.definition and metric.source and metric.title
    assert {*METRICS, *RATIOS} < row.keys()
    with pytest.raises(KeyError):
        metric_of("bleu")
    assert definitions((2, 5))["answer_recall@5"] == 1 and "acc" not in definitions(())
    assert "acc" in definitions((), ["acc"])


# --------------------------------------------------- independent implementations, one pair at a time


def plain(text: str) -> str:
    """Normal form of SQuAD, character by character."""
    kept = "".join(" " if character.isspace() else character for character in text.lower())
    kept = "".join(character for character in kept if character not in string.punctuation)
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def shared_words(one: str, other: str) -> int:
    left, count = plain(other).split(), 0
    for word in plain(one).split():
        if word in left:
            left.remove(word)
            count += 1
    return count


def plain_overlap(prediction: str, gold: str) -> tuple[float, float, float]:
    pair = plain(prediction), plain(gold)
    if pair[0] != pair[1] and {"yes", "no", "noanswer"} & {*pair}:
        return 0.0, 0.0, 0.0
    shared = shared_words(prediction, gold)
    lengths = [len(text.split()) for text in pair]
    if not shared:
        return 0.0, 0.0, 0.0
    return 2 * shared / sum(lengths), shared / lengths[0], shared / lengths[1]


def plain_values(prediction: str | None, golds: tuple[str, ...], passages: list[str], k: int) -> dict[str, float]:
    """All metrics of texts, from their definitions."""
    found = dict.fromkeys(("em", "f1", "cover_em", "f1_hotpot", "precision", "recall", "sub_em"), 0.0)
    for gold in golds if prediction is not None else ():
        given, wanted = plain(prediction or ""), plain(gold)
        words, total = shared_words(given, wanted), len(given.split()) + len(wanted.split())
        f1 = 1.0 if not total else 2 * words / total
        cover = re.search(rf"(^| ){re.escape(wanted)}( |$)", given) is not None if wanted else not given
        overlap = plain_overlap(prediction or "", gold)
        scores = (given == wanted, f1, cover, *overlap, given.find(wanted) >= 0)
        found = {name: max(old, float(new)) for (name, old), new in zip(found.items(), scores, strict=True)}
    texts = [plain(passage) for passage in passages[:k]]
    found[f"answer_recall@{k}"] = float(any(text.count(plain(gold)) for text in texts for gold in golds))
    return found


WORDS = (
    "yes no noanswer both the a an The A. us russia Russia Paris paris, São Sao 北京 北京市 東京 1809 18 8 to be or "
    "not U.S. u.s isn't isnt the-end … — café cafe\u0301 Ⅷ"
).split()  # fmt: skip


def generated(seed: int) -> tuple[str | None, tuple[str, ...], list[str], int]:
    rng = random.Random(seed)

    def text(most: int) -> str:
        joint = rng.choice([" ", " ", "  ", "\t", "\n", "-"])
        return joint.join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))

    golds = tuple(text(3) for _ in range(rng.randint(1, 3)))
    prediction = rng.choice([None, text(4), text(4), text(6), rng.choice(golds), f"{text(2)} {rng.choice(golds)}"])
    return prediction, golds, [text(12) for _ in range(rng.randint(0, 4))], rng.randint(1, 3)


def test_each_metric_equals_an_independent_implementation() -> None:
    cases = [generated(seed) for seed in range(1000)]
    for k in (1, 2, 3):
        chosen = [case for case in cases if case[3] == k]
        trajectories = [
            attempt(question(str(i), *golds), prediction, *[Passage(str(i), text) for i, text in enumerate(passages)])
            for i, (prediction, golds, passages, _) in enumerate(chosen)
        ]
        # One search that shows all passages, so that k counts.
        trajectories = [in_one_search(trajectory) for trajectory in trajectories]
        measured = measure_each(trajectories, recall_k=(k,))
        for i, case in enumerate(chosen):
            for name, value in plain_values(*case).items():
                assert measured[name][i] == pytest.approx(value, abs=1e-6), (name, case)
    shares = [np.mean([plain_values(*case)[name] > 0 for case in cases]) for name in ("em", "f1", "cover_em", "sub_em")]
    assert all(0.1 < share < 0.9 for share in shares)  # the cases tell something


def in_one_search(trajectory: Trajectory) -> Trajectory:
    passages = tuple(passage for step in trajectory.steps for passage in step.passages)
    if not passages:
        return trajectory
    first = dataclasses.replace(trajectory.steps[0], passages=passages)
    return dataclasses.replace(trajectory, steps=(first, trajectory.steps[-1]))


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("yes", "yes, both", {"em": 0, "f1": 2 / 3, "cover_em": 0, "f1_hotpot": 0, "precision": 0, "sub_em": 0}),
        ("Yes, both", "yes", {"em": 0, "f1": 2 / 3, "cover_em": 1, "f1_hotpot": 0, "recall": 0, "sub_em": 1}),
        ("yes", "Yes.", {"em": 1, "f1": 1, "cover_em": 1, "f1_hotpot": 1, "precision": 1, "recall": 1, "sub_em": 1}),
        ("Russia", "US", {"em": 0, "f1": 0, "cover_em": 0, "f1_hotpot": 0, "sub_em": 1}),
        ("north Korea", "Korea, no", {"em": 0, "f1": 1 / 2, "cover_em": 0, "f1_hotpot": 1 / 2, "sub_em": 0}),
        ("不是北京市", "北京", {"em": 0, "f1": 0, "cover_em": 0, "f1_hotpot": 0, "sub_em": 1}),
        ("北京", "北京。", {"em": 0, "f1": 0, "sub_em": 0}),  # only ASCII punctuation is dropped
        ("Sao Paulo", "São Paulo", {"em": 0, "f1": 1 / 2, "cover_em": 0, "f1_hotpot": 1 / 2, "sub_em": 0}),
        ("The Beatles", "a Beatles", {"em": 1, "f1": 1, "cover_em": 1, "f1_hotpot": 1, "sub_em": 1}),
        ("the", "The", {"em": 1, "f1": 1, "cover_em": 1, "f1_hotpot": 0, "recall": 0, "sub_em": 1}),
        ("Paris", "The", {"em": 0, "f1": 0, "cover_em": 0, "f1_hotpot": 0, "sub_em": 1}),
        ("in 1809 or 1810", "1809", {"em": 0, "f1": 2 / 5, "cover_em": 1, "precision": 1 / 4, "recall": 1}),
        (None, "1809", {"em": 0, "f1": 0, "cover_em": 0, "f1_hotpot": 0, "precision": 0, "recall": 0, "sub_em": 0}),
    ],
)  # fmt: skip
def test_where_definitions_part(prediction: str | None, gold: str, expected: dict[str, float]) -> None:
    measured = measure_each([attempt(question("1", gold), prediction)])
    assert {name: pytest.approx(measured[name][0], abs=1e-6) for name in expected} == expected


def test_precision_and_recall_may_be_of_different_gold_answers() -> None:
    assert hotpot_overlap("Paris in France", ["Paris", "in sunny Paris in France today"]) == (
        pytest.approx(2 / 3), 1.0, 1.0,
    )  # fmt: skip


def test_an_answer_is_looked_for_in_the_first_k_of_every_search() -> None:
    steps = attempt(question("1", "Shrewsbury"), "x", DARWIN, DARWIN).steps
    both = dataclasses.replace(steps[1], passages=(DARWIN, BORN))  # the second search finds it second
    trajectory = Trajectory(question("1", "Shrewsbury"), (steps[0], both, steps[2]), Status.ANSWERED, num_tokens=1)
    values = measure_each([trajectory], recall_k=(1, 2))
    assert (values["answer_recall@1"][0], values["answer_recall@2"][0]) == (0.0, 1.0)
    assert list(itertools.islice(values, 2)) == ["em", "f1"]
