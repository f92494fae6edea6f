"""Serve an index over HTTP, to runs of this package and to clients of Search-R1 and R3-RAG.

    python -m r3rag_jax.serve --index DIR [--config RECIPE] [--host HOST --port PORT --token-env NAME …] [key=value …]

The index knows the keys that it was built with; a recipe, or key=value of section `retrieval`, changes them. Listens on
loopback unless --host says otherwise.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.config import FlagParser, load_config
from r3rag_jax.config.serving import ServeConfig, add_flags, read_flags
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.retrieval.factory import open_local_retriever
from r3rag_jax.retrieval.manifest import read_manifest
from r3rag_jax.run.caches import use_compile_cache


def parse_flags(argv: Sequence[str] | None) -> tuple[Path, str | None, list[str], ServeConfig]:
    """The index, the recipe, the overrides, and the server's settings."""
    parser = FlagParser(prog="python -m r3rag_jax.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--index", type=Path, metavar="DIR", required=True, help="what r3rag_jax.index build has written"
    )
    parser.add_argument("--config", metavar="RECIPE", help="a YAML recipe; only `retrieval` is used")
    add_flags(parser, ServeConfig)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of section `retrieval` to change")
    args = parser.parse_intermixed_args(argv)
    for override in args.overrides:
        if not override.startswith("retrieval."):
            raise UserError(f"only keys of section retrieval describe an index; got {override!r}")
    return args.index, args.config, args.overrides, read_flags(args, ServeConfig)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    index_dir, recipe, overrides, settings = parse_flags(argv)
    try:
        from r3rag_jax.retrieval.server.app import IndexInfo
        from r3rag_jax.retrieval.server.run import SearchServer
    except ImportError as error:
        raise UserError(f"the server needs the extra serve: pip install 'r3rag_jax[serve]' ({error})") from error
    manifest = read_manifest(index_dir)
    built_with = [] if recipe else manifest.overrides()
    # With the phase `index` alone, the other phases' requirements of a recipe are not checked.
    config = load_config(recipe, [*built_with, *overrides, "phases=index"]).retrieval
    use_compile_cache()
    info = IndexInfo(config.kind, manifest.num_passages)
    say = functools.partial(print, flush=True)
    SearchServer(lambda: open_local_retriever(config, index_dir), info, settings, say).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
