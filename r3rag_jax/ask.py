"""Ask a trained run a question and watch it reason and retrieve.

python -m r3rag_jax.ask --checkpoint runs/quickstart "Who wrote …?"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from r3rag_jax.components import Components
from r3rag_jax.config import FlagParser
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.evaluation.checkpoint import add_checkpoint_flags, choose_policy, load_run_config
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.reporting.rendering import print_trajectory
from r3rag_jax.rollout.fit import misfit
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.types import Question


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.ask", description=(__doc__ or "").splitlines()[0])
    add_checkpoint_flags(parser)
    parser.add_argument("question", help="the question, in quotes")
    args = parser.parse_args(argv)
    if not args.question.strip():
        raise UserError("the question must not be empty")
    use_compile_cache()
    config = load_run_config(args.checkpoint)
    components = Components(config, args.checkpoint)
    policy = choose_policy(components.run, config, args.phase)
    if args.corpus is not None:
        components.use_corpus(args.corpus)
    question = Question("asked", args.question.strip(), ())
    if fault := misfit(question, {"r3rag": components.search_env}, config.rollout.max_length):
        raise UserError(fault)
    [trajectory] = components.evaluator.rollouts(SYSTEMS["r3rag"], [question], policy=policy)
    print_trajectory(trajectory, components.console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
