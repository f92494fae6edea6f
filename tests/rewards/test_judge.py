"""Judges over a real HTTP server and on our own engine: what counts as a verdict, and every way to fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_run
from flax import nnx
from openai_server import MODEL, Reply, RunningServer, chat, serve
from rich.console import Console

from r3rag_jax import evaluate, train
from r3rag_jax.components import Components
from r3rag_jax.config import EndpointConfig, JudgeConfig, LocalJudgeConfig, MeshConfig, RewardConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.hf.decoder_files import save_decoder
from r3rag_jax.parallel import processes
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.judge.factory import judge_memory, local_chat, open_judge
from r3rag_jax.rewards.judge.judge import FIELDS, Judge, Judgements, read_verdict
from r3rag_jax.rewards.scorer import Scorer, accuracy, learnable
from r3rag_jax.rewards.shaping import shape_rewards
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

Speak = Callable[[dict[str, Any]], Reply]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# ------------------------------------------------------------------------------------------ replies


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


# ----------------------------------------------------------------------------------------- a server

QUESTION = Question("q", "Who wrote Origin?", ("Charles Darwin", "Darwin"))


def asking(judge: Judge, number: int) -> Any:
    """The inquiry with this number in it."""
    return judge.relevance(QUESTION, Step("hm", query=f"number {number}.", passages=(Passage("a", "Darwin"),)))


def number_of(body: dict[str, Any]) -> int:
    found = re.search(r"number (\d+)\.", body["messages"][0]["content"])
    assert found is not None
    return int(found[1])


def tenths(body: dict[str, Any]) -> Reply:
    """A judge that finds number n relevant to n tenths; to those of its last digit."""
    return 200, chat(f"Because.\n**Relevance:** {number_of(body) % 10 / 10}")


def open_at(url: str, path: Path, **settings: Any) -> Judge:
    """`settings` are keys of `judge` or of `judge.endpoint`."""
    endpoint = {"url": url, "model": "m", "retries": 2}
    endpoint |= {name: settings.pop(name) for name in list(settings) if name in EndpointConfig.model_fields}
    config = JudgeConfig(endpoint=EndpointConfig(**endpoint), **settings)
    return open_judge(config, make_mesh(MeshConfig()), path, first_wait_s=0.001)


def ask(reply: Speak, path: Path, numbers: Sequence[int] = range(10), **settings: Any) -> tuple[Any, Any]:
    with serve(reply) as endpoint:
        judge = open_at(endpoint.url, path, **settings)
        return judge.ask([asking(judge, number) for number in numbers]), endpoint


def test_a_round_over_http(tmp_path: Path) -> None:
    verdicts, endpoint = ask(tenths, tmp_path / "j.jsonl", [3, 7, 3], model="", max_tokens=99)
    np.testing.assert_allclose(verdicts.values, [0.3, 0.7, 0.3])
    assert verdicts.values.dtype == np.float32
    assert (verdicts.num, verdicts.num_known, verdicts.num_failed) == (2, 0, 0)
    assert len(endpoint.bodies) == 2  # the same is asked once
    for body in endpoint.bodies:
        [message] = body.pop("messages")
        assert message["role"] == "user" and "Who wrote Origin?" in message["content"]
        assert "Darwin" in message["content"] and "{" not in message["content"]
        assert body == {"model": MODEL, "temperature": 0.0, "max_tokens": 99}


def test_requests_are_in_flight_together(tmp_path: Path) -> None:
    together = threading.Barrier(4)  # breaks, and fails the test, unless four wait at once

    def reply(body: dict[str, Any]) -> Reply:
        together.wait(timeout=20)
        return tenths(body)

    verdicts, endpoint = ask(reply, tmp_path / "j.jsonl", range(8), max_in_flight=4)
    np.testing.assert_allclose(verdicts.values, np.arange(8) / 10)
    assert endpoint.most_busy == 4


def test_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "j.jsonl"
    ask(tenths, path, [1, 2])
    verdicts, endpoint = ask(tenths, path, [1, 2, 3])
    np.testing.assert_allclose(verdicts.values, [0.1, 0.2, 0.3])
    assert [number_of(body) for body in endpoint.bodies] == [3]
    assert (verdicts.num, verdicts.num_known) == (3, 2)
    assert verdicts.metrics == {"judge_failure_rate": 0.0, "judge_known_rate": 2 / 3}
    with serve(tenths) as away:
        pass  # nobody listens there
    judge = open_at(away.url, path, retries=0)
    np.testing.assert_allclose(judge.ask([asking(judge, n) for n in (3, 1)]).values, [0.3, 0.1])
    with serve(tenths) as endpoint:
        judge = open_at(endpoint.url, path)
        for known in (0, 1):  # a judge also remembers what it has just said
            assert judge.ask([asking(judge, 4)]).num_known == known
    assert len(endpoint.bodies) == 1
    verdicts, endpoint = ask(tenths, path, [1], model="another")
    assert len(endpoint.bodies) == 1  # another model says something else
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sorted(row) for row in rows] == [["key", "reply", "score"]] * 5


def test_a_file_of_judgements_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    ask(tenths, path, [1, 2])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-20])  # killed while it wrote
    left = set(Judgements(path)._scores.values())
    verdicts, endpoint = ask(tenths, path, [1, 2])
    np.testing.assert_allclose(verdicts.values, [0.1, 0.2])
    assert len(endpoint.bodies) == 1 and len(left) == 1
    verdicts, endpoint = ask(tenths, path, [1, 2])
    assert len(endpoint.bodies) == 0  # the new line stands behind the half one, not in it


def test_half_a_character_in_a_reply_is_no_reason_to_end_a_run(tmp_path: Path) -> None:
    for _ in range(2):
        verdicts, endpoint = ask(lambda _: (200, chat("\ud83d\nRelevance: 0.5")), tmp_path / "j", [1])
        assert verdicts.values == np.float32(0.5)
    assert len(endpoint.bodies) == 0


def test_a_wrong_score_in_the_file_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    ask(tenths, path, [1])
    row = json.loads(path.read_text())
    for score_ in (7, -0.1, "0.5", None, True):
        path.write_text(json.dumps(row | {"score": score_}) + "\n[]\n")
        verdicts, endpoint = ask(tenths, path, [1])
        assert len(endpoint.bodies) == 1 and verdicts.values == np.float32(0.1)


def test_a_folder_is_no_file_of_judgements(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.cache: .* cannot be read: Is a directory"):
        open_at("http://127.0.0.1:1", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"judge\.cache: .* cannot be written: Not a directory|File exists"):
        ask(tenths, tmp_path / "file" / "j.jsonl", [1])


def test_the_key_is_sent_and_never_kept_or_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.jsonl"
    with pytest.raises(UserError, match=r"judge\.endpoint\.key_env names the .* variable MY_KEY: it is not set"):
        ask(tenths, path, [1], key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret-1")
    _, endpoint = ask(tenths, path, [1], key_env="MY_KEY")
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer secret-1"}
    with pytest.raises(UserError) as caught:
        ask(lambda _: (401, {"error": "no such key: secret-1"}), path, [2], key_env="MY_KEY")
    assert "answered 401" in str(caught.value) and "judge.endpoint.key_env names the variable" in str(caught.value)
    assert "secret" not in str(caught.value) + path.read_text()


# ------------------------------------------------------------------------------------------- faults


def failing(times: int, status: int) -> Speak:
    left = iter(range(times))
    return lambda body: (status, {"error": "busy"}) if next(left, None) is not None else tenths(body)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_judge_is_asked_again(status: int, tmp_path: Path) -> None:
    with serve(failing(2, status)) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j", max_in_flight=1)
        verdicts = judge.ask([asking(judge, 4)])
    assert verdicts.values == np.float32(0.4) and verdicts.num_failed == 0
    assert len(endpoint.bodies) == 3


def test_requests_per_minute_are_those_of_the_configuration(tmp_path: Path) -> None:
    started = time.monotonic()
    verdicts, _ = ask(tenths, tmp_path / "j", range(4), requests_per_minute=300)
    assert verdicts.num_failed == 0 and time.monotonic() - started > 3 * 60 / 300


def test_a_judge_that_is_down_ends_the_run_with_its_name_after_the_retries(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ask(lambda _: (503, b"loading"), tmp_path / "j", range(100), max_in_flight=1)
    assert re.search(
        r"the judge m at http://127\.0\.0\.1:\d+/v1 failed in 2[12] of 100 judgements, more than judge\."
        r"max_failure_share=0\.2 allows; .*/j keeps the others; the first failure: judge\.endpoint\.url: http://127\.0\.0\.1:"
        r"\d+/v1/chat/completions failed, attempt 3 of 3: 503 loading",
        str(caught.value),
    ), caught.value


def test_a_judge_that_is_down_is_not_asked_for_hours(tmp_path: Path) -> None:
    """One call has all its retries; each other one has one attempt, and those that cannot change anything none."""
    with serve(lambda _: (503, b"")) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j", max_in_flight=1, retries=3)
        with pytest.raises(UserError):
            judge.ask([asking(judge, n) for n in range(10)])
        assert 4 + 4 <= len(endpoint.bodies) <= 4 + 5  # five failures end a round of ten; one more may be in flight
        endpoint.bodies.clear()
        with pytest.raises(UserError, match="attempt 4 of 4"):
            judge.ask([asking(judge, 0)])
        assert len(endpoint.bodies) == 4  # a new round begins anew, and one failure of one is enough: nothing came


def test_nobody_listens(tmp_path: Path) -> None:
    with serve(tenths) as endpoint:
        pass
    judge = open_at(endpoint.url, tmp_path / "j", model="", retries=1)
    words = rf"judge\.endpoint\.url: {endpoint.url}/models failed, attempt 2 of 2: .*refused"
    with pytest.raises(UserError, match=words):
        judge.ask([asking(judge, 1)])


def test_a_slow_judge_has_failed_where_it_is_late(tmp_path: Path) -> None:
    is_over = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        if number_of(body) == 3:
            is_over.wait(20)
        return tenths(body)

    with serve(reply) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j", retries=0, timeout_s=2.0)
        verdicts = judge.ask([asking(judge, n) for n in range(8)])
        is_over.set()
    assert np.flatnonzero(np.isnan(verdicts.values)).tolist() == [3]
    assert verdicts.num_failed == 1
    failures = [
        row["failure"] for line in (tmp_path / "j").read_text().splitlines() if "failure" in (row := json.loads(line))
    ]
    assert len(failures) == 1 and "timed out" in failures[0]


NONSENSE: tuple[Any, ...] = (
    chat("I would rather not say."),
    chat("Relevance: 7"),
    chat("Relevance: 0.9", "length"),  # of 0.95, for all one knows
    chat(None),
    chat(["Relevance: 0.9"]),
    {"choices": []},
    {"choices": ["Relevance: 0.9"]},
    {"error": "Relevance: 0.9"},
    [],
    b"<html>Relevance: 0.9</html>",
)


@pytest.mark.parametrize("place", range(len(NONSENSE)))
def test_nonsense_has_failed_and_earns_nothing(place: int, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return (200, NONSENSE[place]) if number_of(body) == 2 else tenths(body)

    verdicts, endpoint = ask(reply, tmp_path / "j", range(6))
    assert np.isnan(verdicts.values).tolist() == [False, False, True, False, False, False]
    assert verdicts.metrics["judge_failure_rate"] == pytest.approx(1 / 6)
    assert len(endpoint.bodies) == 6  # greedy: asked again it would say the same
    verdicts, endpoint = ask(tenths, tmp_path / "j", range(6))
    assert [number_of(body) for body in endpoint.bodies] == [2]  # a failure is no judgement
    assert not np.isnan(verdicts.values).any()


def test_a_judge_of_nonsense_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ask(lambda _: (200, NONSENSE[0]), tmp_path / "j", range(30))
    assert "http://127.0.0.1" in str(caught.value)
    assert "must reply with one line like 'Relevance: 0.7'; got 'I would rather not say.'" in str(caught.value)


@pytest.mark.parametrize(("num_failing", "ends"), [(10, False), (11, True)])
def test_half_of_the_judgements_fail(num_failing: int, ends: bool, tmp_path: Path) -> None:
    """Up to max_failure_share they are left out, beyond it the run ends; what was judged is kept either way."""

    def reply(body: dict[str, Any]) -> Reply:
        return (500, b"") if number_of(body) < num_failing else tenths(body)

    path = tmp_path / "j"
    settings = {"max_failure_share": 0.5, "retries": 0, "max_in_flight": 1}
    if ends:
        with pytest.raises(UserError, match=r"failed in 11 of 20 judgements, more than judge\.max_failure_share=0\.5"):
            ask(reply, path, range(19, -1, -1), **settings)  # the good ones first
    else:
        verdicts, _ = ask(reply, path, range(19, -1, -1), **settings)
        assert np.isnan(verdicts.values[::-1]).tolist() == [True] * 10 + [False] * 10
    _, endpoint = ask(lambda body: (200, chat("Relevance: 1")), path, range(20), **settings)
    assert sorted(number_of(body) for body in endpoint.bodies) == list(range(num_failing))


def test_of_few_judgements_one_may_fail(tmp_path: Path) -> None:
    """Late in a run nearly all is known: a single odd reply is a large share of nothing."""
    verdicts, _ = ask(lambda body: (200, NONSENSE[0]), tmp_path / "j", [1])
    assert np.isnan(verdicts.values).all() and verdicts.metrics["judge_failure_rate"] == 1


def test_process_0_asks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[np.ndarray] = []

    def broadcast(told: np.ndarray) -> np.ndarray:
        sent.append(told)
        return sent[0]

    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def values() -> np.ndarray:
        return np.asarray([0.25, np.nan], np.float32)

    def never() -> np.ndarray:
        raise AssertionError("only process 0 computes")

    def breaks() -> np.ndarray:
        raise UserError("down")

    for process, compute in ((0, values), (1, never)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        np.testing.assert_array_equal(processes.from_process_0(compute, 2), values())
    sent.clear()
    for process, compute, error in ((0, breaks, "down"), (1, never, "process 0 has failed")):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with pytest.raises(UserError, match=error):
            processes.from_process_0(compute, 2)


# ------------------------------------------------------------------------------------------ prompts


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


def test_our_prompts_show_all_there_is(tmp_path: Path) -> None:
    judge = open_at("http://x", tmp_path / "j")
    for kind, fields in FIELDS.items():
        assert set(re.findall(r"\{(\w+)\}", judge._prompts[kind])) == set(fields)


# ------------------------------------------------------------------------------- rewards of a judge

FOUND = Passage("a", "Origin is by Darwin."), Passage("b", "Origin is a book.")


def attempt(answer: str | None, *queries: str, status: Status = Status.ANSWERED) -> Trajectory:
    steps = [Step("hm", query=query, passages=FOUND[i % 2 :]) for i, query in enumerate(queries)]
    steps += [] if answer is None else [Step("so", answer=answer)]
    return Trajectory(QUESTION, tuple(steps), status)


ATTEMPTS = [
    attempt("darwin", "author 0.5", "author 1"),  # an exact match: nobody is asked
    attempt("The naturalist Darwin", "author 0.5"),  # right, says the judge
    attempt("Wallace", "author 1"),  # wrong, says the judge
    attempt(None, "author 0.5", "author 0.3", status=Status.NO_ANSWER),
    Trajectory(QUESTION, (Step("?", is_well_formed=False),), Status.FORMAT_ERROR),
    Trajectory(QUESTION, (Step("hm", query="nothing found"), Step("so", answer="Darwin")), Status.ANSWERED),
    attempt("Wallace", "author 0.6"),
]
BY_JUDGE = RewardConfig(process="judge", outcome="judge")


def graded(*nonsense_on: str) -> Speak:
    """Reads the relevance off the query and knows Darwin; talks nonsense on prompts with one of the words."""

    def reply(body: dict[str, Any]) -> Reply:
        prompt = body["messages"][0]["content"]
        if any(word in prompt for word in nonsense_on):
            return 200, chat("Hm.")
        if "Search query" in prompt:
            found = re.search(r"author ([0-9.]+)\n", prompt)
            assert found is not None  # a step that brought nothing is not asked about
            return 200, chat(f"Relevance: {found[1]}")
        return 200, chat(f"Correct: {'yes' if 'naturalist' in prompt else 'no'}")

    return reply


def rewarded(tmp_path: Path, reply: Speak, config: RewardConfig = BY_JUDGE) -> tuple[Any, RunningServer]:
    with serve(reply) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j")
        return Scorer(config, Resources(4, judge=judge)).score(ATTEMPTS), endpoint


def test_rewards_of_a_judge_typed_out(tmp_path: Path) -> None:
    scores, endpoint = rewarded(tmp_path, graded())
    expected = [[0.8, 1.6, 2.0], [0.8, 2.0], [0.8, 0.0], [0.4, -0.5], [-1.0], [0.0, 2.0], [0.48, 0.0]]
    for rewards_T, row in zip(scores.rewards, expected, strict=True):
        np.testing.assert_allclose(rewards_T, row, rtol=1e-6)
    np.testing.assert_array_equal(scores.answers["acc"], [1, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(scores.answers["em"], [1, 0, 0, 0, 0, 1, 0])
    assert scores.is_valid.all()
    # Queries "0.5" twice with the same passages, "Wallace" twice: the same inquiry each.
    assert len(endpoint.bodies) == scores.verdicts.num == 5 + 2
    total = sum(scores.parts.values())
    np.testing.assert_allclose(total, [r.sum() for r in scores.rewards], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["outcome"], [2, 2, 0, 0, 0, 2, 0])
    np.testing.assert_allclose(scores.parts["process"], [2.4, 0.8, 0.8, 0.4, 0, 0, 0.48], rtol=1e-6)
    np.testing.assert_allclose(scores.parts["format"], [0, 0, 0, 0, -1, 0, 0])
    np.testing.assert_allclose(scores.parts["no_answer"], [0, 0, 0, -0.5, 0, 0, 0])


def test_weights_and_parts_without_the_judge(tmp_path: Path) -> None:
    half = RewardConfig(process="judge", outcome="judge", process_weight=0.5, compat="paper")
    scores, _ = rewarded(tmp_path, graded(), half)
    np.testing.assert_allclose(scores.parts["process"][:4], [1.2, 0.4, 0.4, 0.45 * (0.5 + 0.3)], rtol=1e-6)
    assert not scores.parts["no_answer"].any()
    outcome_only = RewardConfig(process="judge", outcome="judge", use_process=False)
    scores, endpoint = rewarded(tmp_path / "outcome", graded(), outcome_only)
    assert len(endpoint.bodies) == 2  # no relevance is asked for that nothing depends on
    process_only = RewardConfig(process="judge", outcome="judge", use_outcome=False)
    scores, endpoint = rewarded(tmp_path / "process", graded(), process_only)
    assert len(endpoint.bodies) == 5 and "acc" not in scores.answers
    with pytest.raises(ValueError, match="needs a judge; got none"):
        Scorer(BY_JUDGE, Resources(4)).score(ATTEMPTS)


def test_a_failed_judgement_leaves_out_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    scores, _ = rewarded(tmp_path, graded("author 0.3", "author 0.6"))
    # The search of the last step without an answer earns the penalty, whatever it brought.
    assert scores.is_valid.tolist() == [True, True, True, True, True, True, False]
    assert np.isnan(scores.rewards[6]).tolist() == [True, False]
    kept, scores = learnable(ATTEMPTS, scores)
    assert kept == ATTEMPTS[:6] and scores.is_valid.all() and len(scores.answers["acc"]) == len(scores.process) == 6
    np.testing.assert_allclose(scores.rewards[0], [0.8, 1.6, 2.0], rtol=1e-6)

    scores, _ = rewarded(tmp_path / "outcome", graded("to judge: Wallace"))
    assert scores.is_valid.tolist() == [True, True, False, True, True, True, False]
    assert np.isnan(scores.rewards[2]).all()  # the trajectory's factor is unknown too
    assert np.isnan(scores.answers["acc"]).tolist() == [False, False, True, False, False, False, True]


def test_nothing_left_to_learn_from(tmp_path: Path) -> None:
    with serve(graded("author")) as endpoint:
        judge = open_at(endpoint.url, tmp_path / "j", max_failure_share=1.0)
        scores = Scorer(BY_JUDGE, Resources(4, judge=judge)).score(ATTEMPTS[:3])
    assert not scores.is_valid.any()
    with pytest.raises(UserError, match="failed in each of the 3 trajectories: there is nothing to learn from"):
        learnable(ATTEMPTS[:3], scores)


@pytest.mark.parametrize("compat", ["r3", "paper"])
@pytest.mark.parametrize("use_process", [True, False])
def test_unknown_is_unknown_wherever_it_counts(compat: Any, use_process: bool) -> None:
    """Both values that a failed judgement could have had: a reward is NaN exactly where they would differ.

    A relevance of 0 is left aside: it is scaled by the unknown factor to 0 all the same, and counts as unknown.
    """
    rng = np.random.default_rng(0)
    num, num_steps = 400, 4
    process = rng.integers(1, 11, (num, num_steps)).astype(np.float32) / 10
    correct = rng.integers(0, 2, num).astype(np.float32)
    status = rng.integers(0, 3, num)
    step_mask = np.arange(num_steps) < rng.integers(1, num_steps + 1, num)[:, None]
    malformed = rng.random((num, num_steps)) < 0.2
    is_failed, is_failed_answer = rng.random((num, num_steps)) < 0.3, rng.random(num) < 0.3

    def rewards(value: float) -> np.ndarray:
        shaped = shape_rewards(
            np.where(is_failed, value, process), np.where(is_failed_answer, value, correct), status, step_mask,
            malformed, compat=compat, use_process=use_process,
        )  # fmt: skip
        return np.asarray(shaped.rewards_BK)

    unknown, low, high = rewards(np.nan), rewards(0.0), rewards(1.0)
    assert 0.02 < np.isnan(unknown).mean() < 0.95
    np.testing.assert_array_equal(np.isnan(unknown), low != high)
    np.testing.assert_array_equal(unknown[low == high], low[low == high])


def test_judged_accuracy(tmp_path: Path) -> None:
    with serve(graded("Wallace")) as endpoint:
        acc, verdicts = accuracy(ATTEMPTS, open_at(endpoint.url, tmp_path / "j"))
    np.testing.assert_array_equal(acc, [1, 1, np.nan, 0, 0, 1, np.nan])
    assert verdicts.num == 2 == len(endpoint.bodies)


# ------------------------------------------------------------------------------------ a local judge

TEMPLATE = "{golds}?{answer}"
REPLIES = {("Ada", "Ada L"): "Correct: yes", ("Ada", "Bob"): "**Correct:** no", ("Bob", "Eve"): "Hm."}


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt three replies by heart."""
    path = tmp_path_factory.mktemp("judge")
    tokenizer, model = tiny.tokenizer(path), tiny.decoder()
    rows = []
    for (gold, answer), reply in REPLIES.items():
        prompt = TEMPLATE.replace("{golds}", gold).replace("{answer}", answer)
        before = tokenizer.chat([{"role": "user", "content": prompt}])
        rows.append((before, [*tokenizer.encode(reply), tokenizer.eos_id]))
    length = max(len(before) + len(after) for before, after in rows)
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for row, (before, after) in enumerate(rows):
        tokens[row, : len(before) + len(after)] = [*before, *after]
        mask[row, len(before) : len(before) + len(after)] = True
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    graphdef, params = nnx.split(model)
    tx = optax.adam(1e-2)

    def loss(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        logits = model.logits(model(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens)))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.sum(losses * mask[:, 1:]) / mask.sum()

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for _ in range(300):
        params, state, value = step(params, state)
        if value < 0.01:
            break
    assert value < 0.05
    save_decoder(nnx.merge(graphdef, params), path, dtype="float32")
    return path


