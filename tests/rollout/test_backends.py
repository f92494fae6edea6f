"""Rollouts over a real HTTP server: the same trajectories as with the engine, and what happens when it fails."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import tiny_run
from inference_server import EngineReply
from openai_server import MODEL, Reply, RunningServer, completion, serve
from rich.console import Console

from r3rag_jax import evaluate, experiment
from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.config import Config, RolloutConfig, ServerConfig, load_config
from r3rag_jax.data.jsonl import read_rows
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.fingerprint import differences
from r3rag_jax.rollout.backends import ServerBackend
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.rollout.search_env import search_env_factory
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Codec
from r3rag_jax.training.batch import pack
from r3rag_jax.types import Passage, Question, Sample, Status, Step, Trajectory

PASSAGES = [Passage("a", '"Origin"\nOrigin was written by Charles Darwin.')]
FIRST = Step("I need the author.", query="author of Origin")
LAST = Step("It is Darwin.", answer="Charles Darwin")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# ------------------------------------------------------------- the trajectories of a trained policy


needs_devices = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


@needs_devices
@pytest.mark.parametrize("protocol", ["tags", pytest.param("steps", marks=pytest.mark.slow)])
def test_greedy_trajectories_are_those_of_the_engine(protocol: str, finished: Callable[[str], Path]) -> None:
    components = tiny_run.open_components(finished(protocol))
    params = components.policy.load(components.run.policy("rl"))
    requests = [
        RolloutRequest(question)
        for question in [*components.dataset.questions("rl")[:2], *components.dataset.questions("test")]
    ]
    local = rollout(components.engine_backends(lambda: params), components.search_env, components.retriever, requests)
    assert sum(t.num_retrievals for t in local) > 3  # so that passages are in the contexts
    reply = EngineReply(components, components.engine.load(params))
    for dialect in ("vllm", "tokens", "llama", "sglang", "openai"):
        reply.dialect = dialect  # what is written is kept: one greedy generation for all
        plain = ["rollout.server.extra_fields=false", "rollout.server.prompt_format=text"]
        plain = plain if dialect == "openai" else []
        with serve(reply) as endpoint:
            client = tiny_run.open_components(components.run.path, f"rollout.server.url={endpoint.url}", *plain)
            client.retriever = components.retriever
            heard: list[Trajectory] = []
            backend = client.backends(lambda: None)
            served = rollout(backend, client.search_env, client.retriever, requests, on_done=heard.append)
        assert [t.status for t in served] == [t.status for t in local]
        assert sorted(t.question.id for t in heard) == sorted(request.question.id for request in requests)
        for mine, theirs in zip(local, served, strict=True):
            if dialect in ("llama", "openai") and mine.status == Status.FORMAT_ERROR:
                assert theirs.steps[:-1] == mine.steps[:-1]  # which token ended a malformed step they do not tell
                continue
            if dialect == "openai" and not all(
                is_as_encoded(components.policy.tokenizer, sample) for sample in mine.samples
            ):
                continue  # text alone: another split into tokens, so another context
            assert theirs.steps == mine.steps, dialect
            for ours, sample in zip(mine.samples, theirs.samples, strict=True):
                assert sample.ids.tolist() == ours.ids.tolist(), dialect
                assert sample.loss_mask.tolist() == ours.loss_mask.tolist()
                if dialect in ("vllm", "tokens", "sglang"):
                    np.testing.assert_allclose(sample.behaviour_logprobs, ours.behaviour_logprobs, atol=1e-4)
        assert all(type(body["prompt"]) is (str if plain else list) for body in endpoint.bodies)


def is_as_encoded(tokenizer: Tokenizer, sample: Sample) -> bool:
    """Whether what the policy wrote is split into tokens as the tokenizer would."""
    written = [sample.ids[sample.step_ids == step].tolist() for step in range(sample.step_ids.max() + 1)]
    return all(tokenizer.encode(tokenizer.decode(ids)) == ids for ids in written)


@needs_devices
def test_evaluate_and_the_baselines_over_a_server(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run_dir = shutil.copytree(finished("tags"), tmp_path / "run")
    components = tiny_run.open_components(run_dir)
    params = components.policy.load(components.run.policy("rl"))
    assert evaluate.main(["--checkpoint", str(run_dir), "--name", "local"]) == 0
    with serve(EngineReply(components, components.engine.load(params))) as endpoint:
        served = f"rollout.server.url={endpoint.url}"
        assert evaluate.main(["--checkpoint", str(run_dir), "--name", "served", served]) == 0
        client = tiny_run.open_components(run_dir, served)
        naive_rag = BASELINES["naive_rag"](components.config, components.policy.tokenizer)
        backend = client.backends(lambda: None)
        requests = [RolloutRequest(question) for question in components.dataset.questions("test")]
        trajectories = rollout(backend, naive_rag, components.retriever, requests)
        copy = shutil.copytree(run_dir, tmp_path / "copy")
        shutil.rmtree(copy / "policy")  # a server has its own
        settings = [f"run_dir={copy}", "phases=index,eval", "eval.systems=r3rag", served]
        experiment.run(load_config(run_dir / "config.yaml", settings), Console(quiet=True))
    assert (copy / "trajectories" / "r3rag.jsonl").read_text() == (run_dir / "trajectories" / "r3rag.jsonl").read_text()
    assert json.loads((copy / "eval" / "r3rag.json").read_text())["fingerprint"]["server"]["url"] == endpoint.url
    rows = {
        name: [row for _, row in read_rows(run_dir / "trajectories" / f"{name}.jsonl")] for name in ("local", "served")
    }
    assert rows["served"] == rows["local"]
    marks = {name: json.loads((run_dir / "eval" / f"{name}.json").read_text())["fingerprint"] for name in rows}
    assert differences(marks["served"], marks["local"]) == ["server"]
    assert marks["served"]["server"]["url"] == endpoint.url and marks["served"]["policy"] == ""
    own = rollout(components.engine_backends(lambda: params), naive_rag, components.retriever, requests)
    assert [(t.steps, t.status, t.num_policy_tokens) for t in trajectories] == [
        (t.steps, t.status, t.num_policy_tokens) for t in own
    ]


# ------------------------------------------------------------------------------- a scripted server


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without tags as special tokens."""
    return tiny.tokenizer(tmp_path_factory.mktemp("chat_tokenizer"), tiny.SPECIALS[:3])


