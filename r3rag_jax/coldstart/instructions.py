"""The instruction format of the released `R3-RAG-ColdStartTrainingData`: one row a step, its history in the prompt.

    {"instruction": "The question: …\\nStep 1:\\nThe problem analysis: …\\nThe retrieval query: …\\nThe retrieval
     documents: …", "input": "", "output": "Step 2:\\nThe problem analysis: …\\nThe final answer: …"}

The row of an answer holds its whole trajectory, so rows may come in any order. What the format lacks: ids, other
accepted answers than the one given, and where a passage ends and the next one begins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from r3rag_jax.config import FlagParser
from r3rag_jax.data.fields import FieldError, Row, get_field, get_text, show
from r3rag_jax.data.jsonl import read_parsed, write_jsonl
from r3rag_jax.data.questions import identity, iterate_passages
from r3rag_jax.data.records import STOP, OnError, listed
from r3rag_jax.data.trajectories import read_trajectories, trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.run.files import open_atomic
from r3rag_jax.text.protocols import StepsProtocol, question_text
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

PROTOCOL = StepsProtocol()
QUESTION = question_text("")
ANALYSIS, DOCUMENTS = "The problem analysis:", "\n" + PROTOCOL.render_passages([""]).rstrip()


# ---------------------------------------------------------------------------------------- out


def rows_of(trajectory: Trajectory) -> Iterator[dict[str, str]]:
    """Yield the rows of a trajectory, in order."""
    instruction = question_text(trajectory.question)
    for number, step in enumerate(trajectory.steps, 1):
        output = PROTOCOL.render_step(step, number)
        yield {"instruction": instruction, "input": "", "output": output}
        documents = PROTOCOL.render_passages([passage.contents for passage in step.passages])
        instruction += f"\n{output}\n{documents}"


def export(trajectories: Iterable[Trajectory], out: Path) -> int:
    """Write trajectories as one JSON array of rows; return the number of rows."""
    num = 0
    with open_atomic(out) as file:
        for row in (row for trajectory in trajectories for row in rows_of(trajectory)):
            text = json.dumps(row, ensure_ascii=False, indent=4).replace("\n", "\n    ")
            file.write(f"{',' if num else '['}\n    {text}")
            num += 1
        file.write("\n]\n" if num else "[]\n")
    return num


# ---------------------------------------------------------------------------------------- in


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row: the steps in its prompt, its own step after them, and the documents between them."""

    question: str
    steps: tuple[Step, ...]  # without passages
    documents: tuple[str, ...]  # of each step but the last

    def prefixes(self) -> Iterator[tuple[str, tuple[Step, ...]]]:
        """Question and steps of this row and of those that come before it in its trajectory."""
        return ((self.question, self.steps[:number]) for number in range(1, len(self.steps) + 1))


def read_instructions(path: Path, corpus: Path | None = None, on_error: OnError = STOP) -> list[Trajectory]:
    """Read the trajectories of a file of rows; says which rows are of none, and how many documents are not found.

    Questions get digests of their text as ids. Passages get the ids of the corpus, where it has their text; others are
    split at lines in quotation marks, which are titles, and get digests.

    Args:
        corpus: a file of passages, of which those that the rows show are looked up.

    Raises:
        UserError: no row holds an answer; or, unless `on_error` leaves the row out, one is malformed (file and line).
    """
    rows = [*read_parsed(path, _parse_row, on_error)]
    ends = [*dict.fromkeys(row for _, row in rows if row.steps[-1].answer is not None)]
    if not ends:
        raise UserError(f"{path}: expected a row whose output holds a final answer; got none in {len(rows)}")
    known = {prefix for row in ends for prefix in row.prefixes()}
    lost = [f"line {line}" for line, row in rows if (row.question, row.steps) not in known]
    if lost:
        on_error.say(f"{path}: {len(lost)} of {len(rows)} rows belong to no answer: {listed(lost, ', ')}")
    texts = {text for row in ends for text in row.documents}
    found = _find(texts, corpus, on_error) if corpus else {}
    if corpus and (missing := len(texts - found.keys())):
        on_error.say(f"{path}: {missing} of {len(texts)} lists of documents are not passages of {corpus}")
    num_of: Counter[str] = Counter()
    trajectories = []
    for row in ends:
        id = _digest(identity(Question("", row.question, ())))
        trajectories.append(_trajectory(row, id, num_of[id], found))
        num_of[id] += 1
    return trajectories


