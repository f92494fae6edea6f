"""The table of `evaluate habits`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r3rag_jax.data.trajectories import read_recorded
from r3rag_jax.evaluation.flags import habits_parser
from r3rag_jax.evaluation.habits import FOREIGN_WORDS, HABITS, Count, count_habits, foreign_words
from r3rag_jax.reporting.rendering import visible


def print_habits(words: Sequence[str]) -> None:
    """Print how often the trajectories of the files after `habits` show each habit.

    Raises:
        UserError: a file is missing, or a line of it is no trajectory.
    """
    files = habits_parser().parse_args(words).trajectories
    first, *others = [read_recorded(file) for file in files]
    counts = [count_habits(first), *(count_habits(other, known=first) for other in others)]
    Console().print(habits_table([_title(file) for file in files], counts))


def habits_table(titles: Sequence[str], counts: Sequence[Mapping[str, Count]]) -> Table:
    """A row for each habit, a column for each set of trajectories: `12.5 % (5 of 40)`; — where none could show it."""
    habits = HABITS | {FOREIGN_WORDS: foreign_words(())}
    lines = [f"{habit.title}: {habit.definition}; of {habit.of}." for habit in habits.values()]
    table = Table(caption=Text("\n".join(lines), "table.caption"), caption_justify="left", box=None)
    for name in ("", *titles):
        table.add_column(Text(visible(name)), justify="right" if name else "left")
    for name, habit in habits.items():
        table.add_row(habit.title, *(_shown(count.get(name)) for count in counts))
    return table


def _shown(count: Count | None) -> str:
    if count is None or not count.possible:
        return "—"
    return f"{100 * count.shown / count.possible:.1f} % ({count.shown} of {count.possible})"


def _title(file: Path) -> str:
    """`<run>: <name>`."""
    return f"{file.resolve().parent.parent.name}: {file.stem}"