def local_config(path: Path, tmp_path: Path, **settings: Any) -> JudgeConfig:
    (tmp_path / "prompt.txt").write_text(TEMPLATE)
    values = {"correctness_prompt": str(tmp_path / "prompt.txt"), "max_tokens": 24, "max_failure_share": 1.0}
    own = {name: settings.pop(name) for name in list(settings) if name in LocalJudgeConfig.model_fields}
    local = LocalJudgeConfig(**{"path": str(path), "slots": 8, "max_length": 128} | own)
    return JudgeConfig(kind="local", local=local, **values | settings)


def inquire(judge: Judge, gold: str, answer: str) -> Any:
    return judge.correctness(Question("q", "?", (gold,)), answer)


def test_a_local_judge(judge_dir: Path, tmp_path: Path) -> None:
    config, mesh = local_config(judge_dir, tmp_path), make_mesh(MeshConfig())
    judge = open_judge(config, mesh, tmp_path / "j")
    verdicts = judge.ask([inquire(judge, *pair) for pair in REPLIES] * 2)
    np.testing.assert_array_equal(verdicts.values, [1, 0, np.nan] * 2)
    rows = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert {row["reply"] for row in rows if "reply" in row} == {"Correct: yes", "**Correct:** no"}
    assert ["must reply with one line like 'Correct: yes'; got 'Hm.'" in row["failure"] for row in rows
            if "failure" in row] == [True]  # fmt: skip

    again = open_judge(config, mesh, tmp_path / "j")
    engine = again._chat._engine  # type: ignore[attr-defined]
    known = again.ask([inquire(again, *pair) for pair in list(REPLIES)[:2]])
    assert known.num_known == 2 and engine.num_sampled == 0
    short = open_judge(local_config(judge_dir, tmp_path, max_tokens=5), mesh, tmp_path / "short")
    verdicts = short.ask([inquire(short, *pair) for pair in REPLIES])
    assert np.isnan(verdicts.values).all()  # cut off: "Hm." has an end in time, the others have none
    failures = [json.loads(line)["failure"] for line in (tmp_path / "short").read_text().splitlines()]
    assert sum("has not come to an end in 5 tokens" in failure for failure in failures) == 2


