"""Write a model as a Hugging Face directory, which training, `transformers` and most servers load.

    python -m r3rag_jax.convert SOURCE OUT [--dtype float32|bfloat16] [--add-tags]

SOURCE is a Hugging Face directory, a run directory (its last trained policy), a .gguf file, or package:NAME for the
model in an installed package. Tensors are converted one at a time, so that host memory never holds the whole model;
the exception is a .gguf file, which transformers reads as a whole.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.config import FlagParser
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.models.decoder import param_shapes
from r3rag_jax.models.hf.conversion import add_tags, export, find_model, open_directory
from r3rag_jax.models.hf.decoder_files import check_vocabulary
from r3rag_jax.models.hf.gguf_files import open_gguf
from r3rag_jax.models.hf.tensor_files import WRITE_DTYPES
from r3rag_jax.models.paths import model_path, reading
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.store import is_remote
from r3rag_jax.text.protocols import TAGS


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="Hugging Face directory, run directory (or its gs:// URL), .gguf file or package:NAME",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty directory")
    parser.add_argument(
        "--dtype",
        choices=sorted(WRITE_DTYPES),
        help="dtype of the written weights; default: bfloat16 if all of SOURCE is bfloat16, otherwise float32",
    )
    parser.add_argument(
        "--add-tags", action="store_true", help="add the special tokens of rollout.protocol=tags: " + " ".join(TAGS)
    )
    args = parser.parse_args(argv)
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"OUT must be a new or empty directory; got {args.out}")
    path = find_model(RunDirectory.at(args.source).path if is_remote(args.source) else model_path(args.source))
    with reading(path), open_gguf(path, args.dtype) if path.is_file() else open_directory(path) as source:
        if args.add_tags:
            source = add_tags(source)
        else:
            check_vocabulary(source.config, source.tokenizer, path)
        dtype = args.dtype or source.dtype
        try:
            export(source, args.out, dtype)
        except OSError as error:
            raise UserError(f"{args.out} cannot be written: {error}") from error
    size = sum(math.prod(shape) for shape in param_shapes(source.config).values())
    model = f"{source.config.model_type}, {size:,} parameters in {dtype}"
    print(f"{args.out}: {model}, {source.tokenizer.vocab_size:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
