"""The evidence that questions name, `metadata.supporting_ids`: whether it is there, and is of the corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from r3rag_jax.config import RewardConfig
from r3rag_jax.data.records import Records, listed
from r3rag_jax.errors import UserError
from r3rag_jax.types import Passage, Question

MAX_READ = 1000  # passages that are looked at, as a sample


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the questions of a file name as their evidence."""

    questions: Records[Question]
    unknown: tuple[str, ...]  # `'id' (line n)` of every supporting id that is no passage of the corpus
    num_ids: int  # supporting ids of all questions
    num_without: int  # questions without one that is a passage of the corpus
    corpus: Mapping[str, Passage] | None
    named: tuple[str, ...]  # ids of the passages of the corpus that are named

    @classmethod
    def of(cls, questions: Records[Question], corpus: Mapping[str, Passage] | None) -> Evidence:
        """`corpus`: passages by id; None where it is not known which passages can be found: every id counts."""
        known: dict[str, bool] = {}
        unknown: list[str] = []
        num_ids, num_without = 0, 0
        for line, question in zip(questions.lines, questions, strict=True):
            ids = dict.fromkeys(question.supporting_ids)
            for id in ids:
                if id not in known:
                    known[id] = corpus is None or id in corpus
            unknown += [f"{id!r} (line {line})" for id in ids if not known[id]]
            num_ids += len(ids)
            num_without += not any(known[id] for id in ids)
        return cls(questions, tuple(unknown), num_ids, num_without, corpus, tuple(id for id in known if known[id]))

    def report(self, say: Callable[[str], None]) -> None:
        """Say which supporting ids are no passages of the corpus; nothing if there are none."""
        if self.unknown:
            rule = f"{len(self.unknown)} of {self.num_ids} metadata.supporting_ids are no passages of the corpus"
            say(f"{self.questions.path}: {rule}: {listed(self.unknown, ', ')}")

    def report_cut(self, shown: Callable[[Passage], str], max_tokens: int, say: Callable[[str], None]) -> None:
        """Say how many of the passages that are named are longer than what the policy is shown of them.

        Args:
            shown: the text of a passage that prompts show, its first `max_tokens`.
        """
        if self.corpus is None:
            return
        passages = [self.corpus[id] for id in self.named[:MAX_READ]]
        if num := sum(shown(passage) != passage.contents for passage in passages):
            say(
                f"{self.questions.path}: retrieval.passage_tokens={max_tokens} cuts {num} of {len(passages)} "
                "supporting passages: the policy never reads what is behind the cut"
            )

    def check(self, rewards: RewardConfig, say: Callable[[str], None]) -> None:
        """Say how many questions have no evidence that the process reward `gold` could find.

        Raises:
            UserError: none of them has any.
        """
        is_needed = rewards.process == "gold" and rewards.use_process and rewards.process_weight > 0
        if not is_needed or not self.num_without:
            return
        num, path = len(self.questions), self.questions.path
        if self.num_without == num:
            raise UserError(
                f"{path}: rewards.process=gold needs metadata.supporting_ids of the corpus; none of {num} questions "
                "has any: take rewards.process=gain, embedding or judge, or rewards.use_process=false"
            )
        say(
            f"{path}: {self.num_without} of {num} questions have no metadata.supporting_ids of the corpus: with "
            "rewards.process=gold their searches earn nothing"
        )
