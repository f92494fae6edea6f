"""Retrievers: one protocol, text encoders, a FAISS index, and the choice of the passages that a step shows."""
