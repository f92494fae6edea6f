"""Evaluate a trained run, a model from elsewhere, or a baseline with either, on any questions.

    python -m r3rag_jax.evaluate --checkpoint runs/quickstart --questions FILE --corpus FILE [key=value …]
    python -m r3rag_jax.evaluate --checkpoint runs/quickstart --system ircot
    python -m r3rag_jax.evaluate --checkpoint MODEL --config RECIPE --questions FILE

Writes `<run>/eval/<name>.json` and `<run>/trajectories/<name>.jsonl`, and prints a table of the metrics; for a model
from elsewhere <run> is runs/eval-<model>, or what run_dir=… names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.components import Components
from r3rag_jax.config import FlagParser
from r3rag_jax.errors import main_guard
from r3rag_jax.evaluation.checkpoint import add_checkpoint_flags, open_checkpoint
from r3rag_jax.evaluation.results import replaced_result, result_name
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.reporting.rendering import results_table
from r3rag_jax.rollout.context_limit import context_notices
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.run.progress import ProgressBar


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.evaluate", description=(__doc__ or "").splitlines()[0])
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--system", choices=SYSTEMS, help="the system to evaluate; default: R3-RAG with the run's policy"
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="questions; default: the run's test questions")
    parser.add_argument(
        "--name",
        default="",
        help="name of the result files; default: folder and name of the question file (hotpotqa-dev, or `test` for "
        "the run's test questions), followed by the system if one is given",
    )
    args = parser.parse_intermixed_args(argv)
    use_compile_cache()
    checkpoint = open_checkpoint(args)
    config = checkpoint.config
    name = result_name(args.name, args.questions, args.system)
    system = SYSTEMS[args.system or "r3rag"]
    components = Components(config, checkpoint.run)
    policy = checkpoint.choose_policy(args.phase or (system.policy if args.system else None))
    # A model that cannot be used is reported before an index is built.
    _ = components.policy.tokenizer if args.system in BASELINES else components.codec
    components.open_corpus(args.corpus, builds_index=checkpoint.builds_index)
    path = args.questions or components.dataset.path_of("test")
    questions = components.read_questions(path, args.system or "r3rag")
    for notice in context_notices(config) if args.system not in BASELINES else ():
        components.console.print(notice, highlight=False, markup=False)
    evaluator, live = components.evaluator, config.log.progress
    fingerprint = evaluator.fingerprint(args.system or "r3rag", questions, policy)
    if notice := replaced_result(components.run, name, fingerprint):
        components.console.print(notice, highlight=False, markup=False)
    with ProgressBar(f"eval {name}", len(questions), console=components.console, live=live) as bar:
        trajectories = evaluator.rollouts(
            system, questions, policy=policy, on_done=lambda trajectory: bar.advance(steps=len(trajectory.steps))
        )
    result = evaluator.write(name, trajectories, fingerprint)
    components.run.publish()
    components.console.print(results_table([result]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
