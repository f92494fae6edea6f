"""Tables of `evaluate table`: for a terminal, as JSON, Markdown and LaTeX."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from r3rag_jax.evaluation.metrics import RATIOS, metric_of
from r3rag_jax.evaluation.tables.table import MEAN, Table, TableRow
from r3rag_jax.json_text import parse_json
from r3rag_jax.reporting.rendering import visible
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.files import write_text

BEST = ("em", "f1", "acc")  # metrics of whose column the largest is bold; they and ratios are shown with ±
P_VALUE = "p (EM)"
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "—": "---",
    "<": "$<$", ">": "$>$", "|": r"\textbar{}",
}  # fmt: skip


class Field(NamedTuple):
    """One number as text."""

    text: str
    is_best: bool = False


class Grid(NamedTuple):
    """A table as texts: a header, and rows of a title and fields; `is_paper` marks the paper's rows."""

    header: list[str]
    rows: list[tuple[str, list[Field]]]
    is_paper: list[bool]


def grid_of(table: Table) -> Grid:
    """The numbers of a table, a column for each set of questions and metric, with half their 95 % intervals."""
    header, columns = [table.row_title], []
    for column in table.columns:
        prefix = f"{column} " if len(table.columns) > 1 else ""
        for metric in table.metrics:
            header.append(f"{prefix}{metric_of(metric).title}")
            columns.append(_fields(table, column, metric))
        if table.reference and column != MEAN and any(row.p_values for row in table.rows):
            header.append(f"{prefix}{P_VALUE}")
            columns.append([Field(p_text(row.p_values.get(column))) for row in table.rows])
    rows = [(row.title, [fields[i] for fields in columns]) for i, row in enumerate(table.rows)]
    return Grid(header, rows, [row.is_paper for row in table.rows])


def _fields(table: Table, column: str, metric: str) -> list[Field]:
    values = [row.numbers.get(column, {}).get(metric) for row in table.rows]
    own = [v for v, row in zip(values, table.rows, strict=True) if v is not None and not row.is_paper]
    best = max(own) if metric in BEST and len(set(own)) > 1 else None
    return [
        Field("—") if value is None else Field(_text(value, row, column, metric), value == best and not row.is_paper)
        for value, row in zip(values, table.rows, strict=True)
    ]


def _text(value: float, row: TableRow, column: str, metric: str) -> str:
    definition = metric_of(metric)
    text = f"{value:,.{definition.decimals}f}"
    bounds = row.intervals.get(column, {}).get(metric)
    if bounds is None or metric not in (*BEST, *RATIOS):
        return text
    return f"{text} ±{(bounds[1] - bounds[0]) / 2:,.{definition.decimals}f}"


def p_text(p_value: float | None) -> str:
    if p_value is None:
        return "—"
    return f"{p_value:.3f}" if p_value >= 0.001 else "<0.001"


def caption(table: Table) -> str:
    """Title and questions: `Systems (test: 400 questions)`."""
    sets = [f"{name}: {num:,} questions" for name, num in table.columns.items() if num is not None]
    return f"{table.title} ({'; '.join(sets)})"


def sentences(table: Table) -> list[str]:
    """What is said under a table: what its numbers mean, and its notes."""
    said = ["± is half the 95 % interval."]
    if table.reference and any(row.p_values for row in table.rows):
        said.append(f"p: exact McNemar test of EM against {table.reference}, on the same questions.")
    return said + table.notes


def as_terminal(table: Table) -> TerminalTable:
    """The table for a terminal; the best value is bold, and the paper's rows are dim."""
    grid = grid_of(table)
    terminal = TerminalTable(title=Text(visible(caption(table))), title_justify="left", box=None)
    for number, name in enumerate(grid.header):
        terminal.add_column(Text(visible(name)), justify="right" if number else "left")
    for (title, fields), is_paper in zip(grid.rows, grid.is_paper, strict=True):
        style = "dim" if is_paper else ""
        texts = [Text(field.text, "bold" if field.is_best else style) for field in fields]
        terminal.add_row(Text(visible(title), style), *texts)
    return terminal


def as_markdown(table: Table, command: str) -> str:
    """The table in GitHub's Markdown, after the command that makes it."""
    grid = grid_of(table)
    lines = [f"**{_markdown(caption(table))}**", "", "```bash", command, "```", ""]
    lines.append(f"| {' | '.join(map(_markdown, grid.header))} |")
    lines.append(f"| {' | '.join(['---'] + ['---:'] * (len(grid.header) - 1))} |")
    for (title, fields), is_paper in zip(grid.rows, grid.is_paper, strict=True):
        shown = f"*{_markdown(title)}*" if is_paper else _markdown(title)
        texts = [f"**{field.text}**" if field.is_best else field.text for field in fields]
        lines.append(f"| {' | '.join([shown, *texts])} |")
    return "\n".join([*lines, "", *map(_markdown, sentences(table)), ""])


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_<>`])", r"\\\1", " ".join(visible(text).split()))


def as_latex(table: Table, command: str) -> str:
    """The table in LaTeX, for the package booktabs, with the command that makes it as a comment."""
    grid = grid_of(table)
    lines = [f"% {command}", r"\begin{table}", r"\centering", rf"\caption{{{_latex(caption(table))}}}"]
    lines += [rf"\label{{tab:{table.name}}}", rf"\begin{{tabular}}{{l{'r' * (len(grid.header) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(_latex, grid.header)) + r" \\", r"\midrule"]
    for number, (title, fields) in enumerate(grid.rows):
        if grid.is_paper[number] and not any(grid.is_paper[:number]):
            lines.append(r"\midrule")
        texts = [rf"\textbf{{{_latex(field.text)}}}" if field.is_best else _latex(field.text) for field in fields]
        lines.append(" & ".join([_latex(title), *texts]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {_latex(' '.join(sentences(table)))}", r"\end{table}", ""]
    return "\n".join(lines)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(visible(text).split()))


def as_json(table: Table, command: str) -> str:
    """All of the table, with the command that makes it."""
    return json.dumps({"command": command} | dataclasses.asdict(table), indent=2, ensure_ascii=False) + "\n"


def table_from_json(text: str) -> Table:
    """Inverse of `as_json`, without the command.

    Raises:
        ValueError, TypeError, KeyError: the text is something else.
    """
    fields = parse_json(text)
    del fields["command"]
    rows = [TableRow(**row) for row in fields.pop("rows")]
    return Table(**fields | {"metrics": tuple(fields["metrics"])}, rows=rows)


def publish_tables(run: RunDirectory, table: Table, name: str, command: str, console: Console) -> None:
    """Write `<run>/tables/<name>` in each format, upload it where the run is in a bucket, and print it.

    Raises:
        UserError: the bucket cannot be written.
    """
    texts = {"json": as_json(table, command), "md": as_markdown(table, command), "tex": as_latex(table, command)}
    for suffix, text in texts.items():
        write_text(run.table(name, suffix), text)
    run.publish()
    console.print(as_terminal(table))
    for sentence in sentences(table):
        console.print(Text(visible(sentence), "table.caption"))
    shown = ", ".join(run.shown(run.table(name, suffix)) for suffix in texts)
    console.print(f"Written: {shown}", highlight=False, markup=False, soft_wrap=True)
