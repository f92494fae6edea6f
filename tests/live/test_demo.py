"""The demo's API over real sockets."""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_run
from demos import HOSTILE, QUESTION, STEPS, Demo, make_codec, running
from hand_sampler import WAIT_S

from r3rag_jax import demo as command
from r3rag_jax.components import Components
from r3rag_jax.data.trajectories import trajectory_from_dict
from r3rag_jax.evaluation.checkpoint import open_checkpoint
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.live.choices import policies_of, retrievers_of, with_index
from r3rag_jax.live.player import Player
from r3rag_jax.retrieval.manifest import read_manifest
from r3rag_jax.rollout.events import Ended, Event
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Question, Status


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return make_codec(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def demo(codec: Codec) -> Iterator[Demo]:
    with running(codec, max_question_chars=100) as found:
        yield found


def test_a_question_is_streamed_to_its_answer(demo: Demo) -> None:
    with demo.asking(k=2) as events:
        asked, started = next(events), next(events)
        assert asked["golden_answers"] == ["Orvessa"] and started == {"event": "started"}
        assert asked["settings"] | {"seed": 0} == asked["settings"] and asked["settings"]["k"] == 2
        draft = demo.write(STEPS[0], upto=12)
        first = next(events)
        assert (first["event"], first["part"]) == ("text", "analysis") and "I need the".startswith(first["text"])
        demo.write(STEPS[0], draft=draft)
        demo.write(STEPS[1])
        demo.write(STEPS[2])
        rows = list(events)
    assert [row["event"] for row in rows] == ["step", "search", "passages"] * 2 + ["step", "end"]
    assert rows[0] == {"event": "step", "step": 1, "analysis": STEPS[0].analysis, "query": STEPS[0].query,
                       "answer": None, "is_well_formed": True}  # fmt: skip
    found = rows[2]["passages"]
    assert [(p["id"], p["is_supporting"], p["score"] > 0) for p in found] == [("p1", True, True), ("p3", False, True)]
    assert found[0]["title"] == "The Glass Harbour" and HOSTILE in found[1]["text"]
    result = rows[-1]["result"]
    assert (result["answer"], result["outcome"], result["settings"]["k"]) == ("Orvessa", "right", 2)
    trajectory = trajectory_from_dict(result)
    assert trajectory.question == QUESTION and trajectory.status == Status.ANSWERED
    assert [step["passages"][0]["score"] for step in result["steps"][:1]] == [found[0]["score"]]


def test_a_client_that_does_not_stream_gets_the_result(demo: Demo) -> None:
    writing = threading.Thread(target=lambda: [demo.write(step) for step in (STEPS[0], STEPS[2])])
    writing.start()
    reply = demo.post("/v1/ask", {"question": "Who?", "stream": False, "single_steps": True, "retriever": "less"})
    writing.join()
    assert reply.status_code == 200
    result = reply.json()
    assert (result["answer"], result["outcome"], result["golden_answers"]) == ("Orvessa", "unknown", [])
    assert [p["id"] for step in result["steps"][:1] for p in step["passages"]] == ["p1"]


def test_a_client_that_leaves_frees_its_slot(demo: Demo) -> None:
    with demo.asking() as events:
        assert [next(events)["event"] for _ in range(2)] == ["asked", "started"]
        draft = demo.hand.next()
        with demo.asking() as others:
            assert [next(others) for _ in range(2)][1] == {"event": "waiting", "num_ahead": 0}
    assert demo.hand.cancelled.get(timeout=WAIT_S) is draft
    with demo.asking() as events:  # the second has left while it waited
        demo.write(STEPS[2])
        assert list(events)[-1]["event"] == "end"


def test_single_steps_go_on_when_they_are_told_to(demo: Demo) -> None:
    with demo.asking(single_steps=True) as events:
        path = f"/v1/questions/{next(events)['id']}/next"
        demo.write(STEPS[0])
        assert next(row for row in events if row["event"] == "paused") == {"event": "paused", "step": 1}
        assert demo.post(path, {}).status_code == 200  # by one step
        demo.write(STEPS[1])
        assert next(row for row in events if row["event"] == "paused")["step"] == 2
        assert demo.post(path, {"single_steps": False}).json() == {"status": "ok"}
        demo.write(STEPS[2])
        assert [row["event"] for row in events] == ["started", "step", "end"]
    assert demo.post(path, {}).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "rule"),
    [
        (b"{", 400, "Invalid JSON"),
        ({}, 422, "question: Field required"),
        ({"question": " "}, 422, "the question must not be empty"),
        ({"question": "x" * 101}, 422, "at most 100 characters"),
        ({"question": "x", "k": 21}, 422, "k: Input should be less than or equal to 20; got 21"),
        ({"question": "x", "steps": 0}, 422, "steps: Input should be greater than or equal to 1; got 0"),
        ({"question": "x", "temperature": 3}, 422, "temperature: Input should be less than or equal to 2; got 3"),
        ({"question": "x", "policy": "base"}, 422, "policy: Input should be 'rl' or 'sft'"),
        ({"question": "x", "retriever": "../x"}, 422, "retriever: Input should be 'own' or 'less'"),
        ({"question": "x", "top": 1}, 422, "top: Extra inputs are not permitted"),
        (b" " * 70_000, 413, "a body holds at most 65536 bytes"),
    ],
)
def test_questions_that_are_refused(demo: Demo, body: Any, status: int, rule: str) -> None:
    reply = demo.post("/v1/ask", body)
    assert reply.status_code == status and rule in reply.json()["detail"]


