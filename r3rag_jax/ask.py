"""Ask a trained run, or a model from elsewhere, questions and watch it reason and retrieve.

python -m r3rag_jax.ask --checkpoint runs/quickstart "Who wrote …?" [key=value …]
python -m r3rag_jax.ask --checkpoint runs/quickstart --json < questions.txt
python -m r3rag_jax.ask --checkpoint MODEL --corpus FILE "Who wrote …?" rollout.protocol=steps
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from r3rag_jax.components import Components
from r3rag_jax.config import FlagParser
from r3rag_jax.errors import USER_ERROR_STATUS, main_guard
from r3rag_jax.evaluation.checkpoint import add_checkpoint_flags, open_checkpoint
from r3rag_jax.live.console import ConsoleAsker
from r3rag_jax.live.player import Player, RetrieverChoice
from r3rag_jax.run.caches import use_compile_cache

SLOTS = 4  # most questions at the same time; fewer where the run has fewer
OVERRIDE = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*=")


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.ask", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", nargs="?", help="in quotes; without one, each line of standard input is a question")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each question")
    add_checkpoint_flags(parser)
    args = parser.parse_intermixed_args(argv)
    words = [word for word in (args.question, *args.overrides) if word is not None]
    args.question = next((word for word in words if not OVERRIDE.match(word)), None)
    args.overrides = [word for word in words if word is not args.question]
    use_compile_cache()
    checkpoint = open_checkpoint(args)
    rollout = checkpoint.config.rollout
    slots = 1 if args.question is not None else min(SLOTS, rollout.slots)
    config = checkpoint.config.replace(rollout=rollout.replace(slots=slots))
    components = Components(config, checkpoint.run)
    policy = checkpoint.choose_policy(args.phase)
    _ = components.codec  # a model that cannot be used is reported before an index is built
    components.open_corpus(args.corpus, builds_index=checkpoint.builds_index)
    player = Player(
        config, components.codec, lambda stops: components.backends.live({policy: components.loader(policy)}, stops),
        {policy: policy}, {config.retrieval.kind: RetrieverChoice("", lambda: components.retriever)},
    )  # fmt: skip
    question = None if args.question is None else player.question(args.question)
    if question is not None:
        player.check(question, player.defaults)
    asker = ConsoleAsker(player, components.console, as_json=args.json)
    try:
        player.open()
        if question is not None:
            player.prepare(question, player.defaults)
            asker.ask(question)
        elif sys.stdin.isatty():
            asker.ask_typed()
        else:
            return USER_ERROR_STATUS if asker.ask_lines(sys.stdin) else 0
    finally:
        player.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
