"""A page on which questions are asked and answered as one watches, and a JSON API beside it.

    python -m r3rag_jax.demo --checkpoint RUN [--index DIR …] [--host HOST --port PORT --token-env NAME …] [key=value …]

A run's policies can be compared, and its indexes chosen from. Listens on loopback unless --host says otherwise.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.components import Components
from r3rag_jax.config import FlagParser
from r3rag_jax.config.serving import DemoConfig, add_flags, read_flags
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.evaluation.checkpoint import add_checkpoint_flags, open_checkpoint
from r3rag_jax.live.choices import policies_of, retrievers_of, with_index
from r3rag_jax.live.player import Player
from r3rag_jax.run.caches import use_compile_cache


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.demo", description=(__doc__ or "").splitlines()[0])
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--index", type=Path, metavar="DIR", action="append", default=[],
        help="an index of r3rag_jax.index build; may be given several times, and is searched unless another is chosen",
    )  # fmt: skip
    add_flags(parser, DemoConfig)
    args = parser.parse_intermixed_args(argv)
    settings = read_flags(args, DemoConfig)
    try:
        from r3rag_jax.live.server import DemoServer
    except ImportError as error:
        raise UserError(f"the demo needs the extra serve: pip install 'r3rag_jax[serve]' ({error})") from error
    use_compile_cache()
    checkpoint = open_checkpoint(with_index(args))
    rollout = checkpoint.config.rollout.replace(slots=settings.slots)
    components = Components(checkpoint.config.replace(rollout=rollout), checkpoint.run)
    policies = policies_of(checkpoint, args.phase)
    _ = components.codec  # a model that cannot be used is reported at once

    def open_player() -> Player:
        components.open_corpus(args.corpus, builds_index=checkpoint.builds_index)
        player = Player(
            components.config, components.codec,
            lambda stops: components.backends.live(
                {name: components.loader(name) for name in policies}, stops, compiles_ahead=True
            ),
            policies, retrievers_of(components.config, components.index_dir, lambda: components.retriever, args.index),
            components.dataset.questions("test") if checkpoint.is_run else (),
        )  # fmt: skip
        player.open()
        return player

    DemoServer(open_player, Path(args.checkpoint).name, settings, functools.partial(print, flush=True)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
