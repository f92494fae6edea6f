"""Section `baselines`: budgets and stopping rules of the baselines; docs/baselines.md has their sources."""

from __future__ import annotations

from typing import ClassVar

from r3rag_jax.config.section import Section, key, section

BASELINES = ("closed_book", "cot", "naive_rag", "rag_cot", "ircot", "self_ask", "iter_retgen", "react", "flare")


class NaiveRAGConfig(Section):
    """Naive RAG: one search with the question."""

    dotted: ClassVar[str] = "baselines.naive_rag"

    top_k: int = key(16, "passages of its search", "passages", ge=1)


class CoTConfig(Section):
    """Chain of thought without a retrieval."""

    dotted: ClassVar[str] = "baselines.cot"

    max_tokens: int = key(256, "budget of the chain of thought", "tokens", ge=1)


class RAGCoTConfig(Section):
    """RAG with a chain of thought: one search with the question."""

    dotted: ClassVar[str] = "baselines.rag_cot"

    top_k: int = key(16, "passages of its search", "passages", ge=1)
    max_tokens: int = key(256, "budget of the chain of thought", "tokens", ge=1)


class IRCoTConfig(Section):
    """IRCoT: each sentence of the chain of thought is a query."""

    dotted: ClassVar[str] = "baselines.ircot"

    max_sentences: int = key(8, "after so many sentences the answer is asked for", "sentences", ge=1)
    sentence_tokens: int = key(64, "budget of a sentence", "tokens", ge=1)


class SelfAskConfig(Section):
    """Self-Ask: follow-up questions are the queries."""

    dotted: ClassVar[str] = "baselines.self_ask"

    max_follow_ups: int = key(5, "after so many follow-up questions the answer is asked for", "questions", ge=1)
    max_tokens: int = key(128, "budget of an intermediate answer and the next follow-up question", "tokens", ge=1)


class IterRetGenConfig(Section):
    """ITER-RETGEN: each whole chain of thought is the next query."""

    dotted: ClassVar[str] = "baselines.iter_retgen"

    iterations: int = key(3, "searches, each followed by a whole chain of thought", "iterations", ge=1)
    max_tokens: int = key(256, "budget of a chain of thought", "tokens", ge=1)


class ReActConfig(Section):
    """ReAct: thoughts, and the actions Search, Lookup and Finish."""

    dotted: ClassVar[str] = "baselines.react"

    max_steps: int = key(7, "after so many actions it ends without an answer", "actions", ge=1)
    max_tokens: int = key(100, "budget of a thought and its action", "tokens", ge=1)


class FLAREConfig(Section):
    """FLARE: a sentence with an unlikely token is written again, with what it finds as a query."""

    dotted: ClassVar[str] = "baselines.flare"

    threshold: float = key(0.8, "a sentence with a token below this probability is a query", "probability", ge=0, le=1)
    mask_below: float = key(0.4, "tokens below this probability are left out of the query", "probability", ge=0, le=1)
    look_ahead: int = key(64, "budget of a sentence", "tokens", ge=1)
    max_tokens: int = key(256, "after so many tokens of accepted sentences the answer is asked for", "tokens", ge=1)


class BaselinesConfig(Section):
    """Budgets and stopping rules of the baselines. A search of several finds `retrieval.top_k` passages."""

    dotted: ClassVar[str] = "baselines"

    max_answer_tokens: int = key(
        24, "budget of an answer that is asked for by itself, after `Answer:` or a chain of thought", "tokens", ge=1
    )
    naive_rag: NaiveRAGConfig = section(NaiveRAGConfig())
    cot: CoTConfig = section(CoTConfig())
    rag_cot: RAGCoTConfig = section(RAGCoTConfig())
    ircot: IRCoTConfig = section(IRCoTConfig())
    self_ask: SelfAskConfig = section(SelfAskConfig())
    iter_retgen: IterRetGenConfig = section(IterRetGenConfig())
    react: ReActConfig = section(ReActConfig())
    flare: FLAREConfig = section(FLAREConfig())
