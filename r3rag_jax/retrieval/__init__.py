"""Retrievers: one protocol, text encoders, a FAISS index, and the choice of what a step shows."""
