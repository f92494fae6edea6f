"""Rendering for people: trajectories, tables and learning curves, in the terminal and as HTML."""
