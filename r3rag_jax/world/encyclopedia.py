"""A deterministic fictional encyclopedia with multi-hop questions over it: the embedded default data.

`World.generate(seed, ...)` draws people, works, cities, companies and schools, links them by relations,
writes each fact in one of several wordings into passages, and asks questions whose answer is a path
through the relations. What makes it a fair test:

- Entities are dealt to the splits `sft`, `rl`, `dev`, `test` before they are linked, and links never
  cross splits: nothing that a test question asks about, passes through or answers is in a training
  question or a trajectory.
- Of the questions of a world, compositions of relations in `UNSEEN` are asked in test alone; those in
  `RL_ONLY` never have a trajectory. (The base model has read questions of all of them, in worlds of its own.)
- Names are dealt by a hash to two realms: `base` names are used by the worlds on which the bundled
  base model was pretrained, `user` names by every world a run sees. No entity is in both.

Left out on purpose: yes/no questions (a coin flip scores 50) and passages longer than two sentences.
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

MAX_MISSES = 2000  # draws without a new question after which a split is taken to be exhausted
Split = Literal["sft", "rl", "dev", "test"]
Realm = Literal["user", "base"]
Order = Literal["earlier", "later"]
SHARES: dict[Split, float] = {"sft": 0.25, "rl": 0.45, "dev": 0.08, "test": 0.22}
# Share of each question type: (type, number of relations in the chain).
TYPES = {
    "single": 0.15,
    "bridge2": 0.30,
    "bridge3": 0.20,
    "comparison": 0.12,
    "bridge_comparison": 0.23,
}


@dataclasses.dataclass(frozen=True)
class Relation:
    """A directed relation: what it leads to, and how it is said and asked."""

    tail: str
    phrases: tuple[str, ...]  # noun phrases, the first one is the teacher's
    questions: tuple[str, ...]  # the first one is the teacher's query
    in_year: str = ""  # where it leads to a year: what happened then


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

# kind of entity -> passages: (relations told, wordings). A sentence opens with no name and no year: a word that opens
# a line is other tokens than the same word within it.
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
# Compositions (contiguous parts count) that are asked in test alone.
UNSEEN = (
    ("composer", "spouse"), ("director", "school"), ("founder", "birthplace"), ("spouse", "birthyear"),
    ("birthplace", "mayor"), ("setting", "river"),
)  # fmt: skip
# Compositions without trajectories: the policy meets them first in RL.
RL_ONLY = (
    ("author", "school"), ("composer", "birthplace"), ("founder", "school"), ("spouse", "birthplace"),
    ("publisher", "seat"), ("seat", "country"), ("school", "seat"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hop:
    """One look-up of a question: entity -relation-> answer, told by a passage."""

    entity: str
    relation: str
    answer: str
    passage_id: str

    def fact(self) -> str:
        """The fact in a sentence, a year also before whose it is: a comparison looks that up by the year."""
        in_year = f": {self.in_year()}" if RELATIONS[self.relation].in_year else ""
        return f"The{self.need().removeprefix('the')} is {self.answer}{in_year}."

    def in_year(self) -> str:
        return RELATIONS[self.relation].in_year.format(x=self.entity, year=self.answer)

    def need(self) -> str:
        return RELATIONS[self.relation].phrases[0].format(x=self.entity)


def realm_of(name: str) -> Realm:
    """One name in four belongs to the worlds of the base model's pretraining."""
    return "base" if zlib.crc32(name.encode()) % 4 == 0 else "user"


class Names:
    """Draws names that were not drawn before, of one realm."""

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
    """The part of a world that belongs to one split: entities, their facts, where each is told."""

    entities: dict[str, list[str]]
    facts: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    told_in: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)

    def hop(self, entity: str, relation: str) -> Hop:
        return Hop(entity, relation, self.facts[entity, relation], self.told_in[entity, relation])

    def chain(self, entity: str, relations: tuple[str, ...]) -> list[Hop]:
        hops = []
        for relation in relations:
            hops.append(self.hop(entity, relation))
            entity = hops[-1].answer
        return hops


@dataclasses.dataclass(frozen=True)
class World:
    """Passages (shuffled), questions by split, and the regions they were drawn from."""

    passages: tuple[Passage, ...]
    regions: dict[Split, Region]
    split_of: dict[str, Split]  # passage id -> the split whose entity it is about
    seed: int

    @classmethod
    def generate(cls, seed: int, *, num_people: int = 600, realm: Realm = "user") -> World:
        """Build the encyclopedia; the same arguments give the same world, bit for bit."""
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
                region.told_in[name, relation] = str(number)
        return cls(tuple(passages), regions, split_of, seed)

    def questions(self, split: Split, count: int, *, with_trajectories: bool = False) -> list[Question]:
        """`count` different questions of a split; `with_trajectories` keeps to what a teacher covers."""
        rng = random.Random(f"questions {self.seed} {split} {count}")
        allowed = _allowed(split, with_trajectories)
        region, seen = self.regions[split], set[str]()
        shares = {name: share for name, share in TYPES.items() if allowed[name]}
        questions: list[Question] = []
        misses = 0  # in a row
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
    """Draw the entities of a region and every fact about them."""
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


