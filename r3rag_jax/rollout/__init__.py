"""Rollouts: environments, the scheduler of slots and searches, and sampling backends."""
