"""Text for the bundled base model: passages and reading questions of worlds in the `base` realm.

Nothing here is a trajectory, and no name is one that a user's world can hold (see world.py).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.text.prompts import reading_prompt
from r3rag_jax.types import Passage, Question
from r3rag_jax.world.encyclopedia import (
    PASSAGES,
    RELATIONS,
    Hop,
    Order,
    Region,
    Split,
    World,
    asked_order,
    earlier_or_later,
    in_order,
    tell,
)

# A document: pieces of text, and whether the loss counts each.
Document = list[tuple[str, bool]]
SPLIT: Split = "test"  # questions of every composition, as a large model has met them in its pretraining
NUM_PAGES = 65  # documents of a world
ORDERS: tuple[Order, Order] = ("earlier", "later")


def make_world(seed: int) -> World:
    """A world that is left after `NUM_PAGES` documents: what is true in it is not worth remembering, reading is."""
    return World.generate(seed, num_people=300, realm="base")


def documents(world: World, rng: random.Random, max_passages: int, num_pages: int = NUM_PAGES) -> Iterator[Document]:
    """Documents of one world that hold up to `max_passages` passages.

        text         passages alone
        facts        passages, and what they tell
        reading      passages, what they tell, and multi-hop questions that they answer
        asked first  a question, and passages that answer it or leave something missing
        one more     a question, what is known of it, and passages that add one fact
        known        a question, what is known of it, and what is missing or the answer

    From four passages on all kinds are drawn, before that `facts` alone. (A model this small learns to look things up
    from one passage within minutes, from nine hardly at all: pretraining goes from short to long.)
    """
    questions = world.questions(SPLIT, 2 * num_pages)
    shelf = _Shelf.of(world)
    weights = {"facts": 1}
    if max_passages >= 4:
        weights = {"text": 1, "facts": 2, "reading": 4, "asked first": 6, "one more": 4, "known": 1}
    for kind in rng.choices(list(weights), list(weights.values()), k=num_pages):
        match kind:
            case "text":
                yield _text(world, rng)
            case "facts":
                yield _reading(shelf, rng, rng.randint(1, max_passages), [])
            case "reading":
                yield _reading(shelf, rng, rng.randint(5, max(5, max_passages)), rng.sample(questions, 2))
            case "asked first":
                yield _asked_first(shelf, rng, rng.randint(2, max(5, max_passages)), rng.choice(questions))
            case "one more":  # short ones come in numbers
                yield from (_one_more(shelf, rng, question) for question in rng.sample(questions, 2))
            case "known":
                yield from (_known(shelf, rng, question) for question in rng.sample(questions, 6))


@dataclasses.dataclass(frozen=True)
class _Shelf:
    """The passages of a world, what they tell, and a retriever that finds them."""

    passages: tuple[Passage, ...]  # by id
    facts: dict[str, list[Hop]]  # passage id -> every fact that it tells
    retriever: Retriever

    @classmethod
    def of(cls, world: World) -> _Shelf:
        facts: dict[str, list[Hop]] = {}
        for region in world.regions.values():
            for (entity, relation), passage_id in region.told_in.items():
                facts.setdefault(passage_id, []).append(region.hop(entity, relation))
        encoder = HashEncoder().fit(passage.contents for passage in world.passages)
        return cls(world.passages, facts, FaissRetriever.of(encoder, world.passages))

    def draw_facts(self, rng: random.Random, count: int) -> list[Hop]:
        """Facts of different passages."""
        return [rng.choice(self.facts[id]) for id in rng.sample(list(self.facts), count)]

    def among_others(
        self, rng: random.Random, ids: set[str], count: int, asked: list[Hop]
    ) -> tuple[Document, list[Hop]]:
        """The passages `ids` among others, `count` in all or more, shuffled, and every fact that they tell.

        The others are what the retriever brings for the facts asked for, mostly about the same entity or one of a
        similar name, and some drawn at random; none of them tells a fact asked for.
        """
        ids, banned = set(ids), {hop.passage_id for hop in asked} - ids
        hits = self.retriever.search([_ask(rng, hop) for hop in asked], 3)
        brought = [hit.passage.id for near in hits for hit in near]
        rng.shuffle(brought)
        while len(ids) < count:
            other = brought.pop() if brought and rng.random() < 0.8 else str(rng.randrange(len(self.passages)))
            if other not in banned:
                ids.add(other)
        order = sorted(ids, key=int)
        rng.shuffle(order)
        pieces = [(f"{self.passages[int(i)].contents}\n", False) for i in order]
        return pieces, [fact for i in order for fact in self.facts.get(i, ())]


def _ask(rng: random.Random, fact: Hop) -> str:
    return rng.choice(RELATIONS[fact.relation].questions).format(x=fact.entity)


def _hops(question: Question) -> list[Hop]:
    return [Hop(**hop) for hop in question.metadata["decomposition"]]


def _reading(shelf: _Shelf, rng: random.Random, num_passages: int, questions: list[Question]) -> Document:
    """Passages, then what they tell, and the given questions.

    The loss counts all that follows the passages.
    """
    asked = [hop for question in questions for hop in _hops(question)]
    asked = asked or shelf.draw_facts(rng, -(-num_passages // 2))
    passages, facts = shelf.among_others(rng, {hop.passage_id for hop in asked}, num_passages, asked)
    items = [f"Question: {q.question}\n{_explained(q, 0, len(_hops(q)))}" for q in questions]
    items += [f"{reading_prompt(q.question, ())} {q.golden_answers[0]}" for q in questions if rng.random() < 0.5]
    items += _told(rng, facts, 5)
    rng.shuffle(items)
    return passages + [(f"{item}\n", True) for item in items]


def _told(rng: random.Random, facts: list[Hop], count: int) -> list[str]:
    """Up to `count` of the facts, asked for or said again in other words, and some years put in order."""
    items = []
    for fact in rng.choices(facts, k=min(count, 1 + len(facts))) if facts else ():
        if rng.random() < 0.5:
            items.append(f"{reading_prompt(_ask(rng, fact), ())} {fact.answer}")
        else:
            items.append(fact.fact())
    for _ in range(rng.randrange(count)):
        asked = rng.choice(ORDERS)
        first, second = rng.sample(range(1800, 2000), 2)
        items.append(f"{earlier_or_later(asked, first, second)}.")
    by_year = {fact.answer: fact for fact in facts if fact.answer.isdigit()}
    if len(by_year) > 1:
        pair = rng.sample(list(by_year.values()), 2)
        items.append(f"{pair[0].fact()} {pair[1].fact()} {in_order(rng.choice(ORDERS), *pair)}")
    return items


def _asked_first(shelf: _Shelf, rng: random.Random, num_passages: int, question: Question) -> Document:
    """A question, passages, what they say to it (in some documents not enough for an answer), other facts."""
    hops = _hops(question)
    num_found = rng.randrange(len(hops)) if rng.random() < 0.15 else len(hops)
    found = {hop.passage_id for hop in hops[:num_found]}
    while num_found < len(hops) and hops[num_found].passage_id in found:
        num_found += 1
    passages, facts = shelf.among_others(rng, found, num_passages, hops)
    asked: Document = [(f"Question: {question.question}\n", False)]
    items = [_explained(question, 0, num_found), *_told(rng, facts, 4)]
    return asked + passages + [(f"{item}\n", True) for item in items]


def _known(shelf: _Shelf, rng: random.Random, question: Question) -> Document:
    """A question, what is known of it so far, what is missing or the answer. The loss counts the last alone."""
    hops = _hops(question)
    num_known = rng.randint(0, len(hops))
    others = [f"{fact.fact()}\n" for fact in shelf.draw_facts(rng, rng.randrange(3)) if fact not in hops]
    known = f"{''.join(others)}Question: {question.question}\n{_facts(question, 0, num_known)}"
    return [(known, False), (f"{_conclusion(question, num_known)}\n", True)]


def _one_more(shelf: _Shelf, rng: random.Random, question: Question) -> Document:
    """A question, what is known of it so far, passages that tell the next fact. The loss counts what they add."""
    hops = _hops(question)
    num_known = rng.randrange(len(hops))
    passages, _ = shelf.among_others(rng, {hops[num_known].passage_id}, rng.randint(2, 4), hops)
    known: Document = [(f"Question: {question.question}\n{_facts(question, 0, num_known)}", False)]
    return known + passages + [(f"{_explained(question, num_known, num_known + 1)}\n", True)]


def _explained(question: Question, start: int, end: int) -> str:
    """The facts start .. end - 1 that the answer rests on, and behind them the answer or what is missing."""
    return _facts(question, start, end) + _conclusion(question, end)


def _facts(question: Question, start: int, end: int) -> str:
    """A line of the facts start .. end - 1 that the answer rests on; behind the last, what a comparison makes of it."""
    hops = _hops(question)
    facts = [hop.fact() for hop in hops[start:end]]
    if end == len(hops) and question.metadata["type"].endswith("comparison"):
        facts.append(in_order(asked_order(question.question), *hops[-2:]))
    return f"Facts: {' '.join(facts)}\n" if facts else ""


def _conclusion(question: Question, num_known: int) -> str:
    """The answer, or the first fact that is missing."""
    hops = _hops(question)
    return f"Missing: {hops[num_known].need()}." if num_known < len(hops) else f"Answer: {question.golden_answers[0]}"


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
