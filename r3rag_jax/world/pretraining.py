"""Pretraining documents for the bundled base model: passages and questions about them, of worlds in realm `base`.

No document is a trajectory, and no name can occur in the world of a run (see `encyclopedia.py`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from r3rag_jax.retrieval.base import Retriever, search_hits
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
    passage_text,
)

# A document: pieces of text, each with whether its tokens enter the loss.
Document = list[tuple[str, bool]]
SPLIT: Split = "test"  # the split with questions of all compositions, as in the pretraining data of large models
NUM_DOCUMENTS = 65  # documents per world
ORDERS: tuple[Order, Order] = ("earlier", "later")


def make_world(seed: int) -> World:
    """A world for `NUM_DOCUMENTS` documents: too few to memorize its facts, so that the model learns to read."""
    return World.generate(seed, num_people=300, realm="base")


def documents(
    world: World, rng: random.Random, max_passages: int, num_documents: int = NUM_DOCUMENTS
) -> Iterator[Document]:
    """Documents of one world with up to `max_passages` passages each; `num_documents` counts draws of a kind.

        text         passages only
        facts        passages, and facts that they state
        reading      passages, facts that they state, and multi-hop questions that they answer
        asked first  a question, then passages that hold all or only some of its facts
        one more     a question, its facts known so far, and passages with the next fact
        known        a question, its facts known so far, then the missing fact or the answer

    With fewer than four passages, all documents are `facts`. (A model this small learns within minutes to look up facts
    in one passage, but hardly in nine; the curriculum therefore goes from short to long documents.)
    """
    questions = world.questions(SPLIT, 2 * num_documents)
    corpus = _Corpus.of(world)
    weights = {"facts": 1}
    if max_passages >= 4:
        weights = {"text": 1, "facts": 2, "reading": 4, "asked first": 6, "one more": 4, "known": 1}
    for kind in rng.choices(list(weights), list(weights.values()), k=num_documents):
        match kind:
            case "text":
                yield _text(world, rng)
            case "facts":
                yield _reading(corpus, rng, rng.randint(1, max_passages), [])
            case "reading":
                yield _reading(corpus, rng, rng.randint(5, max(5, max_passages)), rng.sample(questions, 2))
            case "asked first":
                yield _asked_first(corpus, rng, rng.randint(2, max(5, max_passages)), rng.choice(questions))
            case "one more":  # these are short, so one draw gives several
                yield from (_one_more(corpus, rng, question) for question in rng.sample(questions, 2))
            case "known":
                yield from (_known(corpus, rng, question) for question in rng.sample(questions, 6))


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """The passages of a world, the facts that they state, and a retriever over them."""

    passages: tuple[Passage, ...]  # by id
    facts: dict[str, list[Hop]]  # passage id -> all facts that it states
    retriever: Retriever

    @classmethod
    def of(cls, world: World) -> _Corpus:
        facts: dict[str, list[Hop]] = {}
        for region in world.regions.values():
            for (entity, relation), passage_id in region.passage_ids.items():
                facts.setdefault(passage_id, []).append(region.hop(entity, relation))
        encoder = HashEncoder().fit(passage.contents for passage in world.passages)
        return cls(world.passages, facts, FaissRetriever.of(encoder, world.passages))

    def sample_facts(self, rng: random.Random, count: int) -> list[Hop]:
        """`count` random facts, each of another passage."""
        return [rng.choice(self.facts[id]) for id in rng.sample(list(self.facts), count)]

    def with_distractors(
        self, rng: random.Random, ids: set[str], count: int, asked: list[Hop]
    ) -> tuple[Document, list[Hop]]:
        """The passages `ids` and distractors, at least `count` in total, shuffled, and all facts that they state.

        Most distractors are retrieved for questions about the facts in `asked`, and are therefore about the same or
        similarly named entities; the others are random. No distractor states a fact in `asked`.
        """
        ids, banned = set(ids), {hop.passage_id for hop in asked} - ids
        hits = search_hits(self.retriever, [_ask(rng, hop) for hop in asked], 3)
        retrieved = [hit.passage.id for near in hits for hit in near]
        rng.shuffle(retrieved)
        while len(ids) < count:
            other = retrieved.pop() if retrieved and rng.random() < 0.8 else str(rng.randrange(len(self.passages)))
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


def _reading(corpus: _Corpus, rng: random.Random, num_passages: int, questions: list[Question]) -> Document:
    """Passages, then facts that they state, and the given questions with answers.

    All text after the passages enters the loss.
    """
    asked = [hop for question in questions for hop in _hops(question)]
    asked = asked or corpus.sample_facts(rng, -(-num_passages // 2))
    passages, facts = corpus.with_distractors(rng, {hop.passage_id for hop in asked}, num_passages, asked)
    items = [f"Question: {q.question}\n{_explained(q, 0, len(_hops(q)))}" for q in questions]
    items += [f"{reading_prompt(q.question, ())} {q.golden_answers[0]}" for q in questions if rng.random() < 0.5]
    items += _restated(rng, facts, 5)
    rng.shuffle(items)
    return passages + [(f"{item}\n", True) for item in items]


def _restated(rng: random.Random, facts: list[Hop], count: int) -> list[str]:
    """Up to `count` of the facts, each as a question or a sentence, and some comparisons of years."""
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


def _asked_first(corpus: _Corpus, rng: random.Random, num_passages: int, question: Question) -> Document:
    """A question, passages, its facts in them (in some documents too few for the answer), and other facts."""
    hops = _hops(question)
    num_found = rng.randrange(len(hops)) if rng.random() < 0.15 else len(hops)
    found = {hop.passage_id for hop in hops[:num_found]}
    while num_found < len(hops) and hops[num_found].passage_id in found:
        num_found += 1
    passages, facts = corpus.with_distractors(rng, found, num_passages, hops)
    asked: Document = [(f"Question: {question.question}\n", False)]
    items = [_explained(question, 0, num_found), *_restated(rng, facts, 4)]
    return asked + passages + [(f"{item}\n", True) for item in items]


def _known(corpus: _Corpus, rng: random.Random, question: Question) -> Document:
    """A question, its facts known so far, and the missing fact or the answer, which alone enters the loss."""
    hops = _hops(question)
    num_known = rng.randint(0, len(hops))
    others = [f"{fact.fact()}\n" for fact in corpus.sample_facts(rng, rng.randrange(3)) if fact not in hops]
    known = f"{''.join(others)}Question: {question.question}\n{_facts(question, 0, num_known)}"
    return [(known, False), (f"{_conclusion(question, num_known)}\n", True)]


def _one_more(corpus: _Corpus, rng: random.Random, question: Question) -> Document:
    """A question, its facts known so far, passages that state the next fact, and that fact, which enters the loss."""
    hops = _hops(question)
    num_known = rng.randrange(len(hops))
    passages, _ = corpus.with_distractors(rng, {hops[num_known].passage_id}, rng.randint(2, 4), hops)
    known: Document = [(f"Question: {question.question}\n{_facts(question, 0, num_known)}", False)]
    return known + passages + [(f"{_explained(question, num_known, num_known + 1)}\n", True)]


def _explained(question: Question, start: int, end: int) -> str:
    """The question's facts start .. end - 1, then the answer or the missing fact."""
    return _facts(question, start, end) + _conclusion(question, end)


