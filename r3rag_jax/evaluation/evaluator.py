"""Evaluation of any system on any questions: trajectories, a summary, and their files in the run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from r3rag_jax.config import Config
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.fingerprint import DigestOf, Facts, fingerprint
from r3rag_jax.evaluation.results import read_result
from r3rag_jax.evaluation.summary import summarise
from r3rag_jax.evaluation.systems import BASE_POLICY, SYSTEMS, System
from r3rag_jax.parallel.processes import barrier, exists, on_process_0
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.judge.judge import Judge
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
            self.evaluate(name, SYSTEMS[name], questions, expected[name])
        barrier("eval")
        return bool(missing)

    def evaluate(
        self, name: str, system: System, questions: Sequence[Question], fingerprint: Facts, policy: str | None = None
    ) -> dict[str, Any]:
        """Roll a system out on questions behind a progress bar, write the files, and return the result.

        Args:
            name: of the files.
            policy: replaces the system's own.

        Raises:
            UserError: as `write`; or the backend failed.
        """
        num = len(questions) * self.config.eval.samples
        with ProgressBar(f"eval {name}", num, console=self.console, live=self.config.log.progress) as bar:
            trajectories = self.rollouts(
                system, questions, policy=policy, on_done=lambda t: bar.advance(retrievals=t.num_retrievals)
            )
        return self.write(name, trajectories, fingerprint)

    def rollouts(
        self,
        system: System,
        questions: Sequence[Question],
        *,
        policy: str | None = None,
        on_done: OnDone | None = None,
    ) -> list[Trajectory]:
        """Return `eval.samples` trajectories of a system per question, next to each other, at `eval.temperature`.

        `policy` replaces the system's own.
        """
        sampling = self.config.eval
        return rollout(
            self.open_backend(policy or system.policy),
            system.make_env(self),
            self.retriever,
            [
                RolloutRequest(question, index, sampling.temperature, sampling.seed)
                for question in questions
                for index in range(sampling.samples)
            ],
            search_overlap=self.config.rollout.search_overlap,
            on_done=on_done,
        )

    def fingerprint(
        self, system: str, questions: Sequence[Question], policy: str | None = None, split: str = "test"
    ) -> Facts:
        """Return what the numbers of a system depend on.

        Args:
            policy: replaces the system's own.
            split: what the questions are called.
        """
        policy = SYSTEMS[system].policy if policy is None else policy
        index, cold_start = self.retriever.fingerprint, self._cold_start_of(policy)
        return fingerprint(self.config, system, policy, index, questions, self.digest_of, cold_start, split)

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
        """Write `trajectories/<name>.jsonl`, `eval/<name>.questions.jsonl`, `eval/<name>.json`; return the last.

        Raises:
            UserError: the judge fails too often; the trajectories are written before it is asked.
        """
        is_writer = jax.process_index() == 0
        if is_writer:
            write_jsonl(self.directory.trajectories(name), map(trajectory_to_dict, trajectories))
        judge = self.open_judge() if self.config.eval.asks_judge else None
        measured = summarise(name, trajectories, fingerprint, self.config.eval, judge)
        if is_writer:
            write_jsonl(self.directory.evaluation_rows(name), measured.rows)
            write_json(self.directory.evaluation(name), measured.result)
        return measured.result

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
