"""The table of `evaluate habits`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r3rag_jax.data.trajectories import read_recorded
from r3rag_jax.evaluation.flags import habits_parser
from r3rag_jax.evaluation.habits import HABITS, Count, Habit, count_habits, foreign_habits
from r3rag_jax.reporting.rendering import visible
from r3rag_jax.types import Trajectory


class HabitRow(NamedTuple):
    """A habit and how often each set of trajectories shows it: `12.5 % (5 of 40)`; — where none could."""

    habit: Habit
    texts: list[str]


def print_habits(words: Sequence[str]) -> None:
    """Print how often the trajectories of the files after `habits` show each habit.

    Raises:
        UserError: a file is missing, or a line of it is no trajectory.
    """
    files = habits_parser().parse_args(words).trajectories
    Console().print(habits_table([_title(file) for file in files], habit_rows([read_recorded(file) for file in files])))


def habits_table(titles: Sequence[str], rows: Sequence[HabitRow]) -> Table:
    """The rows for a terminal, with a column for each set of trajectories."""
    lines = [f"{habit.title}: {habit.definition}; of {habit.of}." for habit, _ in rows]
    table = Table(caption=Text("\n".join(lines), "table.caption"), caption_justify="left", box=None)
    for name in ("", *titles):
        table.add_column(Text(visible(name)), justify="right" if name else "left")
    for habit, texts in rows:
        table.add_row(habit.title, *texts)
    return table


def habit_rows(sets: Sequence[Sequence[Trajectory]]) -> list[HabitRow]:
    """Each habit in sets of trajectories, at least one; words and names of its own are what the first never has."""
    first, *others = sets
    counts = [count_habits(first), *(count_habits(other, known=first) for other in others)]
    habits = HABITS | foreign_habits(())
    return [HabitRow(habit, [_shown(count.get(name)) for count in counts]) for name, habit in habits.items()]


def _shown(count: Count | None) -> str:
    if count is None or not count.possible:
        return "—"
    return f"{100 * count.shown / count.possible:.1f} % ({count.shown} of {count.possible})"


def _title(file: Path) -> str:
    """`<run>: <name>`."""
    return f"{file.resolve().parent.parent.name}: {file.stem}"
