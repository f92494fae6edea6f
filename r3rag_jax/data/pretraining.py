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


def documents(world: World, rng: random.Random, num_reading: int = 400, num_text: int = 100) -> Iterator[Document]:
    """Documents of one world in random order: passages to read with questions, and plain passages."""
    questions = world.questions(SPLIT, num_reading * 2)
    facts = _facts_by_passage(world)
    kinds = ["reading"] * num_reading + ["text"] * num_text
    rng.shuffle(kinds)
    for kind in kinds:
        yield _reading(world, rng, rng.sample(questions, 2), facts) if kind == "reading" else _text(world, rng)


def _facts_by_passage(world: World) -> dict[str, list[tuple[str, str, str]]]:
    """Passage id -> (entity, relation, value) of every fact that it tells."""
    facts: dict[str, list[tuple[str, str, str]]] = {}
    for region in world.regions.values():
        for (entity, relation), passage_id in region.told_in.items():
            facts.setdefault(passage_id, []).append((entity, relation, region.facts[entity, relation]))
    return facts


def _reading(
    world: World, rng: random.Random, questions: list[Question], facts: dict[str, list[tuple[str, str, str]]]
) -> Document:
    """Evidence of two questions among other passages, then these questions and simple ones, with answers."""
    ids = {int(i) for question in questions for i in question.supporting_ids}
    while len(ids) < rng.randint(4, 9):
        ids.add(rng.randrange(len(world.passages)))
    order = sorted(ids)
    rng.shuffle(order)
    asked = [(q.question, q.golden_answers[0]) for q in questions]
    told = [fact for i in order for fact in facts.get(str(i), ())]
    for entity, relation, value in rng.sample(told, min(8, len(told))):
        asked.append((rng.choice(RELATIONS[relation].questions).format(x=entity), value))
    rng.shuffle(asked)
    document: Document = []
    for i in order:
        document += _page(world.passages[i].title, world.passages[i].text)
    for text, answer in asked:
        document.append((reading_prompt(text, ()), False))
        document.append((f" {answer}\n", True))
    return document


def _text(world: World, rng: random.Random) -> Document:
    """Passages about linked entities, each fact told twice in other words."""
    region = world.regions[SPLIT]
    told = [_about(rng, region) for _ in range(6)] * 2
    rng.shuffle(told)
    document: Document = []
    for kind, entity, about in told:
        document += _page(entity, tell(rng, region, kind, entity, about)[0])
    return document


def _page(title: str, text: str) -> Document:
    """A passage as the retriever shows it; titles are drawn at random, so the loss leaves them out."""
    return [(f'"{title}"\n', False), (f"{text}\n", True)]


def _about(rng: random.Random, region: Region) -> tuple[str, str, int]:
    kind = rng.choice(list(PASSAGES))
    return kind, rng.choice(region.entities[kind]), rng.randrange(len(PASSAGES[kind]))
