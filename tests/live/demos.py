"""A demo whose answers a test dictates: the real server, page, scheduler and protocol, and a sampler by hand."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import tiny
from hand_sampler import WAIT_S, Hand

from r3rag_jax.config import Config, RetrievalConfig, RolloutConfig
from r3rag_jax.config.serving import DemoConfig
from r3rag_jax.live.player import Player, RetrieverChoice
from r3rag_jax.live.server import DemoServer
from r3rag_jax.rollout.live_sampling import Draft
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Completion, Passage, Question, Step

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
PASSAGES = [
    Passage("p1", '"The Glass Harbour"\nThe Glass Harbour is a novel by Ilse Malthen.'),
    Passage("p2", '"Ilse Malthen"\nIlse Malthen was born in Orvessa. ' + "She wrote many books. " * 14),
    Passage("p3", f'"{HOSTILE}"\nWho wrote this hostile harbour {HOSTILE}'),
]
QUESTION = Question(
    "q1", "Where was the author of The Glass Harbour born?", ("Orvessa",),
    {"type": "bridge", "supporting_ids": ["p1", "p2"]},
)  # fmt: skip
STEPS = [
    Step("I need the author.", query="Who wrote The Glass Harbour?"),
    Step("It is Ilse Malthen. I need her birthplace.", query="Where was Ilse Malthen born?"),
    Step("She was born in Orvessa.", answer="Orvessa"),
]


class Retriever(tiny.DictRetriever):
    fingerprint = "dict"


class Demo:
    """A running demo: `hand` has the completions to be written."""

    def __init__(self, server: DemoServer, hand: Hand, codec: Codec):
        self.server, self.hand, self.codec, self.url = server, hand, codec, server.url

    def write(self, step: Step, *, upto: int | None = None, draft: Draft | None = None) -> Draft:
        """Write a step into a draft, by default the oldest that nothing is written of; with `upto` only so many ids."""
        draft = draft or self.hand.next()
        ids = self.codec.step_ids(step, 2)
        self.hand.tell(draft, Completion(ids, None) if upto is None else ids[:upto])
        return draft

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json"} | headers
        return httpx.post(self.url + path, content=content, headers=given, timeout=WAIT_S, trust_env=False)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=WAIT_S, trust_env=False)

    @contextlib.contextmanager
    def asking(self, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a question as a client reads them, which leaves at the end of the `with` block."""
        body = {"question": QUESTION.question} | body
        with httpx.stream("POST", f"{self.url}/v1/ask", json=body, timeout=WAIT_S, trust_env=False) as reply:
            assert reply.status_code == 200, reply.read()
            yield (json.loads(line) for line in reply.iter_lines() if line)


def make_codec(directory: Path) -> Codec:
    return Codec(tiny.tokenizer(directory), make_protocol("tags"), passage_tokens=1000)


def open_player(codec: Codec, hand: Hand) -> Player:
    config = Config(
        phases=("index",), rollout=RolloutConfig(max_length=8000, max_new_tokens=800, max_steps=4),
        retrieval=RetrievalConfig(top_k=1),
    )  # fmt: skip
    retrievers = {
        "own": RetrieverChoice("dict, 3 passages", lambda: Retriever(PASSAGES)),
        "less": RetrieverChoice("one passage", lambda: Retriever(PASSAGES[:1])),
    }
    player = Player(config, codec, lambda stops: hand, {"rl": "R3-RAG", "sft": "Cold start"}, retrievers, [QUESTION])
    player.open()
    return player


@contextlib.contextmanager
def running(
    codec: Codec, num_slots: int = 1, before_open: Callable[[], object] = lambda: None, **settings: Any
) -> Iterator[Demo]:
    """A demo that answers, or is being opened if `before_open` takes time; shut down at the end."""
    hand, is_ready = Hand(num_slots), threading.Event()

    def opened() -> Player:
        before_open()
        return open_player(codec, hand)

    def say(text: str) -> None:
        if text.startswith("ready") or before_open.__name__ != "<lambda>":
            is_ready.set()

    server = DemoServer(opened, "tiny", DemoConfig(**{"port": 0} | settings), say)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert is_ready.wait(WAIT_S)
        yield Demo(server, hand, codec)
    finally:
        if not server.gate.is_draining:
            server.shut_down()
        thread.join(WAIT_S)
    assert not thread.is_alive() and hand.is_closed
