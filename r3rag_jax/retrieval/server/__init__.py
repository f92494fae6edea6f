"""The retrieval server of `python -m r3rag_jax.serve`; needs the extra `serve`."""