@pytest.fixture(params=["tags", "steps", "search_r1"])
def codec(request: pytest.FixtureRequest, tokenizer: Tokenizer, chat_tokenizer: Tokenizer) -> Codec:
    has_tags = request.param != "search_r1"
    return Codec(tokenizer if has_tags else chat_tokenizer, make_protocol(request.param), passage_tokens=200)


def ask(
    codec: Codec,
    url: str,
    requests: Sequence[RolloutRequest],
    on_done: Callable[[Trajectory], None] | None = None,
    served: dict[str, Any] | None = None,
    **settings: Any,
) -> list[Trajectory]:
    """`served` holds keys of `rollout.server`, `settings` keys of `rollout`."""
    server = ServerConfig(**{"url": url, "retries": 2} | (served or {}))
    config = RolloutConfig(**{"server": server, "max_length": 2000} | settings)
    backend = ServerBackend(config, codec.tokenizer, first_wait_s=0.01)
    env_factory = search_env_factory(codec, config, top_k=1, max_passages=10)
    return rollout(backend, env_factory, tiny.DictRetriever(PASSAGES), requests, on_done=on_done)


def serve_rollouts(
    codec: Codec,
    reply: Callable[[dict[str, Any]], Reply],
    requests: Sequence[RolloutRequest] = (),
    on_done: Callable[[Trajectory], None] | None = None,
    headers: dict[str, str] | None = None,
    **settings: Any,
) -> tuple[list[Trajectory], RunningServer]:
    with serve(reply, headers) as endpoint:
        trajectories = ask(codec, endpoint.url, requests or [request(0)], on_done, **settings)
    return trajectories, endpoint


def request(number: int, **fields: Any) -> RolloutRequest:
    return RolloutRequest(Question(f"q{number}", f"Who wrote Origin, number {number}?", ("Charles Darwin",)), **fields)


def text_of(codec: Codec, step: Step, number: int) -> str:
    """What a server without frills says: the step without what ended it."""
    if codec.stop_strings:
        return codec.protocol.render_step(step, number).rpartition("</")[0]
    return codec.tokenizer.decode(codec.step_ids(step, number)[:-1])


def answering(codec: Codec) -> Callable[[dict[str, Any]], Reply]:
    """A query first, the answer once the prompt shows passages."""

    def reply(body: dict[str, Any]) -> Reply:
        has_read = "written by Charles Darwin" in codec.tokenizer.decode(body["prompt"])
        return 200, completion(text_of(codec, LAST if has_read else FIRST, 1 + has_read))

    return reply


