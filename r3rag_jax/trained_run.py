"""A trained run as `evaluate` and `ask` open it: shared flags, its components, and which policy to load."""

from __future__ import annotations

import argparse
from pathlib import Path

from r3rag_jax.components import Components
from r3rag_jax.config import load_config
from r3rag_jax.errors import UserError
from r3rag_jax.models.hf.conversion import POLICY_PHASES
from r3rag_jax.run.directory import RunDirectory


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which run, corpus and policy."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run directory of a training")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="FlashRAG JSONL; default: the run's own index")
    parser.add_argument("--phase", choices=POLICY_PHASES, help="which policy of the run; default: the last one trained")


def open_trained_run(args: argparse.Namespace) -> tuple[Components, str]:
    """The components of a trained run, searching `--corpus` where given, and the phase whose policy to load.

    Raises:
        UserError: there is no such run, or it has no trained policy.
    """
    path = RunDirectory(args.checkpoint).config_file
    if not path.is_file():
        raise UserError(f"--checkpoint must be a run directory with config.yaml; got {args.checkpoint}")
    # `phases=index`: the training phases' demands on a configuration do not matter here.
    config = load_config(path, [*getattr(args, "overrides", ()), f"run_dir={args.checkpoint}", "phases=index"])
    components = Components(config, args.checkpoint)
    trained = [phase for phase in POLICY_PHASES if components.run.policy(phase).exists()]
    phase = args.phase or (trained[0] if trained else "")
    if phase not in trained and not config.rollout.server.is_given:
        raise UserError(f"{args.checkpoint} has no trained policy{f' of phase {phase}' if phase else ''}")
    if args.corpus is not None:
        components.use_corpus(args.corpus)
    return components, phase
