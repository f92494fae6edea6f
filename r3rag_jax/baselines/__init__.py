"""Baselines without training: each is an Env, played by the scheduler of `rollout/`."""
