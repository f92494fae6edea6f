"""A deterministic fictional encyclopedia with multi-hop questions about it: the bundled default data.

`World.generate(seed, ...)` samples people, works, cities, companies and schools, links them by relations, writes each
fact into a passage in one of several wordings, and generates questions that follow a path of relations. Train and test
data are kept apart as follows:

- Entities are assigned to the splits `sft`, `rl`, `dev`, `test` before they are linked, and links never cross splits:
  no entity in a test question, its answer or its intermediate hops occurs in a training question or trajectory.
- Compositions of relations in `UNSEEN` occur only in test questions; those in `RL_ONLY` have no teacher trajectories.
  (The base model was pretrained on questions of all compositions, in other worlds.)
- A hash assigns each name to one of two realms: `base` for worlds that pretrain the bundled base model, `user` for
  the worlds of runs. No entity is in both.

Left out on purpose: yes/no questions (guessing gets half of them right) and passages longer than two sentences.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import zlib
from collections.abc import Iterator
from typing import Any, Literal

from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Question
from r3rag_jax.world.vocabulary import (
    CITY_ENDS,
    COMPANY_KINDS,
    COUNTRY_ENDS,
    FIRST_NAMES,
    LAST_NAMES,
    RIVER_ENDS,
    ROOTS,
    SCHOOL_KINDS,
    TITLE_ADJECTIVES,
    TITLE_NOUNS,
)

MAX_MISSES = 2000  # consecutive attempts without a new question after which a split counts as exhausted
Split = Literal["sft", "rl", "dev", "test"]
Realm = Literal["user", "base"]
Order = Literal["earlier", "later"]
SHARES: dict[Split, float] = {"sft": 0.25, "rl": 0.45, "dev": 0.08, "test": 0.22}
# Question type -> its share of the questions; the number after `bridge` counts the relations in the chain.
TYPES = {
    "single": 0.15,
    "bridge2": 0.30,
    "bridge3": 0.20,
    "comparison": 0.12,
    "bridge_comparison": 0.23,
}


@dataclasses.dataclass(frozen=True)
class Relation:
    """A directed relation from an entity to a tail (an entity or a year), and its wordings in phrases and questions."""

    tail: str  # kind of the tail: person, city, year, …
    phrases: tuple[str, ...]  # noun phrases for the tail; the teacher uses the first one
    questions: tuple[str, ...]  # the teacher uses the first one as its query
    in_year: str = ""  # if the tail is a year: a clause that says what happened in it


RELATIONS: dict[str, Relation] = {
    "author": Relation("person", ("the author of {x}", "the writer of {x}"),
                       ("Who wrote {x}?", "Who is the author of {x}?")),
    "director": Relation("person", ("the director of {x}", "the person who directed {x}"),
                         ("Who directed {x}?", "Who is the director of {x}?")),
    "composer": Relation("person", ("the composer of {x}", "the person who composed {x}"),
                         ("Who composed {x}?", "Who is the composer of {x}?")),
    "release": Relation("year", ("the release year of {x}",),
                        ("When did {x} come out?", "In which year did {x} come out?"),
                        "in {year} {x} came out"),
    "setting": Relation("city", ("the setting of {x}", "the city where {x} is set"),
                        ("Where is {x} set?", "In which city is {x} set?")),
    "publisher": Relation("company", ("the publisher of {x}", "the company that brought out {x}"),
                          ("Which company brought out {x}?", "Who is the publisher of {x}?")),
    "birthplace": Relation("city", ("the birthplace of {x}", "the city where {x} was born"),
                           ("Where was {x} born?", "In which city was {x} born?")),
    "birthyear": Relation("year", ("the birth year of {x}",),
                          ("When was {x} born?", "In which year was {x} born?"),
                          "in {year} {x} was born"),
    "spouse": Relation("person", ("the spouse of {x}", "the person who married {x}"),
                       ("Who married {x}?", "Who is the spouse of {x}?")),
    "school": Relation("school", ("the school of {x}", "the place where {x} studied"),
                       ("Where did {x} study?", "Which school did {x} attend?")),
    "country": Relation("country", ("the country of {x}",),
                        ("In which country is {x}?", "Which country does {x} belong to?")),
    "river": Relation("river", ("the river of {x}", "the river that flows through {x}"),
                      ("Which river flows through {x}?", "On which river is {x}?")),
    "mayor": Relation("person", ("the mayor of {x}",),
                      ("Who is the mayor of {x}?", "Who governs {x}?")),
    "founder": Relation("person", ("the founder of {x}", "the person who founded {x}"),
                        ("Who founded {x}?", "Who is the founder of {x}?")),
    "seat": Relation("city", ("the seat of {x}", "the city where {x} is based"),
                     ("Where is {x} based?", "In which city is {x} based?")),
}  # fmt: skip

# Kind of entity -> its passages, each as (relations that the passage states, wordings). No sentence starts with a name
# or a year, because a word at the start of a line has other tokens than inside the line.
PASSAGES: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "novel": (
        (("author", "release"), ("The novel {x} by {author} came out in {release}.",
                                 "In {release}, the novel {x} came out. It was written by {author}.",
                                 "The author of {x} is {author}. The release year of {x} is {release}.")),
        (("setting", "publisher"), ("The story of {x} is set in {setting}. It was brought out by {publisher}.",
                                    "The publisher of {x} is {publisher}. The setting of {x} is {setting}.",
                                    "Set in {setting}, {x} was brought out by {publisher}.")),
    ),
    "film": (
        (("director", "release"), ("The film {x} directed by {director} came out in {release}.",
                                   "In {release}, the film {x} came out. It was made by the director {director}.",
                                   "The director of {x} is {director}. The release year of {x} is {release}.")),
        (("setting", "publisher"), ("The plot of {x} is set in {setting}. It was brought out by {publisher}.",
                                    "The publisher of {x} is {publisher}. The setting of {x} is {setting}.",
                                    "Set in {setting}, {x} was brought out by {publisher}.")),
    ),
    "opera": (
        (("composer", "release"), ("The opera {x} composed by {composer} came out in {release}.",
                                   "In {release}, the opera {x} came out. It is by the composer {composer}.",
                                   "The composer of {x} is {composer}. The release year of {x} is {release}.")),
        (("setting", "publisher"), ("The plot of {x} is set in {setting}. It was brought out by {publisher}.",
                                    "The publisher of {x} is {publisher}. The setting of {x} is {setting}.",
                                    "Set in {setting}, {x} was brought out by {publisher}.")),
    ),
    "person": (
        (("birthplace", "birthyear"), ("Born in {birthplace} in {birthyear}, {x} grew up there.",
                                       "In {birthyear}, {x} was born in {birthplace}.",
                                       "The birthplace of {x} is {birthplace}. The birth year of {x} is {birthyear}.")),
        (("school", "spouse"), ("As a student, {x} went to {school}. Later {x} married {spouse}.",
                                "The spouse of {x} is {spouse}. The school of {x} is {school}.",
                                "After studying at {school}, {x} married {spouse}.")),
    ),
    "city": (
        (("country", "river"), ("The city {x} in {country} is on the river {river}.",
                                "The river {river} flows through {x}, a city in {country}.",
                                "The country of {x} is {country}. The river of {x} is the {river}.")),
        (("mayor",), ("The mayor of {x} is {mayor}.", "The city {x} is governed by {mayor}.")),
    ),
    "company": (
        (("founder", "seat"), ("The company {x} is based in {seat}. It was founded by {founder}.",
                               "The founder of {x} is {founder}. The seat of {x} is {seat}.",
                               "Founded by {founder}, {x} is a company based in {seat}.")),
    ),
    "school": (
        (("seat",), ("In {seat} there is a school, {x}.", "The seat of {x} is {seat}.",
                     "The school {x} is based in {seat}.")),
    ),
}  # fmt: skip
DISTRACTORS = {
    "person": ("A street in {city} is named after {x}.", "In {year}, {x} gave a talk in {city}."),
    "work": ("A prize was given to {x} in {year}.", "A copy of {x} is kept in {city}."),
    "city": ("A fair was held in {x} in {year}.", "Many visitors come to {x} by train."),
}

WORKS = ("novel", "film", "opera")
CREATOR = {"novel": "author", "film": "director", "opera": "composer"}
CREATORS = tuple(CREATOR.values())
# Pairs of consecutive relations that occur only in test questions, alone or inside a longer chain.
UNSEEN = (
    ("composer", "spouse"), ("director", "school"), ("founder", "birthplace"), ("spouse", "birthyear"),
    ("birthplace", "mayor"), ("setting", "river"),
)  # fmt: skip
# Pairs of consecutive relations without teacher trajectories: the policy sees them first in RL.
RL_ONLY = (
    ("author", "school"), ("composer", "birthplace"), ("founder", "school"), ("spouse", "birthplace"),
    ("publisher", "seat"), ("seat", "country"), ("school", "seat"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hop:
    """One hop of a question: entity -relation-> answer, and the passage that states it."""

    entity: str
    relation: str
    answer: str
    passage_id: str

    def fact(self) -> str:
        """The fact as a sentence; a year is followed by `in YEAR ENTITY …`, so that comparisons can find it by year."""
        in_year = f": {self.in_year()}" if RELATIONS[self.relation].in_year else ""
        return f"The{self.need().removeprefix('the')} is {self.answer}{in_year}."

    def in_year(self) -> str:
        """What happened in the year that the hop leads to, e.g. `in 1912 X was born`."""
        return RELATIONS[self.relation].in_year.format(x=self.entity, year=self.answer)

    def need(self) -> str:
        """The answer as a noun phrase that does not give it away, e.g. `the author of X`."""
        return RELATIONS[self.relation].phrases[0].format(x=self.entity)


def realm_of(name: str) -> Realm:
    """The realm of a name; one name in four is in `base`, the realm of the base model's pretraining."""
    return "base" if zlib.crc32(name.encode()) % 4 == 0 else "user"


