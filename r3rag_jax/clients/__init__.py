"""Clients of servers that speak JSON over HTTP."""