def test_a_local_judge_of_another_training_is_another_judge(judge_dir: Path, tmp_path: Path) -> None:
    mesh = make_mesh(MeshConfig())
    chats = [local_chat(local_config(judge_dir, tmp_path, dtype=dtype), mesh) for dtype in ("float32", "bfloat16")]
    assert chats[0].model == chats[1].model and chats[0].identity != chats[1].identity
    (tmp_path / "copy").mkdir()
    for file in judge_dir.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    config = local_config(tmp_path / "copy", tmp_path)
    before = local_chat(config, mesh).identity
    assert local_chat(config, mesh).identity == before
    save_decoder(tiny.decoder(seed=1), tmp_path / "copy", dtype="float32")
    assert local_chat(config, mesh).identity != before


def test_many_prompts_take_turns_in_few_slots(judge_dir: Path, tmp_path: Path) -> None:
    """Replies stand where their prompts stood, and one that is too long has failed by itself."""
    chat_ = local_chat(local_config(judge_dir, tmp_path, slots=8), make_mesh(MeshConfig()))
    pairs = [pair for _ in range(7) for pair in REPLIES]
    prompts = [f"{gold}?{answer}" for gold, answer in pairs]
    prompts.insert(5, "x" * 200)
    replies = dict(chat_.reply_all(prompts))
    too_long = replies.pop(5)
    assert isinstance(too_long, UserError) and "a prompt may have 104 tokens" in str(too_long)
    assert [replies[i] for i in sorted(replies)] == [REPLIES[pair] for pair in pairs]


