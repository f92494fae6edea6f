"""The trained run that an entry point works with: its command-line flags, its configuration, and its policies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.config import Config, load_config
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.systems import BASE_POLICY
from r3rag_jax.models.hf.conversion import POLICY_PHASES
from r3rag_jax.run.directory import RunDirectory


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags `--checkpoint`, `--corpus` and `--phase`."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run directory of a training")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="FlashRAG JSONL; default: the run's own index")
    parser.add_argument("--phase", choices=POLICY_PHASES, help="which policy of the run; default: the last one trained")


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a trained run, for use without training.

    Raises:
        UserError: the directory holds no run, or a `key=value` among the overrides is wrong.
    """
    path = RunDirectory(run_dir).config_file
    if not path.is_file():
        raise UserError(f"--checkpoint must be a run directory with config.yaml; got {run_dir}")
    # Relations that only training needs are not checked: no training phase is listed.
    return load_config(path, [*overrides, f"run_dir={run_dir}", "phases=index"])


def choose_policy(run: RunDirectory, config: Config, policy: str | None = None) -> str:
    """Return the policy to work with: `policy` (BASE_POLICY or a phase), or that of the last phase that has finished.

    An inference server has its policy already: then the result may be "".

    Raises:
        UserError: the phase has not finished.
    """
    if policy == BASE_POLICY:
        return policy
    trained = [name for name in POLICY_PHASES if run.policy(name).exists()]
    chosen = policy or (trained[0] if trained else "")
    if chosen not in trained and not config.rollout.server.is_given:
        raise UserError(f"{run.path} has no trained policy{f' of phase {chosen}' if chosen else ''}")
    return chosen
