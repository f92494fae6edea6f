"""Evaluation: metrics of trajectories, and baselines."""
