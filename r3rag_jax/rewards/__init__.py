"""Rewards of trajectories: terms (`base.py`), one file each, and the shaping that combines them (`shaping.py`)."""
