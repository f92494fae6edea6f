"""RAG + CoT: one search with the question, then a chain of thought over what it found.

R3-RAG (arXiv 2505.23794) names it "RAG with CoT" and retrieves 16 passages. A prompt that exceeds the context loses its
last passages; a chain that ends without "So the answer is:" is continued by these words.
"""

from __future__ import annotations

from r3rag_jax.baselines.chain import SearchingChainEnv, WholeChainEnv


class RAGCoTEnv(WholeChainEnv, SearchingChainEnv):
    """One question, answered at the end of a chain of thought over what one search found."""
