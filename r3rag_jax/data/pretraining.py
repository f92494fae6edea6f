"""Text for the bundled base model: passages and reading questions of worlds in the `base` realm.

Nothing here is a trajectory, and no name is one that a user's world can hold (see world.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from r3rag_jax.data.world import PASSAGES, RELATIONS, Hop, Region, Split, World, earlier_or_later, in_order, tell
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

    Short ones are passages and facts told in them; from four passages on there are also plain text and multi-hop
    questions: behind the passages that answer them, or before passages that may answer them or leave something
    missing. (A model this small learns to look things up from one passage within minutes, from nine hardly at all:
    pretraining goes from short to long.)
    """
    questions = world.questions(SPLIT, 2 * num_pages)
    facts = _facts_by_passage(world)
    weights = (2, 4, 7, 1) if max_passages >= 4 else (1, 0, 0, 0)
    for _ in range(num_pages):
        kind = rng.choices(("facts", "reading", "asked first", "text"), weights)[0]
        if kind == "text":
            yield _text(world, rng)
        elif kind == "facts":
            yield _reading(world, rng, rng.randint(1, max_passages), [], facts)
        elif kind == "reading":
            asked = rng.sample(questions, 2)
            yield _reading(world, rng, rng.randint(5, max(5, max_passages)), asked, facts)
        else:
            yield _asked_first(world, rng, rng.randint(2, max(5, max_passages)), rng.choice(questions), facts)


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
    """Passages, then what they tell, and the given questions.

    The loss counts all that follows the passages.
    """
    ids = {id for question in questions for id in question.supporting_ids}
    order = _with_others(world, rng, ids, num_passages)
    items = [f"Question: {q.question}\n{_explained(q)}" for q in questions]
    items += [f"{reading_prompt(q.question, ())} {q.golden_answers[0]}" for q in questions if rng.random() < 0.5]
    items += _told(rng, [fact for i in order for fact in facts.get(i, ())], 5)
    rng.shuffle(items)
    return _passages(world, order) + [(f"{item}\n", True) for item in items]


def _told(rng: random.Random, facts: list[tuple[str, str, str]], count: int) -> list[str]:
    """Up to `count` of the facts, asked for or said again in other words, and some years put in order."""
    items = []
    facts = [fact for fact in facts for _ in range(2 if fact[2].isdigit() else 1)]
    for entity, relation, value in rng.choices(facts, k=min(count, 1 + len(facts))) if facts else ():
        if rng.random() < 0.5:
            question = rng.choice(RELATIONS[relation].questions).format(x=entity)
            items.append(f"{reading_prompt(question, ())} {value}")
        else:
            items.append(Hop(entity, relation, value, "").fact())
    for _ in range(rng.randrange(count)):
        first, second = rng.sample(range(1800, 2000), 2)
        items.append(f"{earlier_or_later(rng.choice(('earlier', 'later')), first, second)}.")
    return items


def _asked_first(
    world: World,
    rng: random.Random,
    num_passages: int,
    question: Question,
    facts: dict[str, list[tuple[str, str, str]]],
) -> Document:
    """A question, passages, what they say to it (in some documents not enough for an answer), other facts."""
    hops = [Hop(**hop) for hop in question.metadata["decomposition"]]
    num_found = rng.randrange(len(hops)) if rng.random() < 0.25 else len(hops)
    found = {hop.passage_id for hop in hops[:num_found]}
    while num_found < len(hops) and hops[num_found].passage_id in found:
        num_found += 1
    order = _with_others(world, rng, found, num_passages, question)
    if num_found == len(hops):
        said = _explained(question)
    else:
        known = f"Facts: {' '.join(hop.fact() for hop in hops[:num_found])}\n" if num_found else ""
        said = f"{known}Missing: {hops[num_found].need()}."
    asked: Document = [(f"Question: {question.question}\n", False)]
    items = [said, *_told(rng, [fact for i in order for fact in facts.get(i, ())], 4)]
    return asked + _passages(world, order) + [(f"{item}\n", True) for item in items]


def _with_others(
    world: World, rng: random.Random, ids: set[str], count: int, question: Question | None = None
) -> list[str]:
    """The passages `ids` among others, `count` in all or more, shuffled.

    With a question, some of the others are about its entities, as retrieved ones are; none of them supports it.
    """
    ids, banned = set(ids), set[str]()
    related: list[str] = []
    if question is not None:
        banned = set(question.supporting_ids)
        entities = {hop["entity"] for hop in question.metadata["decomposition"]}
        told_in = world.regions[SPLIT].told_in
        related = sorted({i for (entity, _), i in told_in.items() if entity in entities} - banned)
    while len(ids) < count:
        other = rng.choice(related) if related and rng.random() < 0.3 else str(rng.randrange(len(world.passages)))
        if other not in banned:
            ids.add(other)
    order = sorted(ids, key=int)
    rng.shuffle(order)
    return order


def _passages(world: World, ids: list[str]) -> Document:
    return [(f"{world.passages[int(i)].contents}\n", False) for i in ids]


def _explained(question: Question) -> str:
    """The facts that the answer rests on, and the answer."""
    hops = [Hop(**hop) for hop in question.metadata["decomposition"]]
    facts = [hop.fact() for hop in hops]
    if question.metadata["type"].endswith("comparison"):
        facts.append(in_order(question.question, hops))
    return f"Facts: {' '.join(facts)}\nAnswer: {question.golden_answers[0]}"


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