class Names:
    """Samples unused names of one realm."""

    def __init__(self, rng: random.Random, realm: Realm):
        self._rng, self._realm, self._used = rng, realm, set[str]()

    def draw(self, kind: str) -> str:
        for _ in range(10_000):
            name = self._candidate(kind)
            if name not in self._used and realm_of(name) == self._realm:
                self._used.add(name)
                return name
        raise UserError(
            "world.num_people must leave every entity a name of its own; "
            f"got none for a {kind} after {len(self._used)} entities"
        )

    def _candidate(self, kind: str) -> str:
        pick = self._rng.choice
        match kind:
            case "person":
                return f"{pick(FIRST_NAMES)} {pick(LAST_NAMES)}"
            case "novel" | "film" | "opera":
                return f"The {pick(TITLE_ADJECTIVES)} {pick(TITLE_NOUNS)}"
            case "company":
                return f"{pick(ROOTS)} {pick(COMPANY_KINDS)}"
            case "school":
                return f"{pick(ROOTS)} {pick(SCHOOL_KINDS)}"
            case "city":
                return f"{pick(ROOTS)}{pick(CITY_ENDS)}"
            case "country":
                return f"{pick(ROOTS)}{pick(COUNTRY_ENDS)}"
            case "river":
                return f"{pick(ROOTS)}{pick(RIVER_ENDS)}"
            case _:
                raise ValueError(f"unknown kind of entity {kind!r}")


