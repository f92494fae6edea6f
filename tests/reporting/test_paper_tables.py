"""Tables of `evaluate table` in each format, typed out."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from r3rag_jax.evaluation.comparison import Comparison, Difference, Pooled
from r3rag_jax.evaluation.tables.table import MEAN, Table, TableRow
from r3rag_jax.reporting.contrasts import comparison_table, runs_table
from r3rag_jax.reporting.paper_tables import as_latex, as_markdown, publish_tables
from r3rag_jax.run.directory import RunDirectory

ONE = Table(
    "main", "Systems", "system", ("em", "tokens_per_correct"), {"test": 1200},
    [
        TableRow("A_1 & [b]", {"test": {"em": 40.0, "tokens_per_correct": None}}, {"test": {"em": [36.0, 46.0]}},
                 {"test": 0.0004}, {"test": "a.json"}),
        TableRow("B|x", {"test": {"em": 61.5, "tokens_per_correct": 1234.0}},
                 {"test": {"tokens_per_correct": [1200.0, 1300.0]}}, {}, {"test": "b.json"}),
        TableRow("B (paper)", {"test": {"em": 70.0}}, is_paper=True),
    ],
    ["50% more."], {"retrieval.top_k": 2}, "B|x",
)  # fmt: skip


def test_markdown() -> None:
    assert as_markdown(ONE, "make --it") == (
        "**Systems (test: 1,200 questions)**\n\n```bash\nmake --it\n```\n\n"
        "| system | EM | tokens/correct | p (EM) |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| A\\_1 & [b] | 40.0 ±5.0 | — | <0.001 |\n"
        "| B\\|x | **61.5** | 1,234 ±50 | — |\n"
        "| *B (paper)* | 70.0 | — | — |\n\n"
        "± is half the 95 % interval.\n"
        "p: exact McNemar test of EM against B\\|x, on the same questions.\n"
        "50% more.\n"
    )


def test_latex() -> None:
    text = as_latex(ONE, "make --it")
    assert text.startswith("% make --it\n\\begin{table}")
    assert "A\\_1 \\& [b] & 40.0 $\\pm$5.0 & --- & $<$0.001 \\\\\n" in text
    assert (
        "B\\textbar{}x & \\textbf{61.5} & 1,234 $\\pm$50 & --- \\\\\n\\midrule\nB (paper) & 70.0 & --- & --- \\\\\n"
        in text
    )
    assert "\\begin{tabular}{lrrr}" in text and "50\\% more." in text
    assert text.count("{") == text.count("}")


def test_several_sets_of_questions_are_told_apart_in_the_header() -> None:
    rows = [TableRow("A", {"x": {"em": 1.0}, "y": {"em": 2.0}, MEAN: {"em": 1.5}})]
    table = Table("main", "Systems", "system", ("em",), {"x": 1, "y": 2, MEAN: None}, rows, [], {})
    text = as_markdown(table, "c")
    assert "| system | x EM | y EM | mean EM |\n" in text and "| A | 1.0 | 2.0 | 1.5 |" in text
    assert "(x: 1 questions; y: 2 questions)" in text


def test_every_format_is_written_and_the_table_is_printed(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    publish_tables(RunDirectory(tmp_path), ONE, "main", "make --it", console)
    shown = console.file.getvalue()
    assert "A_1 & [b]" in shown and "40.0 ±5.0" in shown and "main.tex" in shown
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["main.json", "main.md", "main.tex"]
    content = json.loads((tmp_path / "tables" / "main.json").read_text())
    assert (content["command"], content["rows"][1]["numbers"]["test"]["em"]) == ("make --it", 61.5)
    assert content["facts"] == {"retrieval.top_k": 2} and content["rows"][2]["is_paper"]


def test_a_comparison_in_a_terminal() -> None:
    em = Difference("em", 400, 61.0, 86.5, (20.25, 30.5), 1e-9, "McNemar, exact", 10, 112)
    tokens = Difference("output_tokens", 400, 40.0, 52.0, (-3.0, 9.0), 0.04, "sign flips")
    console = Console(file=io.StringIO(), width=140)
    console.print(comparison_table(Comparison(("a: Cold start", "b: R3-RAG"), "retrieval.top_k (2, 5)", [em, tokens])))
    lines = console.file.getvalue().splitlines()
    assert lines[1].split() == "EM 61.0 86.5 25.5 20.2 to 30.5 <0.001 McNemar 10:112 400".split()
    assert lines[2].split() == "output tokens 40 52 12 -3 to 9 0.040 flips 400".split()
    assert "They differ in retrieval.top_k (2, 5)." in console.file.getvalue()


def test_runs_side_by_side() -> None:
    rows = [Pooled(name, 541, 30.0, 38.5, (5.25, 11.5), p) for name, p in (("seed_0", 0.004), ("seed_1", 0.03))]
    means = [Pooled("all", 541, 31.0, 38.0, (4.0, 9.9), 1e-4), Pooled("2 hops", 355, 28.0, 36.0, (4.0, 12.0), 2e-4)]
    console = Console(file=io.StringIO(), width=140)
    console.print(runs_table(("cold_start", "r3rag"), "em", rows, means))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines[0] == ["EM"] and lines[1] == "n Cold start R3-RAG difference 95 % interval p".split()
    assert lines[2] == "seed_0 541 30.0 38.5 8.5 5.2 to 11.5 0.004".split()
    assert "mean of 2 541 31.0 38.0 7.0 4.0 to 9.9 <0.001".split() in lines
    assert "2 hops 355 28.0 36.0 8.0 4.0 to 12.0 <0.001".split() in lines