def test_what_a_local_judge_keeps_on_a_device_is_planned(judge_dir: Path, tmp_path: Path) -> None:
    config = local_config(judge_dir, tmp_path, max_length=64)  # too few positions to decode on a part of them
    mesh = make_mesh(MeshConfig(fsdp=2, data=-1))
    chat_ = local_chat(config, mesh)
    planned = judge_memory(config, mesh)
    device = jax.devices()[0]

    def held(tree: Any) -> int:
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    assert planned == {"judge": held(chat_._decoder), "judge's cache": held(chat_._engine._cache)}
    assert judge_memory(JudgeConfig(endpoint=EndpointConfig(url="http://x")), mesh) == {}


def test_a_session_plans_and_opens_a_local_judge(judge_dir: Path, base: Path, tmp_path: Path) -> None:
    settings = {"rewards.process": "judge", "judge.kind": "local", "judge.local.path": judge_dir,
                "judge.local.slots": 8, "judge.local.max_length": 1024, "judge.max_tokens": 8}  # fmt: skip
    config = tiny_run.config(tmp_path, base, **{name.replace(".", "__"): value for name, value in settings.items()})
    session = Components(config, config.run_directory, console=Console(quiet=True))
    planned = {phase: train.plan_memory(session, phase)[0].parts for phase in ("sft", "rl", "eval")}
    expected = judge_memory(config.judge, session.mesh)
    assert expected.items() <= planned["rl"].items()
    assert not expected.keys() & {*planned["sft"], *planned["eval"]}
    judge = session.judge
    assert judge is session.judge and session.judge_mark() == {}
    verdicts = judge.ask([judge.relevance(QUESTION, Step("hm", query="who", passages=FOUND)) for _ in range(2)])
    assert np.isnan(verdicts.values).all()  # it has learnt no such line
    assert (config.run_directory / "judgements.jsonl").read_text().count("failure") == 1