def _trajectory(row: _Row, id: str, sample_index: int, found: Mapping[str, tuple[Passage, ...]]) -> Trajectory:
    """The trajectory that a row with an answer ends; `found`: the passages of documents that the corpus has."""
    *searches, last = row.steps
    steps = [
        dataclasses.replace(step, passages=found.get(text) or _split(text))
        for step, text in zip(searches, row.documents, strict=True)
    ]
    question = Question(id, row.question, (last.answer or "",))
    return Trajectory(question, (*steps, last), Status.ANSWERED, sample_index=sample_index)


def _parse_row(row: Row) -> _Row:
    """Parse a row; a FieldError says what is wrong with it."""
    if extra := get_field(row, "input", str, default=""):
        raise FieldError(f"input must be empty; got {show(extra)}")
    instruction, output = get_text(row, "instruction"), get_text(row, "output").strip()
    if not instruction.startswith(QUESTION):
        raise FieldError(f"instruction must begin with {QUESTION!r}; got {show(instruction)}")
    head, *parts = _split_steps(instruction.removeprefix(QUESTION))
    steps, documents = [], []
    for number, part in enumerate(parts, 1):
        written, mark, shown = part.partition(DOCUMENTS)
        if not mark:
            raise FieldError(f"step {number} of the instruction must show its documents; got {show(part)}")
        steps.append(_parse_step(written, number, "instruction"))
        documents.append(shown.strip())
    steps.append(_parse_step(output, len(parts) + 1, "output"))
    if any(step.query is None for step in steps[:-1]):
        raise FieldError("only the last step may hold an answer")
    return _Row(head.strip(), tuple(steps), tuple(documents))


def _split_steps(text: str) -> list[str]:
    """The question, and the text of each step with its documents; the steps are numbered from 1."""
    parts = list[str]()
    while True:
        before, mark, after = text.partition(f"\nStep {len(parts) + 1}:\n{ANALYSIS}")
        parts.append(before)
        if not mark:
            return parts
        text = mark.lstrip("\n") + after


def _parse_step(text: str, number: int, where: str) -> Step:
    step = PROTOCOL.parse_step(text, number)
    if not step.is_well_formed:
        raise FieldError(f"the {where} must hold a well-formed step {number}; got {show(text)}")
    return step


def _find(texts: Collection[str], corpus: Path, on_error: OnError) -> dict[str, tuple[Passage, ...]]:
    """Documents as rows show them -> the passages of the corpus that they are made of."""
    first_lines = {line for text in texts for line in text.split("\n")}
    passages: dict[str, list[Passage]] = {}
    for passage in iterate_passages(corpus, on_error):
        first = passage.contents.strip().partition("\n")[0]
        if first in first_lines:
            passages.setdefault(first, []).append(passage)
    found = {text: _cover(text, passages) for text in texts}
    return {text: cover for text, cover in found.items() if cover}


def _cover(text: str, passages: Mapping[str, Sequence[Passage]]) -> tuple[Passage, ...]:
    """The passages that a text is made of, one after the other; none where they do not make up all of it."""
    found: list[Passage] = []
    while text:
        alike = passages.get(text.partition("\n")[0], ())
        fitting = [passage for passage in alike if f"{text}\n".startswith(f"{passage.contents.strip()}\n")]
        if not fitting:
            return ()
        found.append(max(fitting, key=lambda passage: len(passage.contents)))
        text = text[len(found[-1].contents.strip()) :].lstrip("\n")
    return tuple(found)


def _split(text: str) -> tuple[Passage, ...]:
    """The passages of documents that no corpus names: each begins with a line in quotation marks, its title."""
    parts = re.split(r'\n(?="[^"\n]+"\n)', text) if text else []
    return tuple(Passage(f"text-{_digest(part)}", part) for part in dict.fromkeys(parts))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------- commands


def run(action: str, words: Sequence[str], say: Callable[[str], None]) -> None:
    """Carry out `import` or `export` with the words of the command line behind it.

    Raises:
        UserError: a line of the file is wrong.
    """
    parser = FlagParser(prog=f"python -m r3rag_jax.coldstart {action}")
    parser.add_argument("file", type=Path, metavar="FILE", help="what is read")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="passages, for their ids or their text")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="as data.on_error")
    if action == "export":
        parser.add_argument("--top-k", type=int, metavar="K", default=1 << 30, help="passages of a step; default: all")
    args = parser.parse_args(words)
    on_error = OnError(args.on_error, say)
    if action == "import":
        trajectories = read_instructions(args.file, args.corpus, on_error)
        write_jsonl(args.out, map(trajectory_to_dict, trajectories))
        say(f"{args.out}: {len(trajectories)} trajectories")
        return
    corpus = {passage.id: passage for passage in iterate_passages(args.corpus, on_error)} if args.corpus else {}
    found = read_trajectories(args.file, corpus, args.top_k, on_error)
    say(f"{args.out}: {export(found, args.out)} rows of {len(found)} trajectories")
