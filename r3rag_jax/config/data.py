"""Section `data`: where questions, trajectories and passages come from."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from r3rag_jax.config.section import ConfigError, Section, key, require

# Data sets whose released layouts are read (`data/readers/layouts.py`); `flashrag` is FlashRAG's layout of any.
DATA_SETS = ("flashrag", "hotpotqa", "2wikimultihopqa", "musique", "nq", "triviaqa", "popqa", "bamboogle")
FILES_READ = {"sft": ("sft",), "rl": ("rl", "dev"), "eval": ("test",)}  # by phase; the first must be given


def split_source(source: str | Path) -> tuple[str, str]:
    """NAME and FILE of `NAME:FILE`, a file of the data set NAME; a file alone has the name "".

    Raises:
        ConfigError: there is no such data set.
    """
    name, colon, file = str(source).partition(":")
    if not colon or file.startswith("//") or not re.fullmatch(r"\w+", name):
        return "", str(source)
    if name not in DATA_SETS:
        close = difflib.get_close_matches(name, DATA_SETS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else f"; a file of this name is ./{source}"
        raise ConfigError(f"NAME of a source NAME:FILE must be one of {', '.join(DATA_SETS)}; got {name!r}{hint}")
    return name, file


class DataConfig(Section):
    """Where questions, trajectories and passages come from."""

    dotted: ClassVar[str] = "data"

    source: Literal["world", "files"] = key(
        "world", "`world`: generate the fictional encyclopedia; `files`: read the paths below"
    )
    dir: str = key("", "directory that the relative paths below start from", "path")
    corpus: str = key("", "passages {id, contents}; JSON Lines, a JSON array or Parquet, as all files below", "path")
    sft: str = key("", "trajectories for the cold start {id, question, golden_answers, steps}", "path")
    rl: str = key(
        "",
        "questions for RL {id, question, golden_answers, metadata}, or `NAME:FILE`, a released file of the data set "
        f"NAME ({', '.join(DATA_SETS[1:])}); so also dev and test",
        "path",
    )
    dev: str = key("", "questions for the evaluations while training", "path")
    test: str = key("", "questions for the final tables", "path")
    num_sft: int = key(
        0, "trajectories that the cold start uses, a random subset drawn with the seed; 0: all", "trajectories", ge=0
    )
    disjoint: bool = key(True, "RL leaves out questions with the text of one of the cold start's trajectories")
    hold_out: tuple[str, ...] = key(
        (),
        "values of `metadata.composition` whose questions neither the cold start nor RL sees; the tables of dev and "
        "test questions then tell seen and unseen compositions apart",
    )
    refresh_retrieved: bool = key(
        False, "the cold start replaces the retrieved_ids of the file by what this run's retriever finds"
    )
    storage: Literal["memory", "array_record"] = key(
        "memory",
        "where the records of sft and rl are while training: in each process's `memory`, or in array_record files in "
        "the run directory, of which each process reads what it needs",
    )
    leakage: Literal["report", "refuse", "off"] = key(
        "report",
        "questions of dev or test that the run learns from (the same question; or an answer and an entity in common): "
        "`report` them, `refuse` to train, or do not look (`off`)",
    )
    on_error: Literal["stop", "skip"] = key(
        "stop", "a record that cannot be used: `stop` and name its file and line, or `skip` it and report how many"
    )

    def path(self, name: str) -> Path:
        """The file of `corpus` or of a split."""
        return Path(self.dir) / split_source(getattr(self, name))[1]

    def source_of(self, name: str) -> str:
        """The file of a split, as `NAME:FILE` where it has a name."""
        data_set = split_source(getattr(self, name))[0]
        return f"{data_set}:{self.path(name)}" if data_set else str(self.path(name))

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in ("rl", "dev", "test"):
            try:
                split_source(getattr(self, name))
            except ConfigError as error:
                raise ConfigError(f"data.{name}: {error}", [f"data.{name}"]) from None
        return self

    @model_validator(mode="after")
    def _check_hold_out(self) -> Self:
        require(
            not self.hold_out or (self.source == "files" and self.rl != ""),
            "data.hold_out must be empty without data.rl, a file whose questions have metadata.composition; got "
            f"{', '.join(self.hold_out)}",
            "data.hold_out",
            "data.rl",
        )
        return self

    @model_validator(mode="after")
    def _check_corpus(self) -> Self:
        require(
            self.source != "files" or self.corpus != "",
            "data.corpus must be given when data.source is files; got none",
            "data.corpus",
            "data.source",
        )
        return self
