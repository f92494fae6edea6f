"""What tests of retrieval share: a small encyclopedia, the ids of hits, and an encoder whose vectors can be read."""

from __future__ import annotations

import numpy as np

from r3rag_jax.retrieval.base import Hit
from r3rag_jax.types import Passage

ADJECTIVES = ("Silver", "Iron", "Golden", "Hollow", "Crimson", "Silent", "Broken", "Distant")
NOUNS = ("Harbor", "Lantern", "River", "Crown", "Garden", "Mirror", "Tower", "Voyage", "Letter")


def encyclopedia() -> list[Passage]:
    """Three passages for each of 72 films whose titles share their words: maker, setting, music."""
    contents = []
    for number, (adjective, noun) in enumerate((a, n) for a in ADJECTIVES for n in NOUNS):
        title, year = f"The {adjective} {noun}", 1930 + number
        contents += [
            f'"{title}"\n{title} is a film directed by Ann Vol{number} that came out in {year}.',
            f'"{title}"\nThe story of {title} is set in Kal{number}mouth, a harbor on the river.',
            f'"{title}"\nThe music of {title} was composed by Bo Ter{number}.',
        ]
    return [Passage(f"p{number}", content) for number, content in enumerate(contents)]


def ids(hits: list[Hit]) -> list[str]:
    return [hit.passage.id for hit in hits]


class AxisEncoder:
    """A fake encoder: a text of digits is the vector with those coordinates, normalised."""

    dim = 2
    fingerprint = "axis"

    def encode(self, texts, *, kind="query"):
        vectors = np.array([[float(char) for char in text[-2:]] for text in texts], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def save(self, directory):
        """Nothing to remember."""
