"""Evaluation of any system on any questions: greedy trajectories, a summary, and their files in the run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.fingerprint import DigestOf, Facts, fingerprint
from r3rag_jax.evaluation.groups import ALL, groups_of
from r3rag_jax.evaluation.metrics import measure
from r3rag_jax.evaluation.results import read_result
from r3rag_jax.evaluation.systems import BASE_POLICY, SYSTEMS, System
from r3rag_jax.parallel.processes import barrier, exists, on_process_0
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rewards.scorer import accuracy
from r3rag_jax.rollout.backends import RolloutBackend
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.rollout.scheduler import OnDone, rollout
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.files import write_json
from r3rag_jax.run.progress import ProgressBar
from r3rag_jax.run.provenance import has_finished, read_provenance
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.types import Question, Trajectory


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates systems with the parts of one run. Of several processes all call it, and process 0 alone writes."""

    config: Config
    directory: RunDirectory
    tokenizer: Tokenizer
    retriever: Retriever
    make_search_env: Callable[[], EnvFactory]  # R3-RAG's protocol; not every tokenizer can write it
    open_backend: Callable[[str], RolloutBackend]  # of a policy: BASE_POLICY, or the phase that trained it
    open_judge: Callable[[], Judge]
    digest_of: DigestOf
    console: Console

    @property
    def search_env(self) -> EnvFactory:
        """R3-RAG's protocol as configured."""
        return self.make_search_env()

    def run(self, questions: Sequence[Question]) -> bool:
        """Evaluate `eval.systems` on questions; return whether one was missing.

        A system whose result has the fingerprint of this evaluation is left as it is.

        Raises:
            UserError: the phase that trains a system's policy has not finished, or the judge fails too often.
        """
        for name in self.config.eval.systems:
            self._check_policy(name, SYSTEMS[name].policy)
        expected = {name: self.fingerprint(name, questions) for name in self.config.eval.systems}
        missing = on_process_0(
            lambda: [name for name, facts in expected.items() if self._stored_fingerprint(name) != facts],
            "evaluations that are missing",
        )
        for name in missing:
            system = SYSTEMS[name]
            with self._bar(name, questions) as bar:
                trajectories = self.rollouts(
                    system,
                    questions,
                    on_done=lambda t: bar.advance(retrievals=t.num_retrievals),
                )
            self.write(name, trajectories, expected[name])
        barrier("eval")
        return bool(missing)

    def rollouts(
        self,
        system: System,
        questions: Sequence[Question],
        *,
        policy: str | None = None,
        on_done: OnDone | None = None,
    ) -> list[Trajectory]:
        """Return one greedy trajectory of a system per question; `policy` replaces the system's own."""
        return rollout(
            self.open_backend(policy or system.policy),
            system.make_env(self),
            self.retriever,
            [RolloutRequest(question) for question in questions],
            search_overlap=self.config.rollout.search_overlap,
            on_done=on_done,
        )

    def fingerprint(self, system: str, questions: Iterable[Question], policy: str | None = None) -> Facts:
        """Return what the numbers of a system depend on; `policy` replaces the system's own."""
        policy = SYSTEMS[system].policy if policy is None else policy
        index, cold_start = self.retriever.fingerprint, self._cold_start_of(policy)
        return fingerprint(self.config, system, policy, index, questions, self.digest_of, cold_start)

    def _cold_start_of(self, policy: str) -> str | None:
        """Return the digest of the cold start that a policy is of; None where it is of none, or nothing is known."""
        if self.config.rollout.server.is_given:
            return None
        if policy == "sft":
            return self.digest_of(policy)
        if policy != "rl":
            return None
        recorded = on_process_0(lambda: dict(read_provenance(self.directory.policy(policy))), f"provenance of {policy}")
        return recorded.get("cold_start")

    def write(self, name: str, trajectories: Sequence[Trajectory], fingerprint: Facts) -> dict[str, Any]:
        """Write `trajectories/<name>.jsonl` and `eval/<name>.json`, and return the content of the latter.

        Raises:
            UserError: the judge fails too often; the trajectories are written before it is asked.
        """
        is_writer = jax.process_index() == 0
        if is_writer:
            write_jsonl(self.directory.trajectories(name), map(trajectory_to_dict, trajectories))
        summary = summarise(name, trajectories, fingerprint, self.open_judge() if self.config.eval.judge else None)
        if is_writer:
            write_json(self.directory.evaluation(name), summary)
        return summary

    def _check_policy(self, name: str, policy: str) -> None:
        """Raise a UserError unless the policy is there, and RL's is of the cold start that is there."""
        if policy == BASE_POLICY or self.config.rollout.server.is_given:
            return
        if not exists(self.directory.policy(policy)):
            raise UserError(f"eval.systems names {name}, but phase {policy} of {self.directory.path} has not finished")
        if policy == "rl" and exists(self.directory.policy("sft")):
            has_finished(self.directory.policy("rl"), {"cold_start": self.digest_of("sft")})

    def _stored_fingerprint(self, name: str) -> Facts | None:
        return (read_result(self.directory, name) or {}).get("fingerprint")

    def _bar(self, name: str, questions: Sequence[Question]) -> ProgressBar:
        return ProgressBar(f"eval {name}", len(questions), console=self.console, live=self.config.log.progress)


def summarise(
    system: str, trajectories: Sequence[Trajectory], fingerprint: Facts, judge: Judge | None = None
) -> dict[str, Any]:
    """Return the content of `eval/<system>.json`: metrics of all questions and of each group of them.

    Raises:
        UserError: the judge fails too often.
    """
    acc = None if judge is None else accuracy(trajectories, judge)[0]
    groups: dict[str, list[int]] = {ALL: list(range(len(trajectories)))}
    for index, trajectory in enumerate(trajectories):
        for name in groups_of(trajectory.question):
            groups.setdefault(name, []).append(index)
    return {
        "system": system,
        "title": SYSTEMS[system].title if system in SYSTEMS else system,
        "num_questions": len(trajectories),
        "fingerprint": fingerprint,
        "groups": {
            name: measure([trajectories[i] for i in indices], None if acc is None else acc[indices])
            for name, indices in groups.items()
        },
    }
