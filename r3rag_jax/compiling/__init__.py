"""Reads what XLA compiles for a topology: memory, collectives and time of each program, and whether a recipe fits."""
