"""Experiment trackers that receive a run's metrics in addition to `metrics.jsonl`; `factory.py` lists them."""
