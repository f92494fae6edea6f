"""Rewards as jitted batch functions of fixed-shape arrays: answers, format, relevance, shaping."""
