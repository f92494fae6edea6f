"""Clients of OpenAI-compatible HTTP servers."""
