"""Evaluate a trained run on any FlashRAG JSONL files.

    python -m r3rag_jax.evaluate --checkpoint runs/quickstart --questions FILE --corpus FILE [key=value …]

Writes `<run>/eval/<name>.json` and `<run>/trajectories/<name>.jsonl`, and prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.config import SYSTEMS, FlagParser
from r3rag_jax.data.questions import read_questions
from r3rag_jax.errors import main_guard
from r3rag_jax.reporting.rendering import results_table
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.trained_run import add_checkpoint_flags, open_trained_run


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.evaluate", description=(__doc__ or "").splitlines()[0])
    add_checkpoint_flags(parser)
    parser.add_argument("--questions", type=Path, metavar="FILE", help="FlashRAG JSONL; default: the test questions")
    parser.add_argument("--system", choices=SYSTEMS, help="a baseline or trained system; default: the trained policy")
    parser.add_argument("--name", default="", help="name of the result files; default: the questions' file name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to change")
    args = parser.parse_intermixed_args(argv)
    use_compile_cache()
    components, phase = open_trained_run(args)
    path = args.questions or components.dataset.path_of("test")
    questions, evaluator = read_questions(path), components.evaluator
    if args.system:
        trajectories = evaluator.rollouts(args.system, questions)
    else:
        trajectories = evaluator.trained_rollouts(phase, questions, f"eval {path.name}")
    name = args.name or (f"{args.system}_{path.stem}" if args.system else path.stem)
    fields = {"system": args.system} if args.system else {"phase": phase}
    result = evaluator.write(name, trajectories, evaluator.fingerprint(questions, **fields))
    components.console.print(results_table([result]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
