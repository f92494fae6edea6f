"""Hugging Face files: reading and writing configurations and weights."""
