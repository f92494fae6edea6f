"""The report of a run: one self-contained HTML file.

It holds result tables, learning curves, where the time went, an explorer of trajectories and the configuration. Curves
are SVG from a template; the explorer is a script that reads a block of JSON. For whatever the run lacks, it holds a
sentence that says so, or nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from r3rag_jax.config.evaluation import TRAINED_SYSTEMS
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.reporting.curves import PLOTS, STEP_NAMES, draw
from r3rag_jax.reporting.expected import find_expected
from r3rag_jax.reporting.explorer import explorer_block
from r3rag_jax.reporting.gallery import gallery, milestones
from r3rag_jax.reporting.habits_table import habit_rows
from r3rag_jax.reporting.paper_tables import caption, grid_of, sentences
from r3rag_jax.reporting.phases_table import CAPTION, phases_of
from r3rag_jax.reporting.rendering import environment, title_of
from r3rag_jax.reporting.run_files import Logs, Run, load_run
from r3rag_jax.reporting.time_split import draw_time_split
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.files import write_text


class Live(NamedTuple):
    """What a page that is served while its run goes shows besides the report."""

    version: str
    line: str  # how far the run is
    every_ms: int  # how often the page asks for the version


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write report.html into the run directory and return its path.

    Raises:
        UserError: `run_dir` is not a run directory.
    """
    path = RunDirectory(Path(run_dir)).report
    write_text(path, report_html(load_run(run_dir)))
    return path


def report_html(run: Run, live: Live | None = None) -> str:
    """The page of a run; `live` for a page that renews itself."""
    main, other, exhibits = gallery(run)
    titles = {e["system"]: title_of(e) for e in run.evals}
    expected = find_expected(run.config)
    plots = {
        phase: _draw_all(phase, run.metrics.get(phase, ()), expected.runs if expected and phase == "rl" else ())
        for phase in PLOTS
    }
    trained = [system for system in TRAINED_SYSTEMS if run.trajectories.get(system)]
    return page_html(
        "report.html.j2", ["explorer.js"] + ["watch.js"] * (live is not None),
        run=run, plots=plots, headline=headline(run.evals), exhibits=exhibits, milestones=milestones(run),
        main=titles.get(main, main), other=titles.get(other, other), facts_of=_phase_facts, expected=expected,
        time_split=draw_time_split(run.metrics.get("rl", ())), block=explorer_block(run), live=live,
        grid_of=grid_of, caption=caption, sentences=sentences, habit_titles=[SYSTEMS[name].title for name in trained],
        phases=phases_of([Logs(run.metrics, run.phases)]), phases_caption=CAPTION,
        habits=habit_rows([run.trajectories[name] for name in trained]) if trained else [],
    )  # fmt: skip


def page_html(template: str, scripts: Sequence[str], **context: Any) -> str:
    """A page that runs these scripts of the templates' folder and no other, whatever text comes into it."""
    texts = [_script(name) for name in scripts]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"connect-src 'self'; script-src {allowed}"
    )
    return environment().get_template(template).render(scripts=list(map(Markup, texts)), policy=policy, **context)


@functools.cache
def _script(name: str) -> str:
    return (files("r3rag_jax.reporting") / "templates" / name).read_text(encoding="utf-8")


def publish_report(run: RunDirectory) -> str:
    """Write the report, upload it where the run is in a bucket, and return its path or URL.

    Raises:
        UserError: as `write_report`; or the bucket cannot be written.
    """
    path = write_report(run)
    run.publish()
    return run.shown(path)


def _draw_all(phase: str, rows: Sequence[dict[str, Any]], expected: Sequence[Sequence[dict[str, Any]]]) -> list[Markup]:
    drawn = (draw(plot, rows, STEP_NAMES[phase], expected) for plot in PLOTS[phase])
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