def test_ids_budgets_and_seeds_of_the_requests(codec: Codec) -> None:
    requests = [request(0, temperature=0.7, seed=3), request(0, sample_index=1, temperature=0.2, seed=3)]
    settings = {"max_new_tokens": 300, "max_length": 800, "min_p": 0.1, "top_p": 0.9, "top_k_tokens": 40, "slots": 1}
    trajectories, endpoint = serve_rollouts(codec, answering(codec), requests, **settings)
    assert [t.answer for t in trajectories] == ["Charles Darwin"] * 2
    assert [t.sample_index for t in trajectories] == [0, 1]
    for body in endpoint.bodies:
        assert body["max_tokens"] == min(300, 800 - len(body["prompt"]))
        assert (body["top_p"], body["min_p"], body["top_k"], body["model"]) == (0.9, 0.1, 40, MODEL)
        assert "<|im_end|>" in body["stop"] and set(codec.stop_ids) <= set(body["stop_token_ids"])
    assert sorted(body["temperature"] for body in endpoint.bodies) == [0.2, 0.2, 0.7, 0.7]
    seeds = {(body["temperature"], body["seed"]) for body in endpoint.bodies}
    assert seeds == {(r.temperature, int(r.key(step)[0]) >> 1) for r in requests for step in (0, 1)}
    context = trajectories[0].samples[-1]
    written = codec.step_ids(LAST, 2)
    assert context.ids[-len(written) :].tolist() == written  # the end is restored


def test_a_server_is_told_every_end_of_a_turn(tmp_path: Path) -> None:
    """Four stop strings are all that OpenAI's API takes: the tags and the ends that a policy learns to write."""
    tiny.tokenizer(tmp_path / "one")
    tokenizer = tiny.with_several_ends(tmp_path / "one", tmp_path / "several")
    codec = Codec(tokenizer, make_protocol("tags"), passage_tokens=200)
    written = tokenizer.encode("<think> I know. </think><answer> Darwin")
    for end in tokenizer.end_ids:
        reply = 200, completion(tokenizer.decode(written), token_ids=[*written, end])
        [trajectory], endpoint = serve_rollouts(codec, lambda _, reply=reply: reply)
        assert endpoint.bodies[0]["stop"] == ["</query>", "</answer>", "<|im_end|>", "<|endoftext|>"]
        assert endpoint.bodies[0]["stop_token_ids"] == [*codec.stop_ids, 2, 0, 1]
        assert (trajectory.status, trajectory.num_policy_tokens) == (Status.FORMAT_ERROR, len(written) + 1)
        assert trajectory.steps[-1].analysis == tokenizer.decode(written)


def test_stop_strings_are_sent_and_end_a_completion(chat_tokenizer: Tokenizer) -> None:
    """A server may stop later, within a token that holds more, or say no more than that it stopped."""
    tokenizer = chat_tokenizer
    codec = Codec(tokenizer, make_protocol("search_r1"), passage_tokens=200)
    written = codec.step_ids(LAST, 1)
    more = [*written, *tokenizer.encode("\n\nDone.")]
    whole, trimmed = tokenizer.decode(more), text_of(codec, LAST, 1)
    replies = [
        completion(whole, token_ids=more, logprobs={"token_logprobs": [-0.5] * len(more)}, stop_reason="</answer>"),
        completion(whole, "length", token_ids=more, logprobs={"token_logprobs": [-0.5] * len(more)}),
        completion(trimmed, stop_reason="</answer>"),
        completion(trimmed),
    ]
    for number, reply in enumerate(replies):
        [trajectory], endpoint = serve_rollouts(codec, lambda _, reply=reply: (200, reply))
        assert endpoint.bodies[0]["stop"] == ["</search>", "</answer>", "<|im_end|>"]
        assert trajectory.answer == "Charles Darwin"
        [sample] = trajectory.samples
        assert sample.ids[sample.loss_mask].tolist() == written
        assert sample.has_logprobs == (number < 2)


def test_who_tells_no_logprobs_cannot_be_trained_on(codec: Codec) -> None:
    [trajectory], _ = serve_rollouts(codec, answering(codec))
    assert not any(sample.has_logprobs for sample in trajectory.samples)
    with pytest.raises(ValueError, match="must hold the log-probabilities"):
        pack(trajectory.samples, row_length=2000)


def test_a_tag_spelled_out_in_letters_ends_no_step(tokenizer: Tokenizer) -> None:
    codec = Codec(tokenizer, make_protocol("tags"), passage_tokens=200)
    ids = tokenizer.encode("<think> I know. </think><answer> Darwin ")
    ids += tokenizer.encode("</answer>", allow_special=False)
    reply = 200, completion(tokenizer.decode(ids), token_ids=ids, stop_reason="</answer>")
    [trajectory], _ = serve_rollouts(codec, lambda _: reply)
    assert trajectory.status == Status.FORMAT_ERROR
    assert trajectory.samples[0].ids[-len(ids) :].tolist() == ids


def test_a_step_cut_off_by_its_budget_is_malformed(codec: Codec) -> None:
    [trajectory], _ = serve_rollouts(codec, lambda _: (200, completion(text_of(codec, LAST, 1), "length")))
    assert trajectory.status == Status.FORMAT_ERROR
    assert trajectory.samples[0].ids[-1] not in (*codec.stop_ids, codec.turn_end_id)


