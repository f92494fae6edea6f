"""The command lines of `python -m r3rag_jax.evaluate`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.config import FlagParser
from r3rag_jax.config.evaluation import TRAINED_SYSTEMS
from r3rag_jax.config.schema import schema, section_names
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.checkpoint import Checkpoint, add_checkpoint_flags, open_checkpoint
from r3rag_jax.evaluation.results import TEST, check_name, file_name
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.evaluation.tables.cells import QuestionSet
from r3rag_jax.evaluation.tables.plans import PLANS, Request
from r3rag_jax.models.hf.conversion import POLICY_PHASES

PROG = "python -m r3rag_jax.evaluate"
MAX_VALUES = 100  # of a sweep


def evaluation_parser(description: str) -> FlagParser:
    """The flags of one evaluation."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(prog=PROG, description=description, formatter_class=raw)
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--system", choices=SYSTEMS, help="the system to evaluate; default: R3-RAG with the run's policy"
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="questions; default: the run's test questions")
    parser.add_argument(
        "--name",
        default="",
        help="name of the result files; default: folder and name of the question file (hotpotqa-dev, or `test` for "
        "the run's test questions), followed by the system if one is given",
    )
    return parser


def comparison_parser() -> FlagParser:
    """The flags of `compare`."""
    parser = FlagParser(prog=f"{PROG} compare", description="Compare two results of the same questions.")
    parser.add_argument("results", nargs=2, type=Path, metavar="RESULT", help="a file eval/<name>.json of any run")
    _add_varied(parser)
    return parser


def runs_parser() -> FlagParser:
    """The flags of `runs`."""
    parser = FlagParser(
        prog=f"{PROG} runs",
        description="Compare two systems in several runs, e.g. of several seeds, and in their mean.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders with eval/<name>.json of both")
    parser.add_argument(
        "--results", nargs=2, default=TRAINED_SYSTEMS, metavar="NAME",
        help="which results of eval are compared; a path that ends with .json is one that all runs are compared with; "
        f"default: {' '.join(TRAINED_SYSTEMS)}",
    )  # fmt: skip
    parser.add_argument("--metric", default="em", help="a metric of the results; default: em")
    _add_varied(parser)
    return parser


def _add_varied(parser: FlagParser) -> None:
    parser.add_argument(
        "--varied", nargs="+", default=[], metavar="FACT", help="facts in which they may differ, e.g. retrieval.top_k"
    )


def habits_parser() -> FlagParser:
    """The flags of `habits`."""
    parser = FlagParser(prog=f"{PROG} habits", description="Count what a reward may teach without anybody wanting it.")
    parser.add_argument(
        "trajectories", nargs="+", type=Path, metavar="TRAJECTORIES",
        help="files trajectories/<name>.jsonl of any runs, a column each; words that the first never has count as new",
    )  # fmt: skip
    return parser


def table_parser() -> FlagParser:
    """The flags of `table`."""
    parser = FlagParser(prog=f"{PROG} table", description="Make one of the paper's tables for a run or a model.")
    add = parser.add_argument
    add("table", choices=PLANS, help="which table")
    add(
        "--checkpoint", nargs="+", required=True, metavar="DIR",
        help="a run, or a model with --config or --corpus; for `rewards` runs with different rewards",
    )  # fmt: skip
    add("--config", type=Path, metavar="FILE", help="with a model: a YAML recipe for protocol, retrieval and data")
    add("--corpus", type=Path, metavar="FILE", help="passages; default: the run's index, or the recipe's corpus")
    add("--phase", choices=POLICY_PHASES, help="which policy of the run; default: the system's own, or the last one")
    add(
        "--questions", nargs="+", default=[], metavar="[NAME=]FILE",
        help="sets of questions, a column each; default: the run's test questions",
    )  # fmt: skip
    add(
        "--systems", nargs="+", choices=SYSTEMS, default=[], metavar="SYSTEM",
        help=f"rows of `main` and `tokens`, among {', '.join(SYSTEMS)}; default: all whose policy there is",
    )  # fmt: skip
    add("--system", choices=SYSTEMS, default="r3rag", help="the system of the other tables; default: r3rag")
    add("--values", default="1-10", help="values of `max_steps` and `top_k`: 1-10 or 1,2,5; default: 1-10")
    add(
        "--retriever", nargs="+", action="append", default=[], metavar=("LABEL", "key=value"),
        help="a row of `retrievers` and the keys that choose it; repeat it; default: the checkpoint's own, and BM25",
    )  # fmt: skip
    add("--name", default="", help="name of the files in <run>/tables; default: that of the table")
    add(
        "--varied", nargs="+", default=[], metavar="FACT", help="further facts of the fingerprints in which rows differ"
    )
    parser.epilog = "key=value words, anywhere but after --retriever, change configuration keys."
    return parser


