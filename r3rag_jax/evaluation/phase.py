"""The evaluation phase: baselines, cold start and R3-RAG on the test questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.components import Components
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.trajectories import trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.evaluator import fingerprint, greedy_rollouts, summarise
from r3rag_jax.parallel.processes import barrier
from r3rag_jax.run.files import write_json
from r3rag_jax.run.progress import ProgressBar
from r3rag_jax.types import Question, Trajectory


def eval_phase(components: Components) -> bool:
    """Baselines, cold start and R3-RAG on the test questions."""
    questions = components.dataset.questions("test")[: components.config.eval.max_questions or None]
    mark = fingerprint(questions, index=components.retriever.fingerprint, top_k=components.config.retrieval.top_k,
                       **components.sampling_mark(), **components.judge_mark())  # fmt: skip
    did_work = False
    for system in components.config.eval.systems:
        path = components.run.evaluation(system)
        if path.exists() and json.loads(path.read_text())["fingerprint"] == mark:
            continue
        did_work = True
        bar = ProgressBar(
            f"eval {system}", len(questions), console=components.console, live=components.config.log.progress
        )
        with bar:
            trajectories = evaluate_system(components, system, questions, bar)
        write_eval(components, system, trajectories, mark)
    barrier("eval")
    return did_work


def evaluate_system(
    components: Components, system: str, questions: Sequence[Question], bar: ProgressBar
) -> list[Trajectory]:
    """Trajectories of one system of `eval.systems` on the questions."""

    def on_done(trajectory: Trajectory) -> None:
        bar.advance(retrievals=trajectory.num_retrievals)

    if system in BASELINES:
        backend = components.rollout_backend(components.policy.base_params)
        env_factory = BASELINES[system](components.config, components.policy.tokenizer)
    else:
        phase = {"cold_start": "sft", "r3rag": "rl"}[system]
        if not components.policy_dir(phase).exists() and not components.config.rollout.server.is_given:
            raise UserError(f"eval.systems names {system}, but phase {phase} of {components.run_dir} has not finished")
        backend = components.rollout_backend(lambda: components.policy.load(components.policy_dir(phase)))
        env_factory = components.search_env
    return greedy_rollouts(backend, env_factory, components.retriever, questions,
                           search_overlap=components.config.rollout.search_overlap, on_done=on_done)  # fmt: skip


def write_eval(
    components: Components, name: str, trajectories: Sequence[Trajectory], mark: dict[str, Any]
) -> dict[str, Any]:
    """Write the trajectories and the metrics of an evaluation, and return the metrics. Only process 0 writes.

    The trajectories are written first, so that they are kept when the judge fails.
    """
    is_writer = jax.process_index() == 0
    if is_writer:
        write_jsonl(components.run.trajectories(name), map(trajectory_to_dict, trajectories))
    summary = summarise(name, trajectories, mark, components.judge if components.config.eval.judge else None)
    if is_writer:
        write_json(components.run.evaluation(name), summary)
    return summary


def load_evals(components: Components) -> list[dict[str, Any]]:
    """The finished evaluations, in the configured order."""
    paths = [components.run.evaluation(system) for system in components.config.eval.systems]
    return [json.loads(path.read_text()) for path in paths if path.exists()]
