"""Ask a trained run a question and watch it reason and retrieve.

python -m r3rag_jax.ask --checkpoint runs/quickstart "Who wrote …?"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from r3rag_jax.config import FlagParser
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.evaluate import add_checkpoint_flags, open_components
from r3rag_jax.evaluation.evaluator import greedy_rollouts
from r3rag_jax.reporting.rendering import print_trajectory
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.types import Question


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.ask", description=(__doc__ or "").splitlines()[0])
    add_checkpoint_flags(parser)
    parser.add_argument("question", help="in quotes")
    args = parser.parse_args(argv)
    if not args.question.strip():
        raise UserError("the question must not be empty")
    use_compile_cache()
    components, phase = open_components(args)
    question = Question("asked", args.question.strip(), ())
    backend = components.rollout_backend(lambda: components.policy.load(components.policy_dir(phase)))
    [trajectory] = greedy_rollouts(backend, components.search_env, components.retriever, [question])
    print_trajectory(trajectory, components.console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
