"""Train and evaluate a search agent: `python -m r3rag_jax.train --config configs/quickstart.yaml [key=value …]`.

Runs the configured phases in order; the same command again resumes where it stopped. With `--seeds 0,1,2` it does so
for each seed, and prints their mean.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.errors import main_guard
from r3rag_jax.experiment import run
from r3rag_jax.parallel.processes import joined
from r3rag_jax.reporting.contrasts import tables_of_seeds
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.run.flags import parse_training


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    configs = parse_training(argv, "python -m r3rag_jax.train", __doc__ or "")
    with joined(configs[0].mesh):
        use_compile_cache()
        run_all(configs)


def run_all(configs: Sequence[Config], console: Console | None = None) -> None:
    """One run after the other, and what they have in common."""
    runs = []
    for config in configs:
        runs.append(run(config, console).run)
        gc.collect()  # the objects of a run refer to each other, and hold its arrays
    if len(runs) > 1 and jax.process_index() == 0:
        for table in tables_of_seeds(runs):
            (console or Console()).print(table)


if __name__ == "__main__":
    sys.exit(main())
