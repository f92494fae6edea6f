"""One run: its phases in order, each skipped where it is finished, and what is printed at the end."""

from __future__ import annotations

from collections.abc import Callable

import jax
from rich.console import Console

from r3rag_jax.components import Components
from r3rag_jax.config import Config
from r3rag_jax.models.hf.conversion import POLICY_PHASES
from r3rag_jax.parallel.processes import exists
from r3rag_jax.reporting.contrasts import tables_of_run
from r3rag_jax.reporting.report_page import publish_report
from r3rag_jax.run.directory import hold_run
from r3rag_jax.run.phases import recorded
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


def is_trained(c: Components, phase: str) -> bool:
    """Whether the run has the policy of a phase."""
    return phase in POLICY_PHASES and exists(c.run.policy(phase))


def num_sampled(c: Components) -> int:
    """Tokens that the run's engine has sampled so far; 0 while there is none."""
    return c.engine.work.sampled if "engine" in vars(c) else 0


def run(config: Config, console: Console | None = None) -> Components:
    """Run all phases of the configuration; finished ones are skipped."""
    c, did_work = Components(config, config.run_directory, console), False
    say = c.console.print
    c.dataset.check_files([name for name in config.phases if not is_trained(c, name)])
    plans, log = c.memory_plans, c.log  # bad configurations fail before the run directory is created
    with c.stop, hold_run(config, c.run, c.console), log, Watchdog(config.log.watchdog_s, c.run.stalls):
        for name in config.phases:
            for notice in notices(config, name, plans, c.sampler_mesh):
                say(notice, highlight=False)
            with recorded(c.run.phases_file, name, lambda: num_sampled(c)) as work:
                work.is_new = PHASES[name](c)
            did_work |= work.is_new
            c.run.share()
            took = f"[green]✓[/] {name}  {work.seconds:.0f} s" if work.is_new else f"[dim]✓ {name}  done before[/]"
            say(took, highlight=False)
    if jax.process_index() == 0:
        # Without the phase `eval` results may be out of date.
        for table in tables_of_run(c.run, config.eval.systems if "eval" in config.phases else ()):
            say(table)
        where = f"{'Report' if did_work else 'All is done. Report'}: {publish_report(c.run)}"
        say(where, highlight=False, markup=False, soft_wrap=True)
    return c
