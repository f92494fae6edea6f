"""Leaks: held-out questions of which the answer could be known from the questions that a policy learns from.

Two questions leak if they are the same (`questions.identity`), or if they have an answer in common and an entity: they
ask for the same fact in other words. The entities of a question are the passages or articles with its evidence
(`supporting_ids`, `supporting_titles`); where its data set does not say, the names in its text, which are runs of
capitalised words. Answers of yes and no tell no fact. Texts are compared regardless of case, blanks and Unicode form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

from r3rag_jax.data.questions import identity, normal_text
from r3rag_jax.data.records import Records, listed
from r3rag_jax.types import Question

# Each split with those that it must not share questions with. Test questions must not choose a policy either.
PAIRS = (("dev", "sft"), ("dev", "rl"), ("test", "sft"), ("test", "rl"), ("test", "dev"))
VERDICTS = {"yes", "no", "true", "false", "noanswer"}  # answers that many questions about an entity have
OPENERS = frozenset(
    "a an are at by can could did do does during for from had has have how in is of on since the to was were what when "
    "where which who whom whose why will with".split()
)  # words that begin a question, and are capitalised for that reason
PARTICLES = {"of", "the", "de", "la", "von", "van", "and", "al", "du", "da"}  # small words inside a name

QUOTES = "\"'\u00ab\u00bb\u2018\u2019\u201c\u201d"

Kind = Literal["question", "answer and entity"]
Entity = tuple[str, str]  # ("id" or "name", text)


@dataclasses.dataclass(frozen=True)
class Leak:
    """A held-out question (line of its file) and the question (file and line) that it shares something with."""

    kind: Kind
    line: int
    other: str
    shared: str  # the question's text, or the answer and the entity


def find_leaks(held_out: Records[Question], learnt: Records[Question]) -> list[Leak]:
    """The leaks between two splits, at most one a held-out question; that it is the same question comes first."""
    texts: dict[str, int] = {}
    facts: dict[tuple[str, Entity], int] = {}
    for index, question in enumerate(learnt):
        texts.setdefault(identity(question), index)
        for fact in facts_of(question):
            facts.setdefault(fact, index)
    leaks = []
    for line, question in zip(held_out.lines, held_out, strict=True):
        if (text := identity(question)) in texts:
            leaks.append(Leak("question", line, learnt.place(texts[text]), question.question))
            continue
        for fact in facts_of(question):
            if fact in facts:
                answer, (_, entity) = fact
                leaks.append(Leak("answer and entity", line, learnt.place(facts[fact]), f"{answer} of {entity}"))
                break
    return leaks


def facts_of(question: Question) -> list[tuple[str, Entity]]:
    """Every answer of a question with every entity, in a fixed order."""
    answers = dict.fromkeys(normal_text(answer) for answer in question.golden_answers)
    entities = list(_entities(question))
    return [(answer, entity) for answer in answers if answer not in VERDICTS for entity in entities]


def _entities(question: Question) -> Iterator[Entity]:
    titles = question.metadata.get("supporting_titles") or ()
    yield from (("id", id) for id in question.supporting_ids)
    yield from (("name", normal_text(str(title))) for title in titles)
    if not titles and not question.supporting_ids:
        yield from (("name", normal_text(name)) for name in names_in(question.question))


def names_in(text: str) -> list[str]:
    """The names in a question: runs of capitalised words, also with small ones inside, without the word it opens with.

    "Was Ludwig van Beethoven born in Bonn?" has Ludwig van Beethoven and Bonn.
    """
    words = text.split()
    if words and words[0].lower() in OPENERS:
        words = words[1:]
    names: list[str] = []
    run: list[str] = []
    for word in [*words, ""]:
        core = word.strip(QUOTES + "()[],;:?!")
        if core[:1].isupper():
            run.append(core)
            if word.endswith((",", "?", "!", ";", ":", ")")):  # the name ends here
                names.append(" ".join(run))
                run = []
        elif run and core in PARTICLES:
            run.append(core)
        elif run:
            names.append(_without_particles(run))
            run = []
    return [name.removesuffix("'s").removesuffix("\u2019s") for name in names]


def _without_particles(run: list[str]) -> str:
    """A name without the small words behind it."""
    while run[-1] in PARTICLES:
        run = run[:-1]
    return " ".join(run)


def describe(split: str, other: str, held_out: Records[Question], leaks: list[Leak]) -> list[str]:
    """A sentence for each kind of leak that there is."""
    texts = []
    for kind, rule in (("question", "are questions"), ("answer and entity", "share an answer and an entity with one")):
        found = [leak for leak in leaks if leak.kind == kind]
        if found:
            places = [f"line {leak.line} and {leak.other} ({leak.shared})" for leak in found]
            texts.append(
                f"{held_out.path}: {len(found)} of {len(held_out)} questions of data.{split} {rule} of data.{other}: "
                f"{listed(places, ', ', 5)}"
            )
    return texts


def check_leakage(splits: Mapping[str, Records[Question]], pairs: tuple[tuple[str, str], ...] = PAIRS) -> list[str]:
    """What leaks between the splits of a run, a sentence for each pair of them and kind of leak; empty if nothing does.

    Args:
        splits: those of `sft`, `rl`, `dev` and `test` that there are, none of them empty.
    """
    texts = []
    for split, other in pairs:
        if split in splits and other in splits:
            texts += describe(split, other, splits[split], find_leaks(splits[split], splits[other]))
    return texts
