"""Train and evaluate a search agent: `python -m r3rag_jax.train --config configs/quickstart.yaml [key=value …]`.

Runs the configured phases in order; the same command again resumes where it stopped.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence

import jax
from rich.console import Console

from r3rag_jax.components import Components
from r3rag_jax.config import Config, parse_args
from r3rag_jax.errors import main_guard
from r3rag_jax.evaluation.evaluator import load_results
from r3rag_jax.parallel.processes import start_distributed
from r3rag_jax.parallel.target import Target
from r3rag_jax.reporting.rendering import groups_table, results_table
from r3rag_jax.reporting.report_page import write_report
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.run.directory import open_run
from r3rag_jax.sampler.kernels.cpu import kernels as cpu_kernels
from r3rag_jax.training.memory_plan import is_ahead, memory_notices, plan_memory
from r3rag_jax.training.rl import rl_phase
from r3rag_jax.training.sft import sft_phase
from r3rag_jax.world.dataset import prepare_data


def index_phase(components: Components) -> bool:
    """Write the data that the run makes itself, and build the index; False where that was done before."""
    corpus, index_dir = components.dataset.path_of("corpus"), components.index_dir
    return prepare_data(components.config, components.run, corpus, index_dir, components.console)


# Name in `phases` -> what runs it, and says whether there was anything to do.
PHASES: dict[str, Callable[[Components], bool]] = {
    "index": index_phase,
    "sft": sft_phase,
    "rl": rl_phase,
    "eval": lambda components: components.evaluator.run(components.dataset.questions("test")),
}


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    config, _ = parse_args(argv, prog="python -m r3rag_jax.train", description=(__doc__ or "").splitlines()[0])
    start_distributed(config.mesh)
    use_compile_cache()
    run(config)
    return 0


def run(config: Config, console: Console | None = None) -> Components:
    """Run all phases of the configuration; finished ones are skipped."""
    components = Components(config, config.run_directory, console)
    say = components.console.print
    plans = {name: plan_memory(components, name) for name in config.phases if is_ahead(components, name)}
    for planned in itertools.chain(*plans.values()):
        planned.check()  # before there is a directory, so that the same name can be had with other settings
    log = components.log  # a tracker whose package is missing is refused before there is a directory, too
    open_run(config)
    did_work = False
    if plans and cpu_kernels.are_missing(Target.of(components.sampler_mesh)):
        say("[yellow]no C++ compiler that works (c++, g++, clang++ or $CXX): sampling takes some twice as long[/]")
    with log:
        for name in config.phases:
            started = time.monotonic()
            for notice in memory_notices(components, name, plans[name]) if name in plans else ():
                say(notice, highlight=False)
            is_new = PHASES[name](components)
            took = f"[green]✓[/] {name}  {time.monotonic() - started:.0f} s"
            say(took if is_new else f"[dim]✓ {name}  done before[/]", highlight=False)
            did_work |= is_new
    if jax.process_index() == 0:
        if evals := load_results(components.run, config.eval.systems):
            say(results_table(evals))
            say(groups_table(evals))
        say(f"{'Report' if did_work else 'All is done. Report'}: {write_report(components.run_dir)}", highlight=False)
    return components


if __name__ == "__main__":
    sys.exit(main())
