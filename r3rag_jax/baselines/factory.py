"""The baselines by name. Another one is an Env in a file of its own, and a line in the table."""

from __future__ import annotations

import functools
from collections.abc import Callable

from r3rag_jax.baselines.closed_book import ClosedBookEnv
from r3rag_jax.baselines.ircot import ChainWriter, IRCoTEnv
from r3rag_jax.baselines.oneshot_rag import OneShotRAGEnv
from r3rag_jax.baselines.reading import LineReader, line_stops
from r3rag_jax.config import Config
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.text.tokenizer import Tokenizer


def closed_book(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `closed_book.py`."""
    reader = _reader(config, tokenizer, with_passages=False)
    return EnvFactory(lambda request: ClosedBookEnv(request, reader), line_stops(tokenizer), reader.num_tokens)


def oneshot_rag(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `oneshot_rag.py`."""
    reader, top_k = _reader(config, tokenizer, with_passages=True), config.retrieval.oneshot_top_k
    return EnvFactory(lambda request: OneShotRAGEnv(request, reader, top_k), line_stops(tokenizer), reader.num_tokens)


def ircot(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `ircot.py`."""
    writer = ChainWriter(tokenizer, config.rollout.max_length, is_chat=config.eval.prompt == "chat")
    make = functools.partial(
        IRCoTEnv, writer=writer, top_k=config.retrieval.top_k, max_passages=config.retrieval.max_passages
    )
    return EnvFactory(make, line_stops(tokenizer, "."), writer.num_tokens)


BASELINES: dict[str, Callable[[Config, Tokenizer], EnvFactory]] = {
    "closed_book": closed_book,
    "oneshot_rag": oneshot_rag,
    "ircot": ircot,
}


def _reader(config: Config, tokenizer: Tokenizer, *, with_passages: bool) -> LineReader:
    is_chat = config.eval.prompt == "chat"
    return LineReader(tokenizer, config.rollout.max_length, is_chat=is_chat, with_passages=with_passages)
