"""Habits that a reward may teach without anybody wanting them: how often trajectories show each.

A policy that is paid for documents may search what it has searched, and one that is paid for answers may guess. Each
habit is a share of what could show it (queries, answers, steps), so that trajectories of other lengths compare. Texts
are compared as words in SQuAD's normal form (`rewards.normalization`), supporting passages by id.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from r3rag_jax.evaluation.answer_texts import contains_words
from r3rag_jax.rewards.normalization import normalize_answer
from r3rag_jax.types import Passage, Step, Trajectory

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")  # letters; "o'clock" is one


@dataclasses.dataclass(frozen=True)
class Moment:
    """A step, with what had been written and shown before it."""

    trajectory: Trajectory
    step: Step
    earlier: Sequence[Step]

    @property
    def shown(self) -> list[Passage]:
        """Passages of earlier steps."""
        return [passage for step in self.earlier for passage in step.passages]


@dataclasses.dataclass(frozen=True)
class Habit:
    """A share of `of`, in %.

    Fields:
        applies: whether a step is one of those that could show it.
        shows: whether it does.
    """

    title: str
    definition: str
    of: str
    applies: Callable[[Moment], bool]
    shows: Callable[[Moment], bool]


@dataclasses.dataclass(frozen=True)
class Count:
    """How many of the steps that could show a habit do."""

    shown: int
    possible: int


def _searches(moment: Moment) -> bool:
    return moment.step.query is not None


def _answers_in_words(moment: Moment) -> bool:
    """Whether the step answers something that a passage could hold."""
    return moment.step.answer is not None and normalize_answer(moment.step.answer) not in ("yes", "no", "")


def _evidence_is_known(moment: Moment) -> bool:
    return _searches(moment) and bool(moment.trajectory.question.supporting_ids)


def _repeats(moment: Moment) -> bool:
    earlier = {normalize_answer(step.query) for step in moment.earlier if step.query is not None}
    return normalize_answer(moment.step.query or "") in earlier


def _copies_title(moment: Moment) -> bool:
    titles = {normalize_answer(passage.title) for passage in moment.shown}
    return normalize_answer(moment.step.query or "") in titles


def _guesses(moment: Moment) -> bool:
    """Whether the query names a gold answer that neither the question nor a passage has named."""
    golds = [gold for gold in moment.trajectory.question.golden_answers if normalize_answer(gold) not in ("yes", "no")]
    named = [moment.trajectory.question.question, *(passage.contents for passage in moment.shown)]
    return any(
        contains_words(moment.step.query or "", gold) and not any(contains_words(text, gold) for text in named)
        for gold in golds
    )


def _searches_on(moment: Moment) -> bool:
    return set(moment.trajectory.question.supporting_ids) <= {passage.id for passage in moment.shown}


def _has_no_evidence(moment: Moment) -> bool:
    texts = [moment.trajectory.question.question, *(passage.contents for passage in moment.shown)]
    return not any(contains_words(text, moment.step.answer or "") for text in texts)


HABITS: dict[str, Habit] = {
    "repeated_query": Habit(
        "query repeated", "the query equals an earlier one of its trajectory", "queries", _searches, _repeats
    ),
    "copied_title": Habit(
        "title as query", "the query is the title of a passage that was shown, and nothing else", "queries", _searches,
        _copies_title,
    ),
    "guessed_query": Habit(
        "answer guessed in a query", "the query names a gold answer that neither the question nor a passage has named",
        "queries", _searches, _guesses,
    ),
    "late_search": Habit(
        "search after all evidence", "all supporting passages had been shown before the search",
        "queries of questions with known evidence", _evidence_is_known, _searches_on,
    ),
    "unfounded_answer": Habit(
        "answer without evidence", "neither the question nor a passage that was shown holds the answer's words",
        "answers other than yes and no", _answers_in_words, _has_no_evidence,
    ),
}  # fmt: skip


def foreign_habits(known: Iterable[Trajectory]) -> dict[str, Habit]:
    """The habits of writing what the policy of `known` never writes: words that RL mangles, names that are made up.

    A word counts unless a step of `known` has it, or the question or a passage that was shown before. Case does not
    matter for that; what begins with a capital letter is a name. Digits and signs are no words.
    """
    vocabulary = frozenset(word.lower() for trajectory in known for step in trajectory.steps for word in _written(step))

    def of(is_name: bool) -> Callable[[Moment], bool]:
        def shows(moment: Moment) -> bool:
            written = {word.lower() for word in _written(moment.step) if word[0].isupper() == is_name}
            new = written - vocabulary
            if not new:
                return False
            texts = [moment.trajectory.question.question, *(passage.contents for passage in moment.shown)]
            return bool(new.difference(*({word.lower() for word in _words(text)} for text in texts)))

        return shows

    rule = "that the other system never writes, and no text it was shown"
    return {
        "foreign_words": Habit(
            "words of its own", f"the step has a word in small letters {rule}", "steps", lambda _: True, of(False)
        ),
        "foreign_names": Habit(
            "names of its own", f"the step has a capitalised word {rule}", "steps", lambda _: True, of(True)
        ),
    }


def _written(step: Step) -> Iterator[str]:
    for text in (step.analysis, step.query, step.answer):
        yield from _words(text or "")


def _words(text: str) -> Iterator[str]:
    return (match[0] for match in _WORD.finditer(text))


def count_habits(trajectories: Sequence[Trajectory], known: Sequence[Trajectory] = ()) -> dict[str, Count]:
    """How often trajectories show each habit, by its name, in the order of HABITS.

    Args:
        known: trajectories of another policy, usually the cold start's; with some, `foreign_habits` are counted, too.
    """
    habits = HABITS | (foreign_habits(known) if known else {})
    moments = [
        Moment(trajectory, step, trajectory.steps[:index])
        for trajectory in trajectories
        for index, step in enumerate(trajectory.steps)
    ]
    return {name: _count(habit, moments) for name, habit in habits.items()}


def _count(habit: Habit, moments: Iterable[Moment]) -> Count:
    possible = [moment for moment in moments if habit.applies(moment)]
    return Count(sum(habit.shows(moment) for moment in possible), len(possible))
