"""`ask` as a user runs it: on a terminal, through a pipe, as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_run
import tiny_run
from openai_server import completion, serve
from rich.console import Console

from r3rag_jax import ask
from r3rag_jax.data.readers.flashrag import question_from_dict
from r3rag_jax.data.trajectories import trajectory_from_dict
from r3rag_jax.live.terminal import QuestionView
from r3rag_jax.rollout.events import Cancelled, Ended, PassagesFound, SearchStarted, StepText, StepWritten, Waiting
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout


def test_a_pipe_of_questions_is_answered_as_a_rollout_answers_them(
    finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    components = tiny_run.open_components(finished("tags"), "rollout.slots=4")
    texts = [question.question for question in components.dataset.questions("test")[:3]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([texts[0], "", *texts[1:], "Who? " * 999])))
    words = ["--checkpoint", str(finished("tags")), "retrieval.top_k=2", "--json"]
    assert ask.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: prompt and completion of r3rag must fit") and captured.err.count("\n") == 1
    rows = [json.loads(line) | {"golden_answers": ["?"]} for line in captured.out.splitlines()]
    components = tiny_run.open_components(finished("tags"), "retrieval.top_k=2", "rollout.slots=4")
    requests = [RolloutRequest(question_from_dict(row)) for row in rows]
    expected = rollout(components.open_backend("rl"), components.search_env, components.retriever, requests)
    assert [row["question"] for row in rows] == texts
    assert [trajectory_from_dict(row).steps for row in rows] == [trajectory.steps for trajectory in expected]
    assert {row["settings"]["k"] for row in rows} == {2}
    scores = [p["score"] for row in rows for step in row["steps"] for p in step.get("passages", ())]
    assert scores and all(isinstance(score, float) for score in scores)


def test_a_terminal_shows_a_question_as_it_is_answered() -> None:
    """What is written is redrawn in place; what is finished stays, once."""
    trajectory = synthetic_run.right(synthetic_run.question(1))
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    view = QuestionView(console, trajectory.question)

    def new_text() -> str:
        text = console.file.getvalue()  # type: ignore[attr-defined]
        console.file.seek(0)
        console.file.truncate()
        return text

    assert "Where was the author" in new_text()
    view.hear(Waiting(1))
    assert "waiting for 2 others" in new_text()
    for number, step in enumerate(trajectory.steps, 1):
        view.hear(StepText(number, "analysis", step.analysis[:5]))
        view.hear(StepText(number, "analysis", step.analysis[5:]))
        assert step.analysis in new_text()
        view.hear(StepWritten(number, step))
        assert new_text().count(step.analysis) == 1
        if step.query is not None:
            view.hear(SearchStarted(number, step.query))
            assert "searching" in new_text()
            view.hear(PassagesFound(number, step.passages, tuple(0.5 for _ in step.passages)))
            assert "★ passage" in new_text()
    view.hear(Ended(trajectory))
    assert "✓ right" in (shown := new_text()) and "supporting" in shown
    view.hear(StepText(4, "analysis", "half"))
    view.hear(Cancelled())
    assert "\x1b[?25h" in new_text()  # the cursor is back


def test_questions_that_are_typed(
    finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("\nWho wrote The Red Door?\n"))
    assert ask.main(["rollout.max_steps=1", "--checkpoint", str(finished("tags"))]) == 0
    captured = capsys.readouterr()
    assert captured.err == "question: error: the question must not be empty\n" + 2 * "question: "
    assert captured.out.count("step 1") == 1 and "step 2" not in captured.out


def test_an_inference_server_answers(
    finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question has one request in flight, which asks for a stream."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    texts = iter(
        ["<think> I look. </think><query> The Red Door </query>", "<think> So. </think><answer> Ann </answer>"]
    )
    with serve(lambda body: (200, completion(next(texts)))) as server:
        words = ["--checkpoint", str(finished("tags")), "--json", f"rollout.server.url={server.url}"]
        assert ask.main(["rollout.max_steps=2", *words, "Who wrote The Red Door?"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["answer"], [step["analysis"] for step in result["steps"]]) == ("Ann", ["I look.", "So."])
    assert result["steps"][0]["passages"] and all(body["stream"] for body in server.bodies)
