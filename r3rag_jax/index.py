"""Build an index that many runs can share.

    python -m r3rag_jax.index build --corpus FILE --out DIR [--config RECIPE] [retrieval.key=value …]

Runs use the index with `retrieval.index_dir=DIR` and the same `retrieval` keys. FILE holds passages, {id, contents}.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from r3rag_jax.config import FlagParser, load_config
from r3rag_jax.data.questions import iterate_passages
from r3rag_jax.data.records import OnError
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.retrieval.factory import build_index
from r3rag_jax.retrieval.manifest import has_index, read_manifest
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.run.progress import bar_of_unknown_length


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.index", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("build",), help="the only action")
    parser.add_argument("--corpus", type=Path, metavar="FILE", required=True, help="passages {id, contents}")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="directory of the index")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML recipe; only `retrieval` and data.on_error are used")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of section `retrieval`, and data.on_error, to change"
    )
    args = parser.parse_intermixed_args(argv)
    for override in args.overrides:
        if not override.startswith(("retrieval.", "data.on_error=")):
            raise UserError(f"only keys of section retrieval and data.on_error describe an index; got {override!r}")
    if args.out.exists() and not has_index(args.out) and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out must be a new or empty directory, or an index to replace; got {args.out}")
    # With the phase `index` alone, the other phases' requirements of a recipe are not checked.
    config = load_config(args.config, [*args.overrides, "phases=index"])
    use_compile_cache()
    console = Console()
    passages = iterate_passages(args.corpus, OnError.of(config.data, console))
    with bar_of_unknown_length("index", console=console, live=config.log.progress) as on_progress:
        build_index(config.retrieval, passages, args.out, on_progress)
    manifest = read_manifest(args.out)
    print(f"{args.out}: {manifest.num_passages} passages, {manifest.kind}, corpus {manifest.corpus[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