def test_a_local_judge_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"judge\.local\.path must be a Hugging Face directory with config\.json; got .*none"
    ):
        open_judge(
            JudgeConfig(kind="local", local=LocalJudgeConfig(path=str(tmp_path / "none"))),
            make_mesh(MeshConfig()),
            tmp_path / "j",
        )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"the model at .* cannot be read"):
        open_judge(
            JudgeConfig(kind="local", local=LocalJudgeConfig(path=str(tmp_path))),
            make_mesh(MeshConfig()),
            tmp_path / "j",
        )


# ------------------------------------------------------------------------------------- a whole run


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
@pytest.mark.slow
def test_a_run_whose_judge_goes_down_goes_on_where_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down behind the first update; the same command again, with the judge elsewhere, asks nothing twice."""
    is_down = False
    judged: list[str] = []

    def reply(body: dict[str, Any]) -> Reply:
        prompt = body["messages"][0]["content"]
        if is_down:
            return 503, b"out of memory"
        digest = hashlib.sha256(prompt.encode()).digest()[0]
        if digest % 8 == 0:
            return 200, chat("Hm.")
        judged.append(prompt)
        if "Search query" in prompt:
            return 200, chat(f"Relevance: {digest % 11 / 10}")
        return 200, chat(f"Correct: {'yes' if digest % 2 else 'no'}")

    update = train.RLTrainer.update

    def update_and_fall(self: Any, *args: Any) -> Any:
        nonlocal is_down
        is_down = self.iteration == 0
        return update(self, *args)

    monkeypatch.setattr(train.RLTrainer, "update", update_and_fall)
    monkeypatch.setenv("MY_KEY", "secret-1")
    settings: dict[str, Any] = {
        "rewards__process": "judge", "rewards__outcome": "judge", "eval__judge": "true",
        "judge__endpoint__key_env": "MY_KEY", "judge__endpoint__model": "m", "judge__endpoint__retries": 0,
        "judge__max_failure_share": 0.6, "rl__algorithm": "rloo", "eval__systems": "[closed_book, r3rag]",
    }  # fmt: skip
    with serve(reply) as endpoint, pytest.raises(UserError, match=r"judge\.endpoint\.url: .*out of memory"):
        tiny_run.train(tmp_path, base, judge__endpoint__url=endpoint.url, **settings)
    assert is_down and {headers["Authorization"] for headers in endpoint.headers} == {"Bearer secret-1"}
    assert len(tiny_run.metrics(tmp_path / "run")) > 1
    is_down = False
    with serve(reply) as endpoint:
        tiny_run.train(tmp_path, base, judge__endpoint__url=endpoint.url, **settings)
    assert len(judged) == len(set(judged)) > 10
    rows = [row for row in tiny_run.metrics(tmp_path / "run") if row["phase"] == "rl"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        parts = [row[f"reward_{name}"] for name in ("outcome", "process", "format", "no_answer")]
        assert row["reward"] == pytest.approx(sum(parts), abs=1e-5)
        assert 0 <= row["judge_failure_rate"] <= 0.6 and 0 <= row["left_out"] < 1 and np.isfinite(row["loss"])
    assert any(row["judge_failure_rate"] > 0 for row in rows) and any(row["left_out"] > 0 for row in rows)
    kept = (tmp_path / "run" / "judgements.jsonl").read_text()
    assert '"failure"' in kept and "secret-1" not in kept + (tmp_path / "run" / "config.yaml").read_text()
    for system in ("closed_book", "r3rag"):
        summary = json.loads((tmp_path / "run" / "eval" / f"{system}.json").read_text())
        everything = summary["groups"]["all"]
        assert summary["fingerprint"]["judge"] == "m" and everything["acc"] >= everything["em"]
    test = tmp_path / "run" / "data" / "test.jsonl"
    flags = ["--checkpoint", str(tmp_path / "run"), "--questions", str(test), "--name", "again"]
    with serve(reply) as endpoint:
        assert evaluate.main([*flags, f"judge.endpoint.url={endpoint.url}"]) == 0
    again = json.loads((tmp_path / "run" / "eval" / "again.json").read_text())
    assert again["groups"] == summary["groups"] and all("Hm." in str(reply(body)) for body in endpoint.bodies)
    said = tiny_run.train(tmp_path, base, judge__endpoint__url="http://127.0.0.1:9", **settings)
    assert "eval  done before" in said and "ACC" in said
    with pytest.raises(UserError, match=r"judge\.endpoint\.model was 'm', now 'another'"):
        tiny_run.train(
            tmp_path,
            base,
            judge__endpoint__url="http://127.0.0.1:9",
            **settings | {"judge__endpoint__model": "another"},
        )