def _facts(question: Question, start: int, end: int) -> str:
    """A line with the question's facts start .. end - 1; after the last fact of a comparison, also its result."""
    hops = _hops(question)
    facts = [hop.fact() for hop in hops[start:end]]
    if end == len(hops) and question.metadata["type"].endswith("comparison"):
        facts.append(in_order(asked_order(question.question), *hops[-2:]))
    return f"Facts: {' '.join(facts)}\n" if facts else ""


def _conclusion(question: Question, num_known: int) -> str:
    """The answer, or the first fact that is not known."""
    hops = _hops(question)
    return f"Missing: {hops[num_known].need()}." if num_known < len(hops) else f"Answer: {question.golden_answers[0]}"


def _text(world: World, rng: random.Random) -> Document:
    """Six random passages, each twice in wordings sampled independently, shuffled."""
    region = world.regions[SPLIT]
    chosen = [_choose_passage(rng, region) for _ in range(6)] * 2
    rng.shuffle(chosen)
    document: Document = []
    for kind, entity, index in chosen:
        document += _page(entity, passage_text(rng, region, kind, entity, index)[0])
    return document


def _page(title: str, text: str) -> Document:
    """A passage in the format of the corpus; its title is random, and therefore not in the loss."""
    return [(f'"{title}"\n', False), (f"{text}\n", True)]


def _choose_passage(rng: random.Random, region: Region) -> tuple[str, str, int]:
    """A random (kind of entity, entity, index in PASSAGES[kind])."""
    kind = rng.choice(list(PASSAGES))
    return kind, rng.choice(region.entities[kind]), rng.randrange(len(PASSAGES[kind]))
