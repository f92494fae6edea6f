"""The evaluation phase: baselines, cold start and R3-RAG on the test questions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.config import Config
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.evaluator import fingerprint, greedy_rollouts, summarise
from r3rag_jax.models.policy import Policy
from r3rag_jax.parallel.processes import barrier
from r3rag_jax.retrieval.base import Retriever
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rollout.backends import RolloutBackend
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.files import write_json
from r3rag_jax.run.progress import ProgressBar
from r3rag_jax.types import Question, Trajectory

TRAINED = {"cold_start": "sft", "r3rag": "rl"}  # system -> the phase that trains its policy


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Rolls out systems on questions, and writes what came of it into the run directory."""

    config: Config
    run: RunDirectory
    policy: Policy
    retriever: Retriever
    search_env: Callable[[], EnvFactory]  # R3-RAG's protocol
    make_backend: Callable[[Callable[[], Any]], RolloutBackend]  # takes what loads the policy's parameters
    open_judge: Callable[[], Judge]
    fingerprint_fields: Mapping[str, Any]  # judge and inference server, where there are any
    console: Console

    def fingerprint(self, questions: Sequence[Question], **fields: Any) -> dict[str, Any]:
        """What two evaluations must share to be comparable."""
        index, top_k = self.retriever.fingerprint, self.config.retrieval.top_k
        return fingerprint(questions, index=index, top_k=top_k, **fields, **self.fingerprint_fields)

    def rollouts(self, system: str, questions: Sequence[Question]) -> list[Trajectory]:
        """One greedy trajectory per question, by a system of `eval.systems`, on a progress bar.

        Raises:
            UserError: the phase that trains the system's policy has not finished.
        """
        if system in BASELINES:
            env_factory = BASELINES[system](self.config, self.policy.tokenizer)
            return self._rollouts(f"eval {system}", questions, self.policy.base_params, env_factory)
        phase = TRAINED[system]
        if not self.run.policy(phase).exists() and not self.config.rollout.server.is_given:
            raise UserError(f"eval.systems names {system}, but phase {phase} of {self.run} has not finished")
        return self.trained_rollouts(phase, questions, f"eval {system}")

    def trained_rollouts(self, phase: str, questions: Sequence[Question], title: str) -> list[Trajectory]:
        """One greedy trajectory per question, by the policy of a phase in R3-RAG's protocol."""
        load = lambda: self.policy.load(self.run.policy(phase))  # noqa: E731
        return self._rollouts(title, questions, load, self.search_env())

    def write(self, name: str, trajectories: Sequence[Trajectory], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """Write the trajectories and the metrics of an evaluation, and return the metrics. Only process 0 writes.

        The trajectories are written first, so that they are kept when the judge fails.
        """
        is_writer = jax.process_index() == 0
        if is_writer:
            write_jsonl(self.run.trajectories(name), map(trajectory_to_dict, trajectories))
        judge = self.open_judge() if self.config.eval.judge else None
        summary = summarise(name, trajectories, dict(fingerprint), judge)
        if is_writer:
            write_json(self.run.evaluation(name), summary)
        return summary

    def run_phase(self, questions: Sequence[Question]) -> bool:
        """Evaluate every system of `eval.systems` that has no result with this fingerprint; False if all have.

        At most `eval.max_questions` of the questions are taken.
        """
        questions = questions[: self.config.eval.max_questions or None]
        expected, did_work = self.fingerprint(questions), False
        for system in self.config.eval.systems:
            path = self.run.evaluation(system)
            if path.exists() and json.loads(path.read_text())["fingerprint"] == expected:
                continue
            did_work = True
            self.write(system, self.rollouts(system, questions), expected)
        barrier("eval")
        return did_work

    def _rollouts(
        self, title: str, questions: Sequence[Question], load: Callable[[], Any], env_factory: EnvFactory
    ) -> list[Trajectory]:
        backend = self.make_backend(load)
        with ProgressBar(title, len(questions), console=self.console, live=self.config.log.progress) as bar:
            return greedy_rollouts(
                backend, env_factory, self.retriever, questions, search_overlap=self.config.rollout.search_overlap,
                on_done=lambda trajectory: bar.advance(retrievals=trajectory.num_retrievals),
            )  # fmt: skip


def load_results(run: RunDirectory, systems: Sequence[str]) -> list[dict[str, Any]]:
    """The finished evaluations of these systems, in their order."""
    paths = [run.evaluation(system) for system in systems]
    return [json.loads(path.read_text()) for path in paths if path.exists()]
