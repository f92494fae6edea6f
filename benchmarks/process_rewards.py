"""How well process rewards tell searches that found evidence from those that did not, and what they cost.

    python benchmarks/process_rewards.py --config configs/quickstart.yaml name=RUN [key=value …]

With `judge.*` the judge is measured, too; what it fails to judge is counted, and left out of its AUC.

Samples trajectories of the first RL iterations with the run's cold start, as RL does. A search counts if it shows a new
passage; it found evidence if a new one is a supporting passage (`rewards.process=gold` above 0). AUC is the probability
that a search with evidence earns more than one without, ties half (Hanley and McNeil 1982).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from r3rag_jax.components import Components
from r3rag_jax.config import parse_args
from r3rag_jax.rewards.novelty import shows_new
from r3rag_jax.rollout.scheduler import rollout
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.training.requests import QuestionDraws
from r3rag_jax.types import Trajectory

PROCESS = ("gold", "embedding", "gain")


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The area under the ROC curve of scores [N] for labels bool [N]; NaN if all labels are equal."""
    positive, negative = scores[labels], scores[~labels]
    if not len(positive) or not len(negative):
        return float("nan")
    below = np.searchsorted(np.sort(negative), positive, "left")
    up_to = np.searchsorted(np.sort(negative), positive, "right")
    return float((below + up_to).mean() / 2 / len(negative))


def measure(c: Components, trajectories: Sequence[Trajectory]) -> dict[str, tuple[np.ndarray, float]]:
    """For each process reward its values [B, K], NaN where it failed, and the seconds that it took when compiled."""
    reference, found = c.policy.load(c.run.policy("sft")), {}
    names = (*PROCESS, "judge") if c.config.judge.is_given else PROCESS
    for name in names:
        c.config = c.config.replace(rewards=c.config.rewards.replace(process=name))
        scorer = c.make_scorer(reference)
        if name != "judge":  # which compiles little, and remembers what it has judged
            scorer.score(trajectories)  # compiles
        started = time.perf_counter()
        process_BK = scorer.score(trajectories).process
        found[name] = process_BK, time.perf_counter() - started
    return found


def main() -> None:
    def flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--iterations", type=int, default=4, help="RL iterations whose questions are played")

    config, options = parse_args(None, prog="benchmarks/process_rewards.py", description=str(__doc__), extra=flags)
    use_compile_cache()
    c = Components(config, config.run_directory)
    draws, backend = QuestionDraws(config, c.dataset.questions("rl")), c.open_backend("sft")
    trajectories: list[Trajectory] = []
    for iteration in range(options.iterations):
        started = time.perf_counter()
        trajectories += rollout(backend, c.search_env, c.retriever, draws.requests(iteration))
    rollout_s = time.perf_counter() - started  # of the last iteration, which compiles nothing
    found = measure(c, trajectories)
    counts = shows_new(trajectories, config.rollout.max_steps)
    counts &= np.asarray([[k < t.num_retrievals for k in range(counts.shape[1])] for t in trajectories])
    labels = found["gold"][0] > 0
    types = np.asarray([str(t.question.metadata.get("type", "")) for t in trajectories])
    print(f"{len(trajectories)} trajectories, {counts.sum()} searches, {labels[counts].sum()} with evidence")
    print(f"rollouts of an iteration {rollout_s:.1f} s")
    for name, (values, seconds) in found.items():
        has_value = counts & ~np.isnan(values)
        by_type = {kind: has_value & (types == kind)[:, None] for kind in dict.fromkeys(types.tolist())}
        parts = "  ".join(f"{kind} {auc(values[chosen], labels[chosen]):.3f}" for kind, chosen in by_type.items())
        print(
            f"{name:10} AUC {auc(values[has_value], labels[has_value]):.3f}  mean with evidence "
            f"{values[has_value & labels].mean():.3f}, without {values[has_value & ~labels].mean():.3f}  "
            f"{seconds / options.iterations:.2f} s an iteration, "
            f"failed {100 * (1 - has_value.sum() / counts.sum()):.1f} %  |  {parts}"
        )


if __name__ == "__main__":
    main()
