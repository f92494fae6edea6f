"""The baselines by name. Another one is an Env in a file of its own, and a line in the table."""

from __future__ import annotations

import functools
from collections.abc import Callable

from r3rag_jax.baselines.chain import ChainSettings, chain_stops, chain_style
from r3rag_jax.baselines.closed_book import ClosedBookEnv
from r3rag_jax.baselines.cot import CoTEnv
from r3rag_jax.baselines.flare import FLAREEnv
from r3rag_jax.baselines.ircot import IRCoTEnv
from r3rag_jax.baselines.iter_retgen import IterRetGenEnv
from r3rag_jax.baselines.naive_rag import NaiveRAGEnv
from r3rag_jax.baselines.prompting import PromptStyle, PromptWriter, line_stops
from r3rag_jax.baselines.rag_cot import RAGCoTEnv
from r3rag_jax.baselines.react import STYLE as REACT_STYLE
from r3rag_jax.baselines.react import ReActEnv, react_stops
from r3rag_jax.baselines.reading import LineReader
from r3rag_jax.baselines.self_ask import STYLE as SELF_ASK_STYLE
from r3rag_jax.baselines.self_ask import SelfAskEnv, self_ask_stops
from r3rag_jax.config import Config
from r3rag_jax.rollout.env import Env, EnvFactory, StopRule
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.text.tokenizer import Tokenizer


def closed_book(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `closed_book.py`."""
    reader = _reader(config, tokenizer, with_passages=False)
    return EnvFactory(lambda request: ClosedBookEnv(request, reader), line_stops(tokenizer), reader.num_tokens)


def naive_rag(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `naive_rag.py`."""
    reader, top_k = _reader(config, tokenizer, with_passages=True), config.baselines.naive_rag.top_k
    return EnvFactory(lambda request: NaiveRAGEnv(request, reader, top_k), line_stops(tokenizer), reader.num_tokens)


def cot(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `cot.py`."""
    style = chain_style(with_documents=False)
    settings = _settings(config, tokenizer, style, config.baselines.cot.max_tokens)
    return _chain_factory(settings, CoTEnv)


def rag_cot(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `rag_cot.py`."""
    own = config.baselines.rag_cot
    settings = _settings(config, tokenizer, chain_style(with_documents=True), own.max_tokens, own.top_k)
    return _chain_factory(settings, RAGCoTEnv)


def ircot(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `ircot.py`."""
    own, retrieval = config.baselines.ircot, config.retrieval
    style = chain_style(with_documents=True)
    settings = _settings(config, tokenizer, style, own.sentence_tokens, retrieval.top_k, keeps_newest=True)
    make = functools.partial(IRCoTEnv, max_passages=retrieval.max_passages, max_sentences=own.max_sentences)
    return _chain_factory(settings, make, line_stops(tokenizer, "."))


def self_ask(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `self_ask.py`."""
    own = config.baselines.self_ask
    settings = _settings(config, tokenizer, SELF_ASK_STYLE, own.max_tokens, config.retrieval.top_k)
    make = functools.partial(SelfAskEnv, max_follow_ups=own.max_follow_ups)
    return _chain_factory(settings, make, self_ask_stops(tokenizer))


def iter_retgen(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `iter_retgen.py`."""
    own, style = config.baselines.iter_retgen, chain_style(with_documents=True)
    settings = _settings(config, tokenizer, style, own.max_tokens, config.retrieval.top_k)
    return _chain_factory(settings, functools.partial(IterRetGenEnv, iterations=own.iterations))


def react(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `react.py`."""
    own, settings = config.baselines.react, _settings(config, tokenizer, REACT_STYLE, config.baselines.react.max_tokens)
    make = functools.partial(
        ReActEnv,
        writer=settings.writer,
        top_k=config.retrieval.top_k,
        max_steps=own.max_steps,
        max_tokens=own.max_tokens,
    )
    return EnvFactory(make, react_stops(tokenizer), lambda question: settings.num_tokens(question.question))


def flare(config: Config, tokenizer: Tokenizer) -> EnvFactory:
    """See `flare.py`."""
    own, style = config.baselines.flare, chain_style(with_documents=True)
    settings = _settings(config, tokenizer, style, own.look_ahead, config.retrieval.top_k)
    make = functools.partial(FLAREEnv, threshold=own.threshold, mask_below=own.mask_below, max_tokens=own.max_tokens)
    return _chain_factory(settings, make, line_stops(tokenizer, "."))


BASELINES: dict[str, Callable[[Config, Tokenizer], EnvFactory]] = {
    "closed_book": closed_book,
    "cot": cot,
    "naive_rag": naive_rag,
    "rag_cot": rag_cot,
    "ircot": ircot,
    "self_ask": self_ask,
    "iter_retgen": iter_retgen,
    "react": react,
    "flare": flare,
}


def _reader(config: Config, tokenizer: Tokenizer, *, with_passages: bool) -> LineReader:
    return LineReader(
        tokenizer,
        config.rollout.max_length,
        config.baselines.max_answer_tokens,
        is_chat=config.eval.prompt == "chat",
        with_passages=with_passages,
    )


def _settings(
    config: Config,
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_tokens: int,
    top_k: int = 0,
    *,
    keeps_newest: bool = False,
) -> ChainSettings:
    writer = PromptWriter(style, tokenizer, config.rollout.max_length, is_chat=config.eval.prompt == "chat")
    return ChainSettings(writer, max_tokens, config.baselines.max_answer_tokens, top_k, keeps_newest)


def _chain_factory(
    settings: ChainSettings, make: Callable[[RolloutRequest, ChainSettings], Env], stops: StopRule | None = None
) -> EnvFactory:
    """`stops`: by default those of a whole chain."""
    writer = settings.writer
    return EnvFactory(
        lambda request: make(request, settings),
        stops or chain_stops(writer.tokenizer, is_chat=writer.is_chat),
        lambda question: settings.num_tokens(question.question),
    )
