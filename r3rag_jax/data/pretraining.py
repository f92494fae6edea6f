"""Text for the bundled base model: passages and reading questions of worlds in the `base` realm.

Nothing here is a trajectory, and no name is one that a user's world can hold (see world.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from r3rag_jax.data.world import PASSAGES, RELATIONS, Region, World, tell
from r3rag_jax.protocol import reading_prompt
from r3rag_jax.types import Question

# A document: pieces of text, and whether the loss counts each.
Document = list[tuple[str, bool]]
SPLIT = "rl"  # no composition that is reserved for test questions


def make_world(seed: int) -> World:
    return World.generate(seed, num_people=240, realm="base")


def documents(
    world: World, rng: random.Random, num_reading: int = 400, num_text: int = 200
) -> Iterator[Document]:
    """Documents of one world in random order: passages to read with questions, and plain passages."""
    questions = world.questions(SPLIT, num_reading * 2)
    kinds = ["reading"] * num_reading + ["text"] * num_text
    rng.shuffle(kinds)
    for kind in kinds:
        yield (
            _reading(world, rng, rng.sample(questions, 2))
            if kind == "reading"
            else _text(world, rng)
        )


def _reading(world: World, rng: random.Random, questions: list[Question]) -> Document:
    """Evidence of two questions among other passages, then these questions and their parts, with answers."""
    ids = {int(i) for question in questions for i in question.supporting_ids}
    while len(ids) < rng.randint(4, 9):
        ids.add(rng.randrange(len(world.passages)))
    order = sorted(ids)
    rng.shuffle(order)
    asked = [(q.question, q.golden_answers[0]) for q in questions]
    for question in questions:
        for hop in question.metadata["decomposition"]:
            text = rng.choice(RELATIONS[hop["relation"]].questions).format(x=hop["entity"])
            asked.append((text, hop["answer"]))
    rng.shuffle(asked)
    passages = [world.passages[i] for i in order]
    document: Document = []
    for number, (text, answer) in enumerate(asked):
        document.append((reading_prompt(text, passages if number == 0 else ()), False))
        document.append((f" {answer}\n", True))
    return document


def _text(world: World, rng: random.Random) -> Document:
    """A page of passages about linked entities, some facts told twice in other words."""
    region = world.regions[SPLIT]
    told = [_about(rng, region) for _ in range(6)]
    lines = [
        f'"{entity}"\n{tell(rng, region, kind, entity, about)[0]}'
        for kind, entity, about in told * 2
    ]
    rng.shuffle(lines)
    return [("".join(f"{line}\n" for line in lines), True)]


def _about(rng: random.Random, region: Region) -> tuple[str, str, int]:
    kind = rng.choice(list(PASSAGES))
    return kind, rng.choice(region.entities[kind]), rng.randrange(len(PASSAGES[kind]))
