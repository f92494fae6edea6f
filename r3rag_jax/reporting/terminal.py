"""Trajectories in a terminal, coloured by their author: whole, or step by step."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r3rag_jax.reporting.rendering import SUPPORT_MARK, facts, outcome, visible
from r3rag_jax.types import Passage, Step, Trajectory

# Named ANSI colours, which the terminal's theme keeps legible on light and dark backgrounds.
STYLES = {
    "analysis": "bright_blue",
    "query": "cyan",
    "answer": "magenta",
    "passage": "yellow",
    "malformed": "red",
    "right": "bold green",
    "wrong": "bold red",
    "none": "bold red",
    "unknown": "dim",
}
MAX_PASSAGE = 300  # characters of a passage
LABELS_WIDTH = 11  # of the column of labels, `★ passage` and `malformed` with it


def print_trajectory(trajectory: Trajectory, console: Console) -> None:
    """Print question, steps, passages and answer, coloured by author, with a legend."""
    grid = new_grid()
    add_question(grid, trajectory.question.question)
    add_outcome(grid, trajectory)
    for number, step in enumerate(trajectory.steps, 1):
        add_number(grid, number)
        add_step(grid, step)
        if step.is_well_formed and step.query is not None:
            add_passages(grid, step.passages, trajectory.question.supporting_ids)
    console.print(grid)
    console.print(Text("\n").append_text(legend()))


def new_grid() -> Table:
    """A table of labels and texts; several below each other line up."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True, min_width=LABELS_WIDTH)
    grid.add_column(overflow="fold")
    return grid


def add_question(grid: Table, question: str) -> None:
    grid.add_row(Text("question", "dim"), Text(visible(question), "bold"))


def add_outcome(grid: Table, trajectory: Trajectory) -> None:
    """How the trajectory ended, and its facts."""
    result = outcome(trajectory)
    heading = Text.assemble((result.label, STYLES[result.kind]), "  ")
    grid.add_row("", heading.append("  ·  ".join(facts(trajectory)), "dim"))


def add_number(grid: Table, number: int) -> None:
    """The heading of step `number`."""
    grid.add_row(Text(f"\nstep {number}", "dim"), "")


def add_step(grid: Table, step: Step) -> None:
    """What the policy wrote in a step."""
    if not step.is_well_formed:
        return add_part(grid, "malformed", step.analysis)
    for kind in ("analysis", "query", "answer"):
        if text := getattr(step, kind):
            add_part(grid, kind, text)
    return None


def add_passages(
    grid: Table,
    passages: Collection[Passage],
    supporting_ids: Collection[str],
    scores: Mapping[str, float] | None = None,
) -> None:
    """What a step's search has found.

    Args:
        scores: id of a passage -> its score, to be shown.
    """
    for passage in passages:
        tail = f"{passage.id} {scores[passage.id]:.3g}" if scores else ""
        add_part(grid, "passage", _short(passage), is_marked=passage.id in supporting_ids, tail=tail)
    if not passages:
        grid.add_row(Text("passage", STYLES["passage"]), Text("nothing new was found", "dim"))


def add_part(grid: Table, kind: str, text: str, *, is_marked: bool = False, tail: str = "") -> None:
    """A text with its label, in the colour of its author; `tail` is dim."""
    style = ("bold " if kind == "answer" else "") + STYLES[kind]
    label = Text.assemble((f"{SUPPORT_MARK} " if is_marked else "", STYLES["right"]), (kind, style))
    shown = Text(visible(text), style)
    grid.add_row(label, shown.append(f"  {visible(tail)}", "dim") if tail else shown)


def _short(passage: Passage) -> str:
    text = passage.contents if passage.text == passage.title else f"{passage.title} — {passage.text}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_PASSAGE else f"{text[: MAX_PASSAGE - 1]}…"


def legend() -> Text:
    """What the colours mean."""
    shown = Text().append("policy ", "dim")
    for kind in ("analysis", "query", "answer"):
        shown.append("■ ", STYLES[kind]).append(f"{kind}  ", "dim")
    shown.append("retriever ", "dim").append("■ ", STYLES["passage"]).append("passage  ", "dim")
    shown.append(f"{SUPPORT_MARK} ", STYLES["right"]).append("supporting  ", "dim")
    return shown.append("■ ", STYLES["malformed"]).append("malformed", "dim")