def tell(rng: random.Random, region: Region, kind: str, entity: str, about: int) -> tuple[str, tuple[str, ...]]:
    """One wording of the entity's passage number `about` (see PASSAGES), and the relations it tells."""
    relations, wordings = PASSAGES[kind][about]
    values = {relation: region.facts[entity, relation] for relation in relations}
    return rng.choice(wordings).format(x=entity, **values), relations


def _write(rng: random.Random, region: Region) -> Iterator[tuple[str, str, Region, tuple[str, ...]]]:
    """Passages of a region: (title, text, region, relations told: none for a distractor)."""
    for kind, templates in PASSAGES.items():
        for name in region.entities[kind]:
            for about in range(len(templates)):
                text, relations = tell(rng, region, kind, name, about)
                yield name, text, region, relations
            distractors = DISTRACTORS.get("work" if kind in WORKS else kind, ())
            if distractors and rng.random() < 0.2:
                city, year = rng.choice(region.entities["city"]), rng.randint(1800, 1999)
                yield name, rng.choice(distractors).format(x=name, city=city, year=year), region, ()


def _chains(length: int) -> list[tuple[str, tuple[str, ...]]]:
    """All (kind of start, relations) of a length; people, cities … start a chain as works do."""
    relations_of = {kind: [r for rs, _ in passages for r in rs] for kind, passages in PASSAGES.items()}
    chains: list[tuple[str, tuple[str, ...]]]
    chains = [(kind, (relation,)) for kind, relations in relations_of.items() for relation in relations]
    for _ in range(length - 1):
        chains = [(kind, (*path, step)) for kind, path in chains
                  for step in relations_of.get(RELATIONS[path[-1]].tail, ())
                  if (path[-1], step) != ("spouse", "spouse")]  # fmt: skip
    return chains


def _contains(path: tuple[str, ...], parts: tuple[tuple[str, str], ...]) -> bool:
    return any(pair in parts for pair in itertools.pairwise(path))


def _allowed(split: Split, with_trajectories: bool) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Question type -> compositions that the split may ask."""
    options: dict[str, list[tuple[str, tuple[str, ...]]]] = {
        "single": _chains(1),
        "bridge2": _chains(2),
        "bridge3": _chains(3),
    }
    # Three hops start at a work or a company, as people ask; the rest would be near duplicates.
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
    """Two entities by year. The bridge's answer is a person whom the question does not name."""
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
        said = [rng.choice(RELATIONS[hop.relation].phrases).format(x=hop.entity) for hop in hops]
    else:
        said = pair
    if year == "release":
        text = f"Which came out {'earlier' if is_first else 'later'}, {said[0]} or {said[1]}?"
    else:
        text = f"Who was born {'earlier' if is_first else 'later'}, {said[0]} or {said[1]}?"
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
    """Whether a comparison asks for the earlier of its two years or for the later one."""
    return "earlier" if " earlier," in question else "later"


def in_order(asked: Order, first: Hop, second: Hop) -> str:
    """Which of two years is the one asked for, and what happened in it."""
    is_first = (int(first.answer) < int(second.answer)) == (asked == "earlier")
    chosen = first if is_first else second
    return f"{earlier_or_later(asked, int(first.answer), int(second.answer))}: {chosen.in_year()}."


def earlier_or_later(asked: Order, first: int, second: int) -> str:
    """Which of two years is the one asked for."""
    return f"The {asked} of {first} and {second} is {(min if asked == 'earlier' else max)(first, second)}"


def teach(
    question: Question, rng: random.Random, *, waste: float, haste: float = 0.0, max_steps: int = 5
) -> list[dict[str, Any]]:
    """The teacher's steps for a question: {analysis, query, passage_ids} … {analysis, answer}.

    A share `waste` of the trajectories holds one needless retrieval, as a real teacher's do: it asks
    about another relation of an entity at hand, when the step budget allows. A share `haste` of the comparisons
    ends one look-up early on a guess: those that were right by luck pass the rejection of wrong answers.
    """
    hops = [Hop(**hop) for hop in question.metadata["decomposition"]]
    is_comparison = question.metadata["type"].endswith("comparison")
    is_hasty = is_comparison and rng.random() < haste
    if is_hasty:
        hops = hops[:-1]
    steps: list[dict[str, Any]] = []
    known = ""
    wasteful_at = rng.randrange(len(hops)) if len(hops) + 2 <= max_steps and rng.random() < waste else -1
    for number, hop in enumerate(hops):
        lead = f"{known} Now I need" if known else "I need"
        query = RELATIONS[hop.relation].questions[0].format(x=hop.entity)
        steps.append({"analysis": f"{lead} {hop.need()}.", "query": query, "passage_ids": [hop.passage_id]})
        known = hop.fact()
        if number == wasteful_at:
            query = f"What is known about {hop.entity}?"
            steps.append(
                {
                    "analysis": f"{known} I check {hop.entity} again.",
                    "query": query,
                    "passage_ids": [],
                }
            )
    if is_comparison and not is_hasty:
        first, second = hops[-2:]
        known = f"{first.fact()} {second.fact()} {in_order(asked_order(question.question), first, second)}"
    steps.append({"analysis": known, "answer": question.golden_answers[0]})
    return steps
