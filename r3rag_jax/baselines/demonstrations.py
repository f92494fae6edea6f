"""Two worked questions, which every baseline that reasons writes in its own form. They are of our own writing."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hop:
    """One step to the answer of a demonstration."""

    document: str  # in the format of a passage's contents
    question: str
    answer: str
    fact: str  # the answer as a sentence


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A question with the steps to its answer."""

    question: str
    hops: tuple[Hop, ...]
    answer: str

    @property
    def documents(self) -> tuple[str, ...]:
        """The documents of all hops."""
        return tuple(hop.document for hop in self.hops)


EIFFEL = Demonstration(
    "Where was the engineer born whose company built the Eiffel Tower?",
    (
        Hop(
            '"Eiffel Tower"\nTower in Paris, built from 1887 to 1889 by the company of Gustave Eiffel.',
            "Whose company built the Eiffel Tower?",
            "Gustave Eiffel",
            "The Eiffel Tower was built by the company of Gustave Eiffel.",
        ),
        Hop(
            '"Gustave Eiffel"\nFrench engineer, born in Dijon in 1832.',
            "Where was Gustave Eiffel born?",
            "Dijon",
            "Gustave Eiffel was born in Dijon.",
        ),
    ),
    "Dijon",
)
RIVERS = Demonstration(
    "Which of the two is longer: the Nile or the Thames?",
    (
        Hop(
            '"Nile"\nRiver in Africa, some 6,650 km long.',
            "How long is the Nile?",
            "6,650 km",
            "The Nile is some 6,650 km long.",
        ),
        Hop(
            '"Thames"\nRiver in England, 346 km long.',
            "How long is the Thames?",
            "346 km",
            "The Thames is 346 km long.",
        ),
    ),
    "Nile",
)
DEMONSTRATIONS = (EIFFEL, RIVERS)
