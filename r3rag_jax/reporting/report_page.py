"""The report of a run: one self-contained HTML file.

It holds result tables, learning curves (SVG from a template, no scripts), a gallery of trajectories and the
configuration. For whatever the run lacks, it holds a sentence that says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.reporting.curves import PLOTS, STEP_NAMES, draw
from r3rag_jax.reporting.gallery import gallery, milestones
from r3rag_jax.reporting.rendering import environment, title_of
from r3rag_jax.reporting.run_files import load_run
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.files import write_text


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write report.html into the run directory and return its path.

    Raises:
        UserError: `run_dir` is not a run directory.
    """
    run = load_run(run_dir)
    plots = {phase: _draw_all(phase, run.metrics.get(phase, ())) for phase in PLOTS}
    main, other, exhibits = gallery(run)
    titles = {e["system"]: title_of(e) for e in run.evals}
    html = (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            plots=plots,
            headline=headline(run.evals),
            exhibits=exhibits,
            milestones=milestones(run),
            main=titles.get(main, main),
            other=titles.get(other, other),
            facts_of=_phase_facts,
        )
    )
    path = RunDirectory(Path(run_dir)).report
    write_text(path, html)
    return path


def publish_report(run: RunDirectory) -> str:
    """Write the report, upload it where the run is in a bucket, and return its path or URL.

    Raises:
        UserError: as `write_report`; or the bucket cannot be written.
    """
    path = write_report(run)
    run.publish()
    return run.shown(path)


def _draw_all(phase: str, rows: Sequence[dict[str, Any]]) -> list[Markup]:
    drawn = (draw(plot, rows, STEP_NAMES[phase]) for plot in PLOTS[phase])
    return [figure for figure in drawn if figure is not None]


def headline(evals: Sequence[dict[str, Any]]) -> str:
    """A sentence with EM of R3-RAG and its difference to each other system; "" without R3-RAG."""
    exact_match = {e["system"]: e["groups"]["all"]["em"] for e in evals if "all" in e["groups"]}
    if "r3rag" not in exact_match:
        return ""
    titles = {e["system"]: title_of(e) for e in evals}
    count = next(e["num_questions"] for e in evals if e["system"] == "r3rag")
    gaps = [
        f"{exact_match['r3rag'] - exact_match[system]:+.1f} points against {titles[system]}"
        for system in reversed(SYSTEMS)
        if system in exact_match and system != "r3rag"
    ]
    sentence = f"{titles['r3rag']} answers {exact_match['r3rag']:.1f} % of {count:,} test questions exactly"
    return f"{sentence}: {', '.join(gaps)}." if gaps else f"{sentence}."


def _phase_facts(rows: Sequence[dict[str, Any]]) -> str:
    """Number of logged steps and median throughput, e.g. `40 steps · 5,400 tokens/s`."""
    rates = sorted(row["tokens_per_s"] for row in rows if row.get("tokens_per_s") is not None)
    facts = [f"{len(rows):,} steps"] + [f"{r:,.0f} tokens/s (median)" for r in rates[len(rates) // 2 :][:1]]
    return " · ".join(facts)
