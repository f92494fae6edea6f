"""The questions, passages and teacher trajectories of a run, from the user's files or the embedded world's."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from r3rag_jax.config import Config
from r3rag_jax.config.coldstart import TRAJECTORIES
from r3rag_jax.config.data import FILES_READ
from r3rag_jax.data.balance import shuffled, strata_of
from r3rag_jax.data.leakage import check_leakage
from r3rag_jax.data.questions import identity, question_to_dict, read_questions
from r3rag_jax.data.readers import tfds
from r3rag_jax.data.records import STOP, OnError, Records, listed
from r3rag_jax.data.trajectories import (
    read_trajectories,
    teacher_rows,
    teacher_trajectory_from_dict,
    trajectory_to_dict,
)
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import check_same, on_process_0
from r3rag_jax.run.digests import check_sums
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.types import Passage, Question, Trajectory


class Dataset:
    """Reads the splits of a run; its files exist once the index phase is done."""

    def __init__(
        self, config: Config, run: RunDirectory, corpus: Callable[[], Mapping[str, Passage]], on_error: OnError = STOP
    ):
        """`corpus`: passages by id, asked for only when trajectories are read."""
        self._config, self._run, self._corpus, self._on_error = config, run, corpus, on_error
        self._questions: dict[str, Records[Question]] = {}  # by split; each is read, and its faults said, once

    def check_files(self, phases: Collection[str]) -> None:
        """See to it, before anything is done for these phases, that the user's files are there which they read.

        Raises:
            UserError: one is not.
        """
        data = self._config.data
        names = [name for phase in phases for name in FILES_READ.get(phase, ())]
        if "rl" in phases and "sft" not in phases and data.disjoint:
            names.append("sft")
        for name in names if data.source == "files" else ():
            path = data.path(name)
            # A copy in the run directory will do.
            if getattr(data, name) and not path.exists() and not self.path_of(name).exists():
                is_made = path.absolute() == (self._config.coldstart_directory / TRAJECTORIES).absolute()
                remedy = "; python -m r3rag_jax.coldstart with the same configuration writes it" if is_made else ""
                raise UserError(f"data.{name} must name a file that is there; got {path}{remedy}")

    def path_of(self, what: str) -> Path:
        """The file of `corpus` or of a split (`sft`, `rl`, `dev`, `test`)."""
        data = self._config.data
        if data.source == "world" or (what == "sft" and data.refresh_retrieved):
            return self._run.data(what)
        return data.path(what)

    def _checked(self, what: str) -> Path:
        """`path_of`, a file of the run's own as it was written.

        Raises:
            UserError: it was changed since.
        """
        path = self.path_of(what)
        if path.parent == self._run.data_dir:
            check_sums(path.parent, [path.name], remedy="Restore it, or remove it to have it written again")
        return path

    def trajectories(self) -> Records[Trajectory]:
        """The teacher's trajectories of the cold start, with the passages that a rollout would show."""
        data, found = self._config.data, self._trajectories
        if data.hold_out:
            held_out = self._held_out
            found = found.take(i for i, one in enumerate(found) if identity(one.question) not in held_out)
        if data.source == "world" or data.num_sft in (0, len(found)):
            return found
        if data.num_sft > len(found):
            raise UserError(
                f"data.num_sft must be at most {len(found)}, what {data.path('sft')} holds"
                f"{' without data.hold_out' if data.hold_out else ''}; got {data.num_sft}"
            )
        questions = found.map(lambda trajectory: trajectory.question)
        order = shuffled(strata_of(questions, self._config.sft.balance, "sft.balance"), (self._config.seed, *b"sft"))
        return found.take(sorted(order[: data.num_sft]))

    @functools.cached_property
    def _trajectories(self) -> Records[Trajectory]:
        """All of the file."""
        path, corpus, top_k = self._checked("sft"), self._corpus(), self._config.retrieval.top_k
        read = lambda: read_trajectories(path, corpus, top_k, self._on_error)  # noqa: E731
        if self._is_stored:
            rows = self._stored("sft", path, lambda: teacher_rows(path, read().lines))
            return rows.map(lambda row: teacher_trajectory_from_dict(row, corpus, top_k))
        found = read()
        check_same(lambda: _digest(map(trajectory_to_dict, found)), "trajectories of the cold start")
        return found

    @property
    def _is_stored(self) -> bool:
        return self._config.data.storage == "array_record"

    def _stored(self, what: str, path: Path, read: Callable[[], Records[Any]]) -> Records[Any]:
        """The rows of a file as array_record files in the run directory, which process 0 writes.

        Args:
            what: `sft`, or a split of questions.
            read: reads the file; called where its rows are not stored on this machine yet.
        """
        kind: tfds.Kind = "trajectories" if what == "sft" else "questions"

        def build() -> str:
            return str(tfds.build({what: read()}, self._run.data_dir / "array_record", kind))

        built = on_process_0(build, f"stored {what}")
        # A host with a run directory of its own writes the same files there.
        directory = Path(built if Path(built).is_dir() else build())
        check_same(lambda: directory.parent.name, f"rows of {what}")
        return tfds.open_split(directory, what, path)

    def questions(self, split: str) -> Records[Question]:
        """The questions of a split, none where no file is given; RL's without those of the cold start's trajectories.

        With `data.hold_out`, RL's are also without those of held-out compositions, and `metadata.unseen` of dev and
        test questions says which are.

        Raises:
            UserError: the cold start used all questions that RL has, or of some compositions to hold out RL has none.
        """
        data = self._config.data
        if data.source == "files" and not getattr(data, split):
            return Records("")
        if split not in self._questions:
            questions = self._all_rl_questions if split == "rl" else self._read_split(split)
            if split != "rl":
                questions = self.told_apart(questions)
            elif data.hold_out:
                held_out = self._held_out
                questions = questions.take(i for i, one in enumerate(questions) if identity(one) not in held_out)
            is_left_out = data.source == "files" and split == "rl" and data.disjoint and data.sft
            self._questions[split] = self._without_cold_start(questions) if is_left_out else questions
        return self._questions[split]

    def _read_split(self, split: str) -> Records[Question]:
        """All questions of a split's file."""
        is_own = self._config.data.source == "world"
        source = str(self._checked(split)) if is_own else self._config.data.source_of(split)
        if split == "rl" and self._is_stored:
            rows = lambda: self.read(source, is_shared=False).map(question_to_dict)  # noqa: E731
            return self._stored(split, self.path_of(split), rows)
        return self.read(source)

    @functools.cached_property
    def _all_rl_questions(self) -> Records[Question]:
        """Those of held-out compositions and of the cold start included."""
        return self._read_split("rl")

    @functools.cached_property
    def _held_out(self) -> frozenset[str]:
        """Which questions neither phase sees. Those of RL say it, for the cold start's trajectories have no metadata.

        Where there are none of any such composition, as in the user's own files, this is said.

        Raises:
            UserError: no question is of one of them.
        """
        questions, wanted = self._all_rl_questions, self._config.data.hold_out
        known = {composition_of(question) for question in questions}
        missing = [name for name in wanted if name not in known]
        if 0 < len(missing) < len(wanted):
            names = listed(sorted(known - {""}), ", ")
            raise UserError(
                f"data.hold_out must name values of metadata.composition in {questions.path} ({names}); "
                f"got {', '.join(missing)}"
            )
        if missing:
            self._on_error.say(f"data.hold_out holds nothing out: {questions.path} has no question of {missing[0]}, …")
        return frozenset(identity(question) for question in questions if self._is_held_out(question))

    def _is_held_out(self, question: Question) -> bool:
        return composition_of(question) in self._config.data.hold_out

    def told_apart(self, questions: Records[Question]) -> Records[Question]:
        """Questions whose `metadata.unseen` says that their composition is held out; as they are where none is."""

        def marked(question: Question) -> Question:
            metadata = {**question.metadata, "unseen": self._is_held_out(question)}
            return dataclasses.replace(question, metadata=metadata)

        return questions.map(marked) if self._config.data.hold_out else questions

    @functools.cached_property
    def leaks(self) -> list[str]:
        """What leaks between the splits that the run's phases read, in sentences, which are also printed.

        Splits of the embedded world share no entity, and are not read for this.

        Raises:
            UserError: something leaks, and `data.leakage` is refuse.
        """
        data, phases = self._config.data, self._config.phases
        if data.source == "world" or data.leakage == "off":
            return []
        names = [name for phase in phases for name in FILES_READ.get(phase, ()) if getattr(data, name)]
        splits = {
            name: self.trajectories().map(lambda one: one.question) if name == "sft" else self.questions(name)
            for name in names
        }
        found = check_leakage({name: questions for name, questions in splits.items() if questions})
        if found and data.leakage == "refuse":
            remedy = "take them out of one of the files, or data.leakage=report"
            raise UserError(f"held-out questions must not be learnt from; {'; '.join(found)}: {remedy}")
        for text in found:
            self._on_error.say(text)
        return found

    def read(self, source: str | Path, *, is_shared: bool = True) -> Records[Question]:
        """The questions of a file, or `NAME:FILE`; says how many have the text of an earlier one.

        Args:
            is_shared: all processes read it, and compare what they got.
        """
        questions = read_questions(source, self._on_error)
        path = Path(questions.path)
        if is_shared:
            check_same(lambda: _digest(map(question_to_dict, questions)), f"questions of {path.name}")
        line_of: dict[str, int] = {}
        repeated = [
            f"line {line} is that of line {first}"
            for line, question in zip(questions.lines, questions, strict=True)
            if (first := line_of.setdefault(identity(question), line)) != line
        ]
        if repeated:
            num = f"{len(repeated)} of {len(questions)} questions are there twice under other ids"
            self._on_error.say(f"{path}: {num}: {listed(repeated, ', ')}")
        return questions

    def _without_cold_start(self, questions: Records[Question]) -> Records[Question]:
        """The questions whose text none of the cold start's trajectories has; says how many are left out."""
        used = {identity(trajectory.question) for trajectory in self.trajectories()}
        kept = questions.take(i for i, question in enumerate(questions) if identity(question) not in used)
        if not kept:
            raise UserError(
                f"data.disjoint leaves no question for RL: all of {questions.path} are in the cold start; "
                "take fewer (data.num_sft) or data.disjoint=false"
            )
        if num := len(questions) - len(kept):
            self._on_error.say(
                f"left out {num} of {len(questions)} RL questions: also in the cold start (data.disjoint)"
            )
        return kept


def composition_of(question: Question) -> str:
    """Which relations a question puts together, "" where its metadata does not say."""
    return str(question.metadata.get("composition", ""))


def _digest(rows: Iterable[Any]) -> str:
    """Hex SHA-256 of JSON values in their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return found.hexdigest()
