"""Ask a trained run, or a model from elsewhere, a question and watch it reason and retrieve.

python -m r3rag_jax.ask --checkpoint runs/quickstart "Who wrote …?" [key=value …]
python -m r3rag_jax.ask --checkpoint MODEL --corpus FILE "Who wrote …?" rollout.protocol=steps
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from r3rag_jax.components import Components
from r3rag_jax.config import FlagParser
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.evaluation.checkpoint import add_checkpoint_flags, open_checkpoint
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.reporting.rendering import print_trajectory
from r3rag_jax.rollout.fit import misfit
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.types import Question


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.ask", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", help="the question, in quotes")
    add_checkpoint_flags(parser)
    args = parser.parse_intermixed_args(argv)
    if not args.question.strip():
        raise UserError("the question must not be empty")
    use_compile_cache()
    checkpoint = open_checkpoint(args)
    components = Components(checkpoint.config, checkpoint.run)
    policy = checkpoint.choose_policy(args.phase)
    _ = components.codec  # a model that cannot be used is reported before an index is built
    components.open_corpus(args.corpus, builds_index=checkpoint.builds_index)
    question = Question("asked", args.question.strip(), ())
    if fault := misfit(question, {"r3rag": components.search_env}, checkpoint.config.rollout.max_length):
        raise UserError(fault)
    [trajectory] = components.evaluator.rollouts(SYSTEMS["r3rag"], [question], policy=policy)
    print_trajectory(trajectory, components.console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
