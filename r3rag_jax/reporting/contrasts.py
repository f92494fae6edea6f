"""What a training prints at its end, and what `evaluate compare` and `evaluate runs` do: results side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r3rag_jax.config.evaluation import TRAINED_SYSTEMS
from r3rag_jax.evaluation.comparison import Comparison, Pooled, compare, compare_runs
from r3rag_jax.evaluation.flags import comparison_parser, runs_parser
from r3rag_jax.evaluation.groups import ALL
from r3rag_jax.evaluation.metrics import metric_of
from r3rag_jax.evaluation.results import load_results
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.reporting.paper_tables import p_text
from r3rag_jax.reporting.phases_table import phases_table
from r3rag_jax.reporting.rendering import all_tables, visible
from r3rag_jax.reporting.run_files import read_logs
from r3rag_jax.run.directory import RunDirectory


def contrast(words: Sequence[str]) -> None:
    """Print the comparison that the words after `compare` ask for.

    Raises:
        UserError: a file is missing or holds no result, or the two are not comparable.
    """
    args = comparison_parser().parse_args(words)
    Console().print(comparison_table(compare(args.results[0], args.results[1], args.varied)))


def contrast_runs(words: Sequence[str]) -> None:
    """Print the comparison of two systems in several runs that the words after `runs` ask for.

    Raises:
        UserError: as `compare_runs`.
    """
    args = runs_parser().parse_args(words)
    one, other = args.results
    runs = [RunDirectory.at(run) for run in args.runs]
    Console().print(*tables_of_runs(runs, one, other, args.metric, args.varied))


def tables_of_runs(
    runs: Sequence[RunDirectory], one: str, other: str, metric: str, varied: Collection[str] = ()
) -> list[Table]:
    """A metric of two results in several runs and in their mean, and what the phases took, where that was recorded.

    Args:
        one, other: names of results; a path that ends with .json is a result that all runs are compared with.
        varied: facts in which the two of a run are meant to differ.

    Raises:
        UserError: as `compare_runs`.
    """
    pairs = [(_result_of(run, one), _result_of(run, other)) for run in runs]
    rows, means = compare_runs([run.path.resolve().name for run in runs], pairs, metric, varied)
    names = [Path(result).name.removesuffix(".json") for result in (one, other)]
    return [runs_table(names, metric, rows, means), *phases_of_runs(runs)]


def _result_of(run: RunDirectory, result: str) -> Path:
    return Path(result) if result.endswith(".json") else run.evaluation(result)


def tables_of_seeds(runs: Sequence[RunDirectory]) -> list[Table]:
    """EM of cold start and R3-RAG as in `tables_of_runs`, where all runs have both; and what the phases took."""
    has_both = all(run.evaluation(name).is_file() for run in runs for name in TRAINED_SYSTEMS)
    return tables_of_runs(runs, *TRAINED_SYSTEMS, "em") if has_both else phases_of_runs(runs)


def tables_of_run(run: RunDirectory, systems: Sequence[str]) -> list[Table]:
    """The results of these systems in a run, and what its phases took, where that was recorded."""
    return [*all_tables(load_results(run, systems)), *phases_of_runs([run])]


def phases_of_runs(runs: Sequence[RunDirectory]) -> list[Table]:
    """One table of what the phases of the runs took; none where that was not recorded."""
    table = phases_table([read_logs(run, []) for run in runs])
    return [] if table is None else [table]


def runs_table(names: Sequence[str], metric: str, runs: Sequence[Pooled], means: Sequence[Pooled]) -> Table:
    """A metric of two systems, by their names: a row for each run, and for the mean of each group of questions."""
    definition = metric_of(metric)
    texts = (
        "Difference: second minus first, with its 95 % interval over the questions.",
        "A run: McNemar's exact test. Mean: a permutation test; a question's value is its mean over the runs.",
    )
    lines = Text("\n".join(texts), "table.caption")
    terminal = Table(title=definition.title, caption=lines, caption_justify="left", box=None)
    titles = (SYSTEMS[name].title if name in SYSTEMS else name for name in names)
    for number, name in enumerate(("", "n", *titles, "difference", "95 % interval", "p")):
        terminal.add_column(Text(visible(name)), justify="right" if number else "left")
    mean = f"mean of {len(runs)}" if len(runs) > 1 else "all"
    named = [*runs, *(dataclasses.replace(row, name=mean) if row.name == ALL else row for row in means)]
    for number, row in enumerate(named):
        numbers = (row.one, row.other, row.other - row.one, *row.interval)
        one, other, difference, low, high = (f"{value:,.{definition.decimals}f}" for value in numbers)
        cells = (visible(row.name), str(row.num), one, other, difference, f"{low} to {high}", p_text(row.p_value))
        terminal.add_row(*cells, end_section=number == len(runs) - 1)
    return terminal


def comparison_table(comparison: Comparison) -> Table:
    """Two results side by side, with the interval of each difference and its p value."""
    lines = [
        "Difference: second minus first, with its 95 % interval over the same questions.",
        "McNemar a:b: the exact test; questions that the first and the second alone have. Flips: a permutation test.",
    ]
    lines += [f"They differ in {comparison.varied}."] * bool(comparison.varied)
    shown = Text(visible("\n".join(lines)), "table.caption")
    terminal = Table(caption=shown, caption_justify="left", box=None)
    terminal.add_column("")
    for name in (*comparison.titles, "difference", "95 % interval", "p", "test", "n"):
        terminal.add_column(Text(visible(name)), justify="right")
    for found in comparison.differences:
        definition = metric_of(found.metric)
        numbers = (found.one, found.other, found.other - found.one, *found.interval)
        one, other, difference, low, high = (f"{number:,.{definition.decimals}f}" for number in numbers)
        test = "flips" if found.only_one is None else f"McNemar {found.only_one}:{found.only_other}"
        bounds = f"{low} to {high}"
        terminal.add_row(definition.title, one, other, difference, bounds, p_text(found.p_value), test, str(found.num))
    return terminal


CONTRASTS: dict[str, Callable[[Sequence[str]], None]] = {"compare": contrast, "runs": contrast_runs}