def test_an_end_of_turn_at_once_is_a_malformed_step(codec: Codec) -> None:
    [trajectory], _ = serve_rollouts(codec, lambda _: (200, completion("")))
    assert trajectory.status == Status.FORMAT_ERROR
    assert trajectory.num_policy_tokens == 1


def test_trajectories_do_not_depend_on_their_neighbours_or_the_order(codec: Codec) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        """Its pace and its words depend on the request alone."""
        time.sleep(body["seed"] % 5 / 500)
        number = codec.tokenizer.decode(body["prompt"]).partition("number ")[2][0]
        return 200, completion(text_of(codec, Step("I know.", answer=f"Answer {number} {body['seed']}"), 1))

    requests = [request(number, temperature=1.0) for number in range(9)]
    trajectories, _ = serve_rollouts(codec, reply, requests, slots=8)
    assert [t.question.id for t in trajectories] == [r.question.id for r in requests]
    again, _ = serve_rollouts(codec, reply, requests[::-1], slots=2)
    assert [t.steps for t in again[::-1]] == [t.steps for t in trajectories]


def test_as_many_requests_are_in_flight_as_there_are_slots(codec: Codec) -> None:
    together = threading.Barrier(4)  # breaks, and fails the test, unless four wait at once

    def reply(body: dict[str, Any]) -> Reply:
        together.wait(timeout=20)
        return answering(codec)(body)

    trajectories, endpoint = serve_rollouts(
        codec, reply, [request(number) for number in range(4)], slots=4, served={"model": "m"}
    )
    assert [t.answer for t in trajectories] == ["Charles Darwin"] * 4
    assert endpoint.most_busy == 4


# ------------------------------------------------------------------------------------------ faults


def failing(times: int, status: int, then: Callable[[dict[str, Any]], Reply]) -> Callable[[dict[str, Any]], Reply]:
    left = iter(range(times))
    return lambda body: (status, {"error": "busy"}) if next(left, None) is not None else then(body)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(codec: Codec, status: int) -> None:
    [trajectory], endpoint = serve_rollouts(codec, failing(2, status, answering(codec)))
    assert trajectory.answer == "Charles Darwin"
    assert len(endpoint.bodies) == 2 + 2


def test_a_server_that_keeps_failing_loses_nothing_finished(codec: Codec) -> None:
    """Two questions are answered; the third's calls fail for ever, and the fourth is in flight meanwhile."""
    has_failed = threading.Event()

    def reply(body: dict[str, Any]) -> Reply:
        prompt = codec.tokenizer.decode(body["prompt"])
        if "number 2" in prompt:
            has_failed.set()
            return 500, b"out of memory"
        if "number 3" in prompt:
            has_failed.wait(20)
            time.sleep(0.3)  # by now its neighbour has been given up
        return 200, completion(text_of(codec, LAST, 1))

    heard: list[Trajectory] = []
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:\d+/v1/completions failed, attempt 3 of 3: 500 out of mem"
    ):
        serve_rollouts(codec, reply, [request(number) for number in range(4)], heard.append, slots=4)
    assert sorted(t.question.id for t in heard) == ["q0", "q1", "q3"]


@pytest.mark.parametrize("value", [{"choices": []}, completion("", "length"), b"<html>"])
def test_a_malformed_reply_is_an_error_and_never_an_empty_step(tokenizer: Tokenizer, value: Any) -> None:
    codec = Codec(tokenizer, make_protocol("tags"), passage_tokens=200)
    with pytest.raises(UserError, match=r"/v1/completions must answer"):
        serve_rollouts(codec, lambda _: (200, value))


def test_baselines_tell_what_has_come_before_an_error(tokenizer: Tokenizer) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        assert body["temperature"] == 0.0 and "\n" in body["stop"]
        is_second = "number 1" in tokenizer.decode(body["prompt"])
        time.sleep(0.2 * is_second)
        return (500, b"") if is_second else (200, completion(" Charles Darwin"))

    heard: list[Trajectory] = []
    with serve(reply) as endpoint:
        config = Config(phases=("index",), rollout=RolloutConfig(server=ServerConfig(url=endpoint.url, retries=0)))
        closed_book, backend = BASELINES["closed_book"](config, tokenizer), ServerBackend(config.rollout, tokenizer)
        with pytest.raises(UserError, match="attempt 1 of 1: 500"):
            rollout(backend, closed_book, tiny.DictRetriever([]), [request(0), request(1)], on_done=heard.append)
    assert [t.answer for t in heard] == ["Charles Darwin"]


def test_slots_are_the_requests_in_flight(tokenizer: Tokenizer) -> None:
    for max_in_flight, num_slots in ((0, 5), (2, 2)):
        config = RolloutConfig(slots=5, server=ServerConfig(url="http://x", max_in_flight=max_in_flight))
        assert ServerBackend(config, tokenizer).num_slots == num_slots
