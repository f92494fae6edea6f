"""The questions, passages and teacher trajectories of a run, from the user's files or the embedded world's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.config import Config
from r3rag_jax.data.questions import read_questions
from r3rag_jax.data.records import STOP, OnError, Records
from r3rag_jax.data.trajectories import read_trajectories
from r3rag_jax.errors import UserError
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.types import Passage, Question, Trajectory


class Dataset:
    """Reads the splits of a run; its files exist once the index phase is done."""

    def __init__(
        self, config: Config, run: RunDirectory, corpus: Callable[[], Mapping[str, Passage]], on_error: OnError = STOP
    ):
        """`corpus`: passages by id, asked for only when trajectories are read."""
        self._config, self._run, self._corpus, self._on_error = config, run, corpus, on_error
        self._files: dict[str, Records[Any]] = {}  # splits that have been read

    def path_of(self, what: str) -> Path:
        """The file of `corpus` or of a split (`sft`, `rl`, `dev`, `test`)."""
        data = self._config.data
        if data.source == "world" or (what == "sft" and data.refresh_retrieved):
            return self._run.data(what)
        return data.path(what)

    def trajectories(self) -> Records[Trajectory]:
        """The teacher's trajectories of the cold start, with the passages that a rollout would show."""
        data = self._config.data
        found = self._read("sft")
        if data.source == "world" or data.num_sft in (0, len(found)):
            return found
        if data.num_sft > len(found):
            raise UserError(
                f"data.num_sft must be at most {len(found)}, what {data.path('sft')} holds; got {data.num_sft}"
            )
        order = np.random.default_rng((self._config.seed, *b"sft")).permutation(len(found))
        return found.take(sorted(order[: data.num_sft].tolist()))

    def questions(self, split: str) -> Records[Question]:
        """The questions of a split; none where no file is given.

        Raises:
            UserError: the cold start used all questions that RL has.
        """
        data = self._config.data
        if data.source == "files" and not getattr(data, split):
            return Records("")
        questions = self._read(split)
        if data.source == "files" and split == "rl" and data.disjoint and data.sft:
            used = {trajectory.question.id for trajectory in self.trajectories()}
            questions = questions.take(i for i, question in enumerate(questions) if question.id not in used)
            if not questions:
                raise UserError(
                    f"data.disjoint leaves no question for RL: all of {data.path('rl')} are in the cold start; "
                    "take fewer (data.num_sft) or data.disjoint=false"
                )
        return questions

    def _read(self, split: str) -> Records[Any]:
        """Trajectories (`sft`) or questions of a split's file, which is read once: its faults are reported once."""
        if split not in self._files:
            path = self.path_of(split)
            if split == "sft":
                top_k = self._config.retrieval.top_k
                self._files[split] = read_trajectories(path, self._corpus(), top_k, self._on_error)
            else:
                self._files[split] = read_questions(path, self._on_error)
        return self._files[split]
