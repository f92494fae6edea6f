"""Section `data`: where questions, trajectories and passages come from."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from r3rag_jax.config.section import Section, key, require


class DataConfig(Section):
    """Where questions, trajectories and passages come from."""

    dotted: ClassVar[str] = "data"

    source: Literal["world", "files"] = key(
        "world", "`world`: generate the fictional encyclopedia; `files`: read the paths below"
    )
    dir: str = key("", "directory that the relative paths below start from", "path")
    corpus: str = key("", "passages {id, contents}; JSON Lines, a JSON array or Parquet, as all files below", "path")
    sft: str = key("", "trajectories for the cold start {id, question, golden_answers, steps}", "path")
    rl: str = key("", "questions for RL {id, question, golden_answers, metadata}", "path")
    dev: str = key("", "questions for the evaluations while training", "path")
    test: str = key("", "questions for the final tables", "path")
    num_sft: int = key(
        0, "trajectories that the cold start uses, a random subset drawn with the seed; 0: all", "trajectories", ge=0
    )
    disjoint: bool = key(True, "RL leaves out questions with the text of one of the cold start's trajectories")
    refresh_retrieved: bool = key(
        False, "the cold start replaces the retrieved_ids of the file by what this run's retriever finds"
    )

    on_error: Literal["stop", "skip"] = key(
        "stop", "a record that cannot be used: `stop` and name its file and line, or `skip` it and report how many"
    )

    def path(self, name: str) -> Path:
        """The file of `corpus` or of a split."""
        return Path(self.dir) / getattr(self, name)

    @model_validator(mode="after")
    def _check_corpus(self) -> Self:
        require(
            self.source != "files" or self.corpus != "",
            "data.corpus must be given when data.source is files; got none",
            "data.corpus",
            "data.source",
        )
        return self
