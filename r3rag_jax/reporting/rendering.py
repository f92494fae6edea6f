"""Renders trajectories, coloured by their author, and tables of results.

Both exist as HTML fragments for the report and notebooks, and for a terminal (rich): the tables here, trajectories in
`terminal.py`. Text of the policy is blue or violet, passages are ochre, and malformed steps are red; every block also
has a label, so that no information depends on colour alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from rich.table import Table
from rich.text import Text

from r3rag_jax.evaluation.fingerprint import describe, differences
from r3rag_jax.evaluation.groups import ALL, SEEN, UNSEEN
from r3rag_jax.evaluation.metrics import metric_of
from r3rag_jax.evaluation.statistics import wilson
from r3rag_jax.rewards.normalization import normalize_answer
from r3rag_jax.types import Passage, Status, Trajectory

Eval = Mapping[str, Any]  # the content of eval/<system>.json

SUPPORT_MARK = "★"
HTML_PASSAGE = 260  # in HTML, passages with more characters are collapsed

# metric of eval/<system>.json, column title, description, decimals, whether the largest value is best
Column = tuple[str, str, str, int, bool]
COLUMNS: tuple[Column, ...] = (
    ("em", "EM", "exact match, %", 1, True),
    ("f1", "F1", "word overlap, %", 1, True),
    ("cover_em", "cover-EM", "the answer contains a gold answer, %", 1, True),
    ("acc", "ACC", "exact match, or correct according to the judge, %", 1, True),
    ("candidate_em", "candidate EM", "a judge reads off an answer that matches exactly, %", 1, True),
    ("retrievals", "retrievals", "searches per question", 2, False),
    ("support_found", "support", "supporting passages found, %", 1, True),
    ("tokens_per_correct", "tokens/correct", "tokens written per correct answer", 0, False),
    ("context_full", "full", "trajectories whose context was full before an answer, %", 1, False),
    ("num", "n", "questions", 0, False),
)
OPTIONAL = ("acc", "candidate_em")  # columns shown only if an evaluation has the metric
SAMPLED = ("pass@", "majority@")  # columns of evaluations with several samples per question begin so
RARE = ("context_full",)  # columns shown only if an evaluation has a value other than 0
LABELS = {Status.FORMAT_ERROR: "✗ malformed step", Status.CONTEXT_FULL: "✗ context full"}  # others: no answer


# ------------------------------------------------------------------------------------ trajectories


class Outcome(NamedTuple):
    """How a trajectory ended; correctness is exact match."""

    kind: str  # right, wrong, none (no answer, for whatever reason), unknown (no gold answers to compare)
    label: str


def outcome(trajectory: Trajectory) -> Outcome:
    """Compare the answer with the gold answers, after SQuAD normalisation."""
    if trajectory.answer is None:
        return Outcome("none", LABELS.get(trajectory.status, "✗ no answer"))
    golds = trajectory.question.golden_answers
    if not golds:
        return Outcome("unknown", "answered")
    given = normalize_answer(trajectory.answer)
    is_right = given in {normalize_answer(gold) for gold in golds}
    return Outcome("right", "✓ right") if is_right else Outcome("wrong", "✗ wrong")


def is_correct(trajectory: Trajectory) -> bool:
    """Exact match with a gold answer; a missing answer counts as wrong."""
    return outcome(trajectory).kind == "right"


def facts(trajectory: Trajectory) -> list[str]:
    """Short facts for a heading: gold answers, question type, number of retrievals, supporting passages found."""
    question = trajectory.question
    result = []
    if question.golden_answers:
        result.append(f"gold: {' / '.join(question.golden_answers)}")
    if "type" in question.metadata:
        result.append(pretty(str(question.metadata["type"])))
    count = trajectory.num_retrievals
    result.append(f"{count} retrieval{'' if count == 1 else 's'}")
    if supporting := set(question.supporting_ids):
        found = len(supporting & set(trajectory.retrieved_ids))
        result.append(f"{SUPPORT_MARK} {found} of {len(supporting)} supporting passages found")
    return [visible(fact) for fact in result]


def is_supporting(passage: Passage, trajectory: Trajectory) -> bool:
    return passage.id in trajectory.question.supporting_ids


_PICTURES = {code: 0x2400 + code for code in range(32) if code not in b"\n\t"} | {127: 0x2421}


def visible(text: str) -> str:
    """Replace control characters by their Unicode pictures (ESC -> ␛), so that a terminal prints all of the text."""
    if text.isprintable():
        return text
    return text.translate(_PICTURES).encode("utf-8", "replace").decode("utf-8")


def pretty(name: str) -> str:
    """A metadata or metric name as words: bridge_comparison -> bridge comparison."""
    return name.replace("_", " ")


def trajectory_html(trajectory: Trajectory) -> str:
    """A trajectory as an HTML fragment with style and legend, for a notebook."""
    return environment().get_template("fragment.html.j2").render(trajectory=trajectory)


# ------------------------------------------------------------------------------------------ tables


class Cell(NamedTuple):
    """One number of a table as text; percent and margin are set if it is a share of questions."""

    text: str
    is_best: bool = False
    percent: float | None = None
    margin: str = ""  # half-width of the 95 % interval


class Row(NamedTuple):
    title: str
    cells: list[Cell]


def columns_of(evals: Sequence[Eval]) -> list[Column]:
    """The columns of the results table of these evaluations: COLUMNS without those that say nothing of any of them."""
    measured = [item for evaluation in evals for item in evaluation["groups"].get("all", {}).items()]
    hidden = {*OPTIONAL, *RARE} - {name for name, value in measured if name not in RARE or value}
    columns = [column for column in COLUMNS if column[0] not in hidden]
    of_samples = dict.fromkeys(name for name, _ in measured if name.startswith(SAMPLED))
    at = next(number for number, column in enumerate(columns) if column[0] == "retrievals")
    found = [(name, metric_of(name).title, f"{metric_of(name).definition}, %", 1, True) for name in of_samples]
    return [*columns[:at], *found, *columns[at:]]


def result_rows(evals: Sequence[Eval]) -> list[Row]:
    """One row per system: the metrics of `columns_of` over all questions."""
    whole = [evaluation["groups"].get("all", {}) for evaluation in evals]
    columns = []
    for name, _, _, decimals, largest_is_best in columns_of(evals):
        values = [metrics.get(name) for metrics in whole]
        margins = [margin_of(evaluation) for evaluation in evals] if name == "em" else None
        columns.append(_column(values, decimals, largest_is_best, margins))
    return _rows(evals, columns)


def group_rows(evals: Sequence[Eval]) -> tuple[list[str], list[Row]]:
    """Titles of the groups with their numbers of questions, and rows with EM of each system in each group."""
    names = sorted({name: 0 for e in evals for name in e["groups"]}, key=_group_order)
    titles, columns = [], []
    for name in names:
        groups = [evaluation["groups"].get(name, {}) for evaluation in evals]
        sizes = sorted({int(group["num"]) for group in groups if "num" in group})
        titles.append(f"{pretty(name)}\n{'-'.join(map(str, sizes))}")
        columns.append(_column([group.get("em") for group in groups], 1, True, None))
    return titles, _rows(evals, columns)


def _group_order(name: str) -> int:
    """Sort key: all questions first, then the question types in file order, then unseen and seen compositions."""
    return {ALL: 0, UNSEEN: 2, SEEN: 3}.get(name, 1)


def _column(
    values: Sequence[float | None], decimals: int, largest_is_best: bool, margins: list[float | None] | None
) -> list[Cell]:
    known = [value for value in values if value is not None]
    best = max(known) if largest_is_best and len(set(known)) > 1 else None
    cells = []
    for index, value in enumerate(values):
        if value is None:
            cells.append(Cell("—"))
            continue
        half = margins[index] if margins else None
        margin = "" if half is None else f"±{half:.1f}"
        text = f"{value:,.{decimals}f}"
        cells.append(Cell(text, value == best, value if margins else None, margin))
    return cells


def _rows(evals: Sequence[Eval], columns: Sequence[list[Cell]]) -> list[Row]:
    return [Row(title_of(e), [column[index] for column in columns]) for index, e in enumerate(evals)]


def margin_of(evaluation: Eval) -> float | None:
    """Half the width of EM's 95 % interval over all questions, in percentage points; None without a question.

    Of a result that says nothing of intervals, Wilson's.
    """
    whole = evaluation["groups"].get(ALL, {})
    if not whole.get("num") or whole.get("em") is None:
        return None
    bounds = evaluation.get("intervals", {}).get("em")
    if bounds is None:
        bounds = [100 * bound for bound in wilson(whole["em"] / 100 * whole["num"], whole["num"])]
    return (bounds[1] - bounds[0]) / 2


def comparable_sets(evals: Sequence[Eval]) -> list[list[Eval]]:
    """The evaluations that one table may compare, in the order in which the first of each set comes."""
    sets: list[list[Eval]] = []
    for evaluation in evals:
        facts = evaluation.get("fingerprint", {})
        for members in sets:
            if not any(differences(member.get("fingerprint", {}), facts) for member in members):
                members.append(evaluation)
                break
        else:
            sets.append([evaluation])
    return sets


def not_comparable(evals: Sequence[Eval]) -> list[str]:
    """A sentence for each evaluation that differs from one before it in more than system and policy."""
    sentences = []
    for number, other in enumerate(evals):
        for first in evals[:number]:
            facts = first.get("fingerprint", {}), other.get("fingerprint", {})
            if keys := differences(*facts):
                names = " is not comparable with ".join(map(title_of, (other, first)))
                sentences.append(f"{names}: they differ in {pretty(describe(*facts, keys))}.")
                break
    return sentences


def title_of(evaluation: Eval) -> str:
    return str(evaluation.get("title") or evaluation["system"])


def all_tables(evals: Sequence[Eval]) -> list[Table]:
    """The tables that the eval phase prints: two of each comparable set; what is apart is said under the first."""
    sets = comparable_sets(evals)
    notes = [not_comparable(evals)] + [[] for _ in sets[1:]]
    pairs = [(results_table(members, note), groups_table(members)) for members, note in zip(sets, notes, strict=False)]
    return [table for pair in pairs for table in pair]


def results_table(evals: Sequence[Eval], notes: Sequence[str] = ()) -> Table:
    """Systems and their metrics over all questions, for a terminal; the best value is bold.

    Args:
        evals: a comparable set.
        notes: sentences under the table.
    """
    caption = "\n".join(["EM ± half the 95 % interval", *notes])
    return _table("Results", [title for _, title, *_ in columns_of(evals)], result_rows(evals), caption)


def groups_table(evals: Sequence[Eval]) -> Table:
    """EM by group of questions, for a terminal; the size of a group is under its name."""
    titles, rows = group_rows(evals)
    return _table("EM by group", titles, rows, None)


def _table(title: str, columns: Sequence[str], rows: Sequence[Row], caption: str | None) -> Table:
    # As Text, in which no word is markup: names of groups and results are the user's.
    shown = None if caption is None else Text(visible(caption), "table.caption")
    table = Table(title=title, caption=shown, title_justify="left", caption_justify="left", box=None)
    table.add_column("")
    for name in columns:
        table.add_column(Text(visible(name)), justify="right")
    for row in rows:
        cells = []
        for cell in row.cells:
            text = Text(cell.text, "bold" if cell.is_best else "")
            cells.append(text.append(f" {cell.margin}", "dim") if cell.margin else text)
        table.add_row(Text(visible(row.title)), *cells)
    return table


def results_html(evals: Sequence[Eval]) -> str:
    """Both tables as an HTML fragment with style, for a notebook."""
    return environment().get_template("tables.html.j2").render(evals=evals)


# --------------------------------------------------------------------------------------- templates


@functools.cache
def environment() -> jinja2.Environment:
    """The Jinja environment of the package's templates; inserted text is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("r3rag_jax.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (
        outcome, facts, is_supporting, visible, pretty, columns_of, result_rows, group_rows, not_comparable,
        comparable_sets,
    )  # fmt: skip
    templates.globals.update({function.__name__: function for function in functions})
    templates.filters["visible"] = visible
    templates.globals.update(SUPPORT_MARK=SUPPORT_MARK, HTML_PASSAGE=HTML_PASSAGE)
    return templates
