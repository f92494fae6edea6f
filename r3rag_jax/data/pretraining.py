"""Text for the bundled base model: passages and reading questions of worlds in the `base` realm.

Nothing here is a trajectory, and no name is one that a user's world can hold (see world.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from r3rag_jax.data.world import PASSAGES, RELATIONS, Hop, Region, Split, World, in_order, tell
from r3rag_jax.protocol import reading_prompt
from r3rag_jax.types import Question

# A document: pieces of text, and whether the loss counts each.
Document = list[tuple[str, bool]]
SPLIT: Split = "test"  # questions of every composition, as a large model has met them in its pretraining


def make_world(seed: int) -> World:
    """A small world, left after a few pages: what is true in it is not worth remembering, only reading is."""
    return World.generate(seed, num_people=80, realm="base")


def documents(world: World, rng: random.Random, max_passages: int, num_pages: int = 13) -> Iterator[Document]:
    """Documents of one world that hold up to `max_passages` passages.

    Short ones are passages and facts told in them; from four passages on there are also plain text and passages
    with multi-hop questions, answered at once or behind the facts that they rest on. (A model this small learns to
    look things up from one passage within minutes, from nine hardly at all: pretraining goes from short to long.)
    """
    questions = world.questions(SPLIT, 2 * num_pages)
    facts = _facts_by_passage(world)
    weights = (2, 10, 1) if max_passages >= 4 else (1, 0, 0)
    for _ in range(num_pages):
        kind = rng.choices(("facts", "reading", "text"), weights)[0]
        if kind == "text":
            yield _text(world, rng)
        elif kind == "facts":
            yield _reading(world, rng, rng.randint(1, max_passages), [], facts)
        else:
            asked = rng.sample(questions, 2)
            yield _reading(world, rng, rng.randint(5, max(5, max_passages)), asked, facts)


def _facts_by_passage(world: World) -> dict[str, list[tuple[str, str, str]]]:
    """Passage id -> (entity, relation, value) of every fact that it tells."""
    facts: dict[str, list[tuple[str, str, str]]] = {}
    for region in world.regions.values():
        for (entity, relation), passage_id in region.told_in.items():
            facts.setdefault(passage_id, []).append((entity, relation, region.facts[entity, relation]))
    return facts


def _reading(
    world: World,
    rng: random.Random,
    num_passages: int,
    questions: list[Question],
    facts: dict[str, list[tuple[str, str, str]]],
) -> Document:
    """Passages, then facts told in them: asked for, or said again in other words; and the given questions.

    The loss counts all that follows the passages.
    """
    ids = {int(i) for question in questions for i in question.supporting_ids}
    while len(ids) < num_passages:
        ids.add(rng.randrange(len(world.passages)))
    order = sorted(ids)
    rng.shuffle(order)
    items = [_explained(q) for q in questions]
    items += [f"{reading_prompt(q.question, ())} {q.golden_answers[0]}" for q in questions if rng.random() < 0.5]
    told = [fact for i in order for fact in facts.get(str(i), ())]
    for entity, relation, value in rng.choices(told, k=min(5, 1 + len(told))) if told else ():
        if rng.random() < 0.5:
            question = rng.choice(RELATIONS[relation].questions).format(x=entity)
            items.append(f"{reading_prompt(question, ())} {value}")
        else:
            items.append(Hop(entity, relation, value, "").fact())
    rng.shuffle(items)
    document: Document = [(f"{world.passages[i].contents}\n", False) for i in order]
    return document + [(f"{item}\n", True) for item in items]


def _explained(question: Question) -> str:
    """A reading question whose answer comes behind the facts that it rests on."""
    hops = [Hop(**hop) for hop in question.metadata["decomposition"]]
    facts = [hop.fact() for hop in hops]
    if question.metadata["type"].endswith("comparison"):
        facts.append(in_order(question.question, hops))
    return f"Question: {question.question}\nFacts: {' '.join(facts)}\nAnswer: {question.golden_answers[0]}"


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
