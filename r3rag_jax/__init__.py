"""R3-RAG in JAX: train language models that interleave reasoning with retrieval."""

__version__ = "0.1.0"