def test_other_content_types_are_refused(demo: Demo) -> None:
    """A form of another site can send `text/plain` to this machine, and nothing else without asking first."""
    assert demo.post("/v1/ask", {"question": "x"}, **{"content-type": "text/plain"}).status_code == 415


def references(value: Any) -> set[str]:
    """The `$ref`s in a JSON value."""
    if isinstance(value, list):
        return set().union(*map(references, value))
    if not isinstance(value, dict):
        return set()
    return set().union(*map(references, value.values())) | ({value["$ref"]} if "$ref" in value else set())


def test_pages_and_descriptions(demo: Demo) -> None:
    document = demo.get("/openapi.json").json()
    assert references(document) == {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    for path in ("/", "/api"):
        page = demo.get(path)
        policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
        assert policy["script-src"] == "'none'" or policy["script-src"].startswith("'sha256-")
        assert "innerHTML" not in page.text and "https://" not in page.text
    assert all(path in page.text for path in ("/v1/ask", "/v1/questions/{id}/next", "/v1/settings"))
    ask = document["paths"]["/v1/ask"]["post"]
    assert ask["requestBody"]["content"]["application/json"]["schema"]["properties"]["k"]["maximum"] == 20
    events = ask["responses"]["200"]["content"]["application/x-ndjson"]["schema"]
    assert {"text", "passages", "end"} <= events["discriminator"]["mapping"].keys()
    settings = demo.get("/v1/settings").json()
    assert settings["examples"] == [QUESTION.question] and settings["limits"]["slots"] == 1
    assert demo.get("/metrics").text.count("r3rag_busy_slots 0.0") == 1


def test_the_page_is_shown_before_the_model_is_loaded_and_without_a_token(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_open = threading.Event()

    def wait() -> None:
        assert may_open.wait(WAIT_S)

    monkeypatch.setenv("TOKEN", "secret")
    bearer = {"authorization": "Bearer secret"}
    with running(codec, before_open=wait, token_env="TOKEN") as demo:
        assert demo.get("/").status_code == demo.get("/healthz").status_code == 200
        assert demo.get("/readyz").json() == {"detail": "the model is being loaded"}
        assert demo.get("/v1/settings").status_code == 401
        assert demo.get("/v1/settings", **bearer).status_code == 503
        may_open.set()
        while demo.get("/readyz").status_code != 200:
            pass
        assert demo.get("/v1/settings", **bearer).json()["title"] == "tiny"


def test_what_is_paused_for_long_is_stopped(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r3rag_jax.live.following.HEARTBEAT_S", 0.01)
    with running(codec, idle_s=0.05) as demo, demo.asking(single_steps=True) as events:
        demo.write(STEPS[0])
        assert [row["event"] for row in events][-2:] == ["paused", "cancelled"]


def test_a_question_in_flight_is_finished_at_the_end(codec: Codec) -> None:
    with running(codec) as demo, demo.asking() as events:
        draft = demo.hand.next()
        demo.server.shut_down()
        assert demo.post("/v1/ask", {"question": "x"}).status_code == 503
        demo.write(STEPS[2], draft=draft)
        assert list(events)[-1]["event"] == "end"


def test_an_engine_that_has_failed_answers_nobody(codec: Codec) -> None:
    with running(codec) as demo:
        scheduler = demo.server.application._ready().scheduler
        scheduler.close()
        for reply in (demo.get("/readyz"), demo.post("/v1/ask", {"question": "x"})):
            assert (reply.status_code, reply.json()["detail"][:21]) == (503, "the engine has failed")


# ---------------------------------------------------------------------------- the command


def test_answers_are_those_of_the_evaluation(finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's player, with the run's policies, its index and the same one by another name."""
    opened: list[Player] = []

    class Server:
        def __init__(self, open_player: Callable[[], Player], title: str, config: Any, say: Any):
            opened.append(open_player())

        def run(self) -> None:
            pass

    monkeypatch.setattr("r3rag_jax.live.server.DemoServer", Server)
    monkeypatch.setattr("r3rag_jax.sampler.engine.Engine.warm_up", lambda engine, decoder: None)
    run_dir = finished("tags")
    assert command.main(["--checkpoint", str(run_dir), "--index", str(run_dir / "index"), "--slots", "4"]) == 0
    [player] = opened
    assert list(player.policies.items()) == [("rl", "R3-RAG"), ("sft", "Cold start")]
    assert list(player.retriever_titles) == ["index", "own"]
    components = tiny_run.open_components(run_dir, "rollout.slots=4")
    for question in components.dataset.questions("test")[:1]:
        assert player.question(f" {question.question} ") == question
        check_same(player, components, question)
    player.close()


def test_a_model_searches_the_indexes_that_are_named(
    base: Path, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    index = finished("tags") / "index"
    flags = {"checkpoint": str(base), "index": [index, index], "corpus": None, "config": None, "phase": None}
    found = with_index(argparse.Namespace(**flags, overrides=[]))
    checkpoint = open_checkpoint(found)
    assert (found.index, checkpoint.config.retrieval.index_dir) == ([index], str(index)) and not checkpoint.builds_index
    choices = retrievers_of(checkpoint.config, index, lambda: None, found.index)  # type: ignore[arg-type,return-value]
    size = f"faiss, {read_manifest(index).num_passages} passages"
    assert [choice.title for choice in choices.values()] == [f"index ({size})", size]
    alone = retrievers_of(checkpoint.config, tmp_path, lambda: None, [index])  # type: ignore[arg-type,return-value]
    assert list(alone) == ["index"]
    assert policies_of(checkpoint, None) == {"base": "Model"}


def check_same(player: Player, components: Components, question: Question) -> None:
    for system in ("r3rag", "cold_start"):
        heard: queue.Queue[Event] = queue.Queue()
        player.ask(question, dataclasses.replace(player.defaults, policy=SYSTEMS[system].policy), heard.put)
        while not isinstance(event := heard.get(timeout=WAIT_S), Ended):
            pass
        [expected] = components.evaluator.rollouts(SYSTEMS[system], [question])
        assert event.trajectory.steps == expected.steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-k", "0"], "demo.max_k must be at least 1; got 0"),
        (["--token-env", "NO_SUCH_VARIABLE"], "--token-env names NO_SUCH_VARIABLE: it must be set"),
        (["--index", "nowhere"], "an index directory holds fingerprint.json; nowhere/fingerprint.json is missing"),
        (["--phase", "sft", "rollout.slotss=3"], "did you mean 'rollout.slots'"),
    ],
)
def test_what_cannot_be_shown_ends_in_a_line(
    words: list[str], message: str, finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--checkpoint", str(finished("tags")), "--port", "0", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_signal_ends_the_process_in_order(finished: Callable[[str], Path]) -> None:
    command_line = [sys.executable, "-m", "r3rag_jax.demo", "--checkpoint", str(finished("tags")), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(command.__file__).parents[1])}
    process = subprocess.Popen(command_line, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if line.startswith("ready at "))
        body = {"question": "Who wrote The Red Door?", "stream": False}
        reply = httpx.post(f"{line.split()[2].rstrip(':')}/v1/ask", json=body, timeout=60, trust_env=False)
        assert reply.json()["question"] == body["question"]
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