@dataclasses.dataclass
class Region:
    """The entities of one split, their facts, and the passage that states each fact."""

    entities: dict[str, list[str]]  # kind -> names
    facts: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)  # (entity, relation) -> tail
    passage_ids: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)  # (entity, relation) -> passage

    def hop(self, entity: str, relation: str) -> Hop:
        return Hop(entity, relation, self.facts[entity, relation], self.passage_ids[entity, relation])

    def chain(self, entity: str, relations: tuple[str, ...]) -> list[Hop]:
        """The hops from an entity along the relations."""
        hops = []
        for relation in relations:
            hops.append(self.hop(entity, relation))
            entity = hops[-1].answer
        return hops


@dataclasses.dataclass(frozen=True)
class World:
    """Passages in random order, and the regions about which questions are asked, one per split."""

    passages: tuple[Passage, ...]
    regions: dict[Split, Region]
    split_of: dict[str, Split]  # passage id -> split of the entity that the passage is about
    seed: int

    @classmethod
    def generate(cls, seed: int, *, num_people: int = 600, realm: Realm = "user") -> World:
        """Generate a world; equal arguments give equal worlds."""
        rng = random.Random(f"world {seed} {num_people} {realm}")
        names = Names(rng, realm)
        regions: dict[Split, Region] = {}
        texts: list[tuple[str, str, Region, tuple[str, ...]]] = []
        for split, share in SHARES.items():
            region = _link(rng, names, max(8, round(share * num_people)))
            regions[split] = region
            texts += _write(rng, region)
        rng.shuffle(texts)
        passages, split_of = [], dict[str, Split]()
        owner = {id(region): split for split, region in regions.items()}
        for number, (name, text, region, relations) in enumerate(texts):
            passages.append(Passage(str(number), f'"{name}"\n{text}'))
            split_of[str(number)] = owner[id(region)]
            for relation in relations:
                region.passage_ids[name, relation] = str(number)
        return cls(tuple(passages), regions, split_of, seed)

    def questions(self, split: Split, count: int, *, with_trajectories: bool = False) -> list[Question]:
        """`count` distinct questions of a split; `with_trajectories` excludes the compositions in `RL_ONLY`.

        Raises:
            UserError: the split has fewer questions.
        """
        rng = random.Random(f"questions {self.seed} {split} {count}")
        allowed = _allowed(split, with_trajectories)
        region, seen = self.regions[split], set[str]()
        shares = {name: share for name, share in TYPES.items() if allowed[name]}
        questions: list[Question] = []
        misses = 0  # consecutive
        while len(questions) < count and misses < MAX_MISSES:
            misses += 1
            kind = rng.choices(list(shares), weights=list(shares.values()))[0]
            question = _ask(rng, region, kind, rng.choice(allowed[kind]), f"{split}-{len(questions)}")
            if question is not None and question.question not in seen:
                seen.add(question.question)
                questions.append(question)
                misses = 0
        if len(questions) < count:
            raise UserError(
                f"world.num_{split} must be at most what the split holds; got {count}, "
                f"and only {len(questions)} were found: raise world.num_people"
            )
        return questions


