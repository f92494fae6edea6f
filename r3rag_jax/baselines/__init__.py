"""Baselines without training: each is an Env, which the scheduler of `rollout/` runs."""
