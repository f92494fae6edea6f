"""From cells to a table: measures what is missing, checks that the numbers compare, and puts them in rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.comparison import read_values
from r3rag_jax.evaluation.fingerprint import Facts, describe, differences
from r3rag_jax.evaluation.results import read_result
from r3rag_jax.evaluation.statistics import mcnemar, sign_flips
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.evaluation.tables.cells import Cell, OpenCell, OpenedCell, Plan
from r3rag_jax.evaluation.tables.paper import Setting, paper_rows

MEAN = "mean"  # title of the column with the mean over all sets of questions


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One row: its numbers by column and metric, on the scale of the tables.

    Fields:
        intervals: 95 %, of the numbers that have one.
        p_values: by column, of no difference in EM from the reference row; none in that row.
        results: by column, the files that the numbers are from.
    """

    title: str
    numbers: dict[str, dict[str, float | None]]
    intervals: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    p_values: dict[str, float] = dataclasses.field(default_factory=dict)
    results: dict[str, str] = dataclasses.field(default_factory=dict)
    is_paper: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A finished table.

    Fields:
        columns: name of each set of questions -> how many there are; the mean over several has no number.
        facts: what all numbers have in common.
    """

    name: str
    title: str
    row_title: str
    metrics: tuple[str, ...]
    columns: dict[str, int | None]
    rows: list[TableRow]
    notes: list[str]
    facts: Facts
    reference: str = ""


def make_table(plan: Plan, open_cell: OpenCell, console: Console) -> Table:
    """Measure the cells of a plan that have no result with their fingerprint, and return the table of all.

    Raises:
        UserError: two rows are not comparable, or a cell cannot be measured. Finished cells are kept.
    """
    results: list[dict[str, Any]] = []
    for number, cell in enumerate(plan.cells, 1):
        opened = open_cell(cell)
        results.append(_measured(cell, opened, f"{number}/{len(plan.cells)}", console))
        _check_comparable(plan, results)
    columns = {
        cell.questions.name: int(result["num_questions"]) for cell, result in zip(plan.cells, results, strict=True)
    }
    rows = _rows(plan, results)
    setting = Setting(plan.cells[0].checkpoint.config, opened.decoder, columns, opened.num_passages)
    of_paper, notes = paper_rows(plan.name, setting)
    rows += [TableRow(title, _plain(numbers), is_paper=True) for title, numbers in of_paper.items()]
    all_columns: dict[str, int | None] = dict(columns)
    if len(columns) > 1:
        all_columns[MEAN] = None
        rows = [_with_mean(row, list(columns), plan.metrics) for row in rows]
    return Table(
        plan.name, plan.title, plan.row_title, plan.metrics, all_columns, rows, [*plan.notes, *notes],
        _shared_facts([result["fingerprint"] for result in results]), plan.reference,
    )  # fmt: skip


def _measured(cell: Cell, opened: OpenedCell, progress: str, console: Console) -> dict[str, Any]:
    """The result of a cell: the one that there is, or a new one."""
    evaluator, questions = opened.evaluator, opened.questions
    facts = evaluator.fingerprint(cell.system, questions, cell.policy, cell.questions.name)
    for name in cell.names:
        result = read_result(evaluator.directory, name)
        has_rows = evaluator.directory.evaluation_rows(name).is_file()
        if result is not None and has_rows and _without_words(result.get("fingerprint")) == _without_words(facts):
            return result | {"file": str(evaluator.directory.evaluation(name))}
    console.print(f"{progress} {cell.row}, {cell.questions.name}", highlight=False, markup=False)
    result = evaluator.evaluate(cell.name, SYSTEMS[cell.system], questions, facts, cell.policy)
    evaluator.directory.publish()
    return result | {"file": str(evaluator.directory.evaluation(cell.name))}


def _without_words(facts: Any) -> Any:
    return {name: value for name, value in facts.items() if name != "split"} if isinstance(facts, dict) else None


def _check_comparable(plan: Plan, results: Sequence[dict[str, Any]]) -> None:
    """Compare the last result with the first of its column, and with that of its row in all but the questions.

    Raises:
        UserError: they differ in more than the table is about.
    """
    last, cell = results[-1], plan.cells[len(results) - 1]
    for other, result in zip(plan.cells, results[:-1], strict=False):
        is_column = other.questions == cell.questions
        if not is_column and other.row != cell.row:
            continue
        allowed = plan.varied if is_column else (*plan.varied, "questions")
        if names := differences(result["fingerprint"], last["fingerprint"], allowed):
            raise UserError(
                f"rows of one table must be comparable; {other.row} and {cell.row} differ in "
                f"{describe(result['fingerprint'], last['fingerprint'], names)}: --varied {' '.join(names)} shows "
                "them in one table all the same"
            )


def _rows(plan: Plan, results: Sequence[dict[str, Any]]) -> list[TableRow]:
    rows: dict[str, TableRow] = {}
    for cell, result in zip(plan.cells, results, strict=True):
        row = rows.setdefault(cell.row, TableRow(cell.row, {}))
        column, whole = cell.questions.name, result["groups"]["all"]
        row.numbers[column] = {name: whole.get(name) for name in plan.metrics}
        row.intervals[column] = {
            name: result["intervals"][name] for name in plan.metrics if name in result["intervals"]
        }
        row.results[column] = result["file"]
    if plan.reference in rows:
        _add_p_values(rows, plan.reference)
    return list(rows.values())


def _add_p_values(rows: dict[str, TableRow], reference: str) -> None:
    """Test EM of each row against the reference row's, question by question."""
    for column, file in rows[reference].results.items():
        reference_Q = read_values(file)["em"]
        for title, row in rows.items():
            if title == reference or column not in row.results:
                continue
            values_Q = read_values(row.results[column])["em"]
            is_binary = bool(np.isin(np.concatenate([values_Q, reference_Q]), (0, 1)).all())
            row.p_values[column] = (mcnemar if is_binary else sign_flips)(values_Q, reference_Q)


def _with_mean(row: TableRow, columns: Sequence[str], metrics: Sequence[str]) -> TableRow:
    """A row with the mean over all columns, of the metrics that every column has."""
    means: dict[str, float | None] = {}
    for metric in metrics:
        values = [row.numbers.get(column, {}).get(metric) for column in columns]
        known = [value for value in values if value is not None]
        means[metric] = sum(known) / len(known) if len(known) == len(columns) else None
    return dataclasses.replace(row, numbers=row.numbers | {MEAN: means})


def _plain(numbers: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    return {column: dict(values) for column, values in numbers.items()}


def _shared_facts(all_facts: Sequence[Facts]) -> Facts:
    first = all_facts[0]
    return {name: value for name, value in first.items() if all(facts.get(name) == value for facts in all_facts)}