def parse_table(words: Sequence[str]) -> Request:
    """What the words after `table` ask for.

    Raises:
        UserError: a value of a flag has not the form that the flag has.
    """
    flags: list[str] = []
    overrides: list[str] = []
    is_of_retriever = False
    for word in words:  # a list of values would take the keys after it for its own
        is_of_retriever = word == "--retriever" if word.startswith("--") else is_of_retriever
        (overrides if not is_of_retriever and _is_key(word) else flags).append(word)
    return _request(table_parser().parse_args(flags), overrides)


def _is_key(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and (name in schema() or name.partition(".")[0] in section_names())


def _request(args: argparse.Namespace, overrides: Sequence[str]) -> Request:
    def open_at(place: str, overrides: Sequence[str]) -> Checkpoint:
        words = vars(args) | {"checkpoint": place, "overrides": list(overrides), "phase": None}
        return open_checkpoint(argparse.Namespace(**words))

    check_name(args.name)
    retrievers = [(words[0], tuple(words[1:])) for words in args.retriever]
    for label, keys in retrievers:
        if "=" in label or not all("=" in key for key in keys):
            raise UserError(f"--retriever must be a label and key=value words; got {' '.join([label, *keys])}")
    if len({label for label, _ in retrievers}) < len(retrievers):
        raise UserError("--retriever must have different labels; got one twice")
    return Request(
        table=args.table,
        places=tuple(args.checkpoint),
        open_checkpoint=open_at,
        questions=question_sets(args.questions),
        overrides=tuple(overrides),
        systems=tuple(args.systems),
        system=args.system,
        phase=args.phase,
        values=read_values(args.values),
        retrievers=tuple(retrievers),
        varied=tuple(args.varied),
        corpus=args.corpus,
        name=args.name,
    )


def question_sets(words: Sequence[str]) -> tuple[QuestionSet, ...]:
    """Sets of questions from `[NAME=]FILE`; none: the run's test questions.

    Raises:
        UserError: two have one name.
    """
    sets = []
    for word in words:
        name, equals, file = word.partition("=")
        path = Path(file if equals else word)
        sets.append(QuestionSet(name if equals else file_name(path), path))
    names = [one.name for one in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--questions must have different names, NAME=FILE gives one; got {twice} twice")
    return tuple(sets) or (QuestionSet(TEST),)


def read_values(text: str) -> tuple[int, ...]:
    """`1-10` or `1,2,5` as numbers.

    Raises:
        UserError: it is neither.
    """
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        values = list(range(int(match[1]), min(int(match[2]), int(match[1]) + MAX_VALUES) + 1))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        values = [int(word) for word in text.split(",")]
    else:
        values = []
    if not values or values[0] < 1 or len(set(values)) < len(values) or len(values) > MAX_VALUES:
        raise UserError(f"--values must be like 1-10 or 1,2,5, at most {MAX_VALUES} numbers from 1; got {text!r}")
    return tuple(values)