def _link(rng: random.Random, names: Names, num_people: int) -> Region:
    """Sample the entities of a region and all facts about them."""
    sizes = {"person": num_people, "novel": num_people // 4, "film": num_people // 4, "opera": num_people // 4,
             "company": max(4, num_people // 6), "school": max(4, num_people // 10),
             "city": max(6, num_people // 5), "country": 6, "river": max(4, num_people // 8)}  # fmt: skip
    region = Region({kind: [names.draw(kind) for _ in range(size)] for kind, size in sizes.items()})
    people = region.entities["person"]
    couples = rng.sample(people, len(people))
    spouses = dict(zip(couples, couples[1:] + couples[:1], strict=True))
    for kind, passages in PASSAGES.items():
        for name, relation in itertools.product(region.entities[kind], [r for rs, _ in passages for r in rs]):
            tail = RELATIONS[relation].tail
            if relation == "spouse":
                value = spouses[name]
            elif tail == "year":
                value = str(rng.randint(1800, 1999))
            else:
                value = rng.choice(region.entities[tail])
            region.facts[name, relation] = value
    return region


def passage_text(rng: random.Random, region: Region, kind: str, entity: str, index: int) -> tuple[str, tuple[str, ...]]:
    """A random wording of the entity's passage PASSAGES[kind][index], and the relations that the passage states."""
    relations, wordings = PASSAGES[kind][index]
    values = {relation: region.facts[entity, relation] for relation in relations}
    return rng.choice(wordings).format(x=entity, **values), relations


def _write(rng: random.Random, region: Region) -> Iterator[tuple[str, str, Region, tuple[str, ...]]]:
    """Passages of a region as (title, text, region, relations stated); a distractor states none."""
    for kind, templates in PASSAGES.items():
        for name in region.entities[kind]:
            for index in range(len(templates)):
                text, relations = passage_text(rng, region, kind, name, index)
                yield name, text, region, relations
            distractors = DISTRACTORS.get("work" if kind in WORKS else kind, ())
            if distractors and rng.random() < 0.2:
                city, year = rng.choice(region.entities["city"]), rng.randint(1800, 1999)
                yield name, rng.choice(distractors).format(x=name, city=city, year=year), region, ()


def _chains(length: int) -> list[tuple[str, tuple[str, ...]]]:
    """All chains of `length` relations as (kind of the first entity, relations); any kind can be first."""
    relations_of = {kind: [r for rs, _ in passages for r in rs] for kind, passages in PASSAGES.items()}
    chains: list[tuple[str, tuple[str, ...]]]
    chains = [(kind, (relation,)) for kind, relations in relations_of.items() for relation in relations]
    for _ in range(length - 1):
        chains = [(kind, (*path, step)) for kind, path in chains
                  for step in relations_of.get(RELATIONS[path[-1]].tail, ())
                  if (path[-1], step) != ("spouse", "spouse")]  # fmt: skip
    return chains


def _contains(path: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> bool:
    return any(pair in pairs for pair in itertools.pairwise(path))


def _allowed(split: Split, with_trajectories: bool) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Question type -> compositions that questions of the split may have, as (kind of the first entity, path)."""
    options: dict[str, list[tuple[str, tuple[str, ...]]]] = {
        "single": _chains(1),
        "bridge2": _chains(2),
        "bridge3": _chains(3),
    }
    # Three-hop questions start at a work or a company; other starts would give near duplicates.
    options["bridge3"] = [(k, p) for k, p in options["bridge3"] if k in (*WORKS, "company")]
    options["comparison"] = [
        ("work", ("comparison", "release")),
        ("person", ("comparison", "birthyear")),
    ]
    options["bridge_comparison"] = [("work", ("bridge_comparison", "creator")),
                                    ("company", ("bridge_comparison", "founder"))]  # fmt: skip
    banned = () if split == "test" else UNSEEN + (RL_ONLY if with_trajectories else ())
    return {kind: [(k, p) for k, p in chains if not _contains(p, banned)] for kind, chains in options.items()}


def _ask(
    rng: random.Random, region: Region, kind: str, composition: tuple[str, tuple[str, ...]], id: str
) -> Question | None:
    """A random question of a composition; None if its path visits an entity twice or the compared years are equal."""
    start, path = composition
    if path[0] in ("comparison", "bridge_comparison"):
        return _compare(rng, region, start, path, id)
    hops = region.chain(rng.choice(region.entities[start]), path)
    visited = [hops[0].entity] + [hop.answer for hop in hops]
    if len(set(visited)) < len(visited):
        return None
    phrase = hops[0].entity
    for hop in hops[:-1]:
        phrase = rng.choice(RELATIONS[hop.relation].phrases).format(x=phrase)
    text = rng.choice(RELATIONS[path[-1]].questions).format(x=phrase)
    kind = "single" if kind == "single" else "bridge"
    return _question(id, text, hops[-1].answer, kind, path, hops)


def _compare(rng: random.Random, region: Region, start: str, path: tuple[str, ...], id: str) -> Question | None:
    """A question that compares two entities by year; in a bridge comparison, two people whom the question describes."""
    kinds = rng.choices(WORKS, k=2) if start == "work" else [start, start]
    pair = [rng.choice(region.entities[kind]) for kind in kinds]
    is_bridge = path[0] == "bridge_comparison"
    hops, names = [], pair
    if is_bridge:
        relations = [CREATOR.get(kind, "founder") for kind in kinds]
        hops = [region.hop(entity, relation) for entity, relation in zip(pair, relations, strict=True)]
        names = [hop.answer for hop in hops]
    year = "release" if path[1] == "release" else "birthyear"
    last = [region.hop(name, year) for name in names]
    years = [int(hop.answer) for hop in last]
    if len(set(names)) < 2 or len(set(pair)) < 2 or years[0] == years[1]:
        return None
    is_first = rng.random() < 0.5
    answer = names[years.index(min(years) if is_first else max(years))]
    if is_bridge:
        phrases = [rng.choice(RELATIONS[hop.relation].phrases).format(x=hop.entity) for hop in hops]
    else:
        phrases = pair
    if year == "release":
        text = f"Which came out {'earlier' if is_first else 'later'}, {phrases[0]} or {phrases[1]}?"
    else:
        text = f"Who was born {'earlier' if is_first else 'later'}, {phrases[0]} or {phrases[1]}?"
    return _question(id, text, answer, path[0], path, hops + last)


def _question(id: str, text: str, answer: str, kind: str, path: tuple[str, ...], hops: list[Hop]) -> Question:
    is_unseen = _contains(path, UNSEEN)
    metadata: dict[str, Any] = {
        "type": kind,
        "composition": ">".join(path),
        "hops": len(hops),
        "unseen": is_unseen,
        "supporting_ids": [hop.passage_id for hop in hops],
        "decomposition": [dataclasses.asdict(hop) for hop in hops],
    }
    return Question(id, text, (answer,), metadata)


def asked_order(question: str) -> Order:
    """Whether a comparison asks for the earlier or the later of its two years."""
    return "earlier" if " earlier," in question else "later"


def in_order(asked: Order, first: Hop, second: Hop) -> str:
    """A sentence that says which of two years is the earlier or later one, and what happened in it."""
    is_first = (int(first.answer) < int(second.answer)) == (asked == "earlier")
    chosen = first if is_first else second
    return f"{earlier_or_later(asked, int(first.answer), int(second.answer))}: {chosen.in_year()}."


def earlier_or_later(asked: Order, first: int, second: int) -> str:
    """A clause that says which of two years is the earlier or later one."""
    return f"The {asked} of {first} and {second} is {(min if asked == 'earlier' else max)(first, second)}"
