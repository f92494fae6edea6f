"""The phases of a run by name: each takes the components that it needs, and says whether there was anything to do."""

from __future__ import annotations

from collections.abc import Callable

from r3rag_jax.components import Components
from r3rag_jax.training.rl import run_rl
from r3rag_jax.training.sft import run_sft
from r3rag_jax.world.dataset import prepare_data


def train_phase(name: str, train: Callable[[Components], None]) -> Callable[[Components], bool]:
    """Train unless the phase has already left a policy."""

    def run_phase(components: Components) -> bool:
        if components.run.policy(name).exists():
            return False
        train(components)
        return True

    return run_phase


PHASES: dict[str, Callable[[Components], bool]] = {
    "index": lambda c: prepare_data(c.config, c.run, c.dataset.path_of("corpus"), c.index_dir, c.console),
    "sft": train_phase("sft", lambda c: run_sft(c.training, c.taught_samples)),
    "rl": train_phase("rl", lambda c: run_rl(c.training, c.rl_rollouts)),
    "eval": lambda c: c.evaluator.run_phase(c.dataset.questions("test")),
}
