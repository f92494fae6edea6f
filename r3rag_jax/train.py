"""Train and evaluate a search agent: `python -m r3rag_jax.train --config configs/quickstart.yaml [key=value …]`.

Runs the configured phases in order; the same command again resumes where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import jax
from rich.console import Console

from r3rag_jax.components import Components
from r3rag_jax.config import Config
from r3rag_jax.errors import main_guard
from r3rag_jax.evaluation.results import load_results
from r3rag_jax.parallel.processes import joined
from r3rag_jax.reporting.rendering import all_tables
from r3rag_jax.reporting.report_page import publish_report
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.run.directory import hold_run
from r3rag_jax.run.profile import parse_with_profile
from r3rag_jax.run.provenance import has_finished
from r3rag_jax.run.watchdog import Watchdog
from r3rag_jax.training.memory_plan import notices
from r3rag_jax.training.rl import run_rl
from r3rag_jax.training.sft import run_sft
from r3rag_jax.world.dataset import prepare_data


def train_policy(c: Components, phase: str) -> bool:
    """Run phase `sft` or `rl`; returns False if the run already has the phase's policy."""
    if has_finished(c.run.policy(phase), c.provenance(phase)):
        return False
    run_sft(c.config, c.sft_parts) if phase == "sft" else run_rl(c.config, c.rl_parts)
    return True


PHASES: dict[str, Callable[[Components], bool]] = {  # by name in `phases`; False: it was finished before
    "index": lambda c: prepare_data(c.config, c.run, c.dataset.path_of("corpus"), c.index_dir, c.console),
    "sft": lambda c: train_policy(c, "sft"),
    "rl": lambda c: train_policy(c, "rl"),
    "eval": lambda c: c.evaluator.run(c.eval_questions()),
}


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    config = parse_with_profile(argv, "python -m r3rag_jax.train", __doc__ or "")
    with joined(config.mesh):
        use_compile_cache()
        run(config)


def run(config: Config, console: Console | None = None) -> Components:
    """Run all phases of the configuration; finished ones are skipped."""
    c, did_work = Components(config, config.run_directory, console), False
    say = c.console.print
    plans, log = c.memory_plans, c.log  # bad configurations fail before the run directory is created
    with c.stop, hold_run(config, c.run, c.console), log, Watchdog(config.log.watchdog_s, c.run.stalls):
        for name in config.phases:
            started = time.monotonic()
            for notice in notices(config, name, plans, c.sampler_mesh):
                say(notice, highlight=False)
            did_work |= (is_new := PHASES[name](c))
            c.run.share()
            took = f"{time.monotonic() - started:.0f} s"
            say(f"[green]✓[/] {name}  {took}" if is_new else f"[dim]✓ {name}  done before[/]", highlight=False)
    if jax.process_index() == 0:
        if "eval" in config.phases:  # else results may be out of date
            say(*all_tables(load_results(c.run, config.eval.systems)))
        where = f"{'Report' if did_work else 'All is done. Report'}: {publish_report(c.run)}"
        say(where, highlight=False, markup=False, soft_wrap=True)
    return c


if __name__ == "__main__":
    sys.exit(main())
