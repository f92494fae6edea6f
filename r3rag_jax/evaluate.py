"""Evaluate a trained run on any FlashRAG JSONL files.

    python -m r3rag_jax.evaluate --checkpoint runs/quickstart --questions FILE --corpus FILE [key=value …]

Writes `<run>/eval/<name>.json` and `<run>/trajectories/<name>.jsonl`, and prints the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.components import Components
from r3rag_jax.config import FlagParser, load_config
from r3rag_jax.data.questions import read_questions
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.evaluation.evaluator import fingerprint, greedy_rollouts
from r3rag_jax.evaluation.phase import write_eval
from r3rag_jax.models.hf.conversion import POLICY_PHASES
from r3rag_jax.reporting.rendering import results_table
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.progress import ProgressBar


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.evaluate", description=(__doc__ or "").splitlines()[0])
    add_checkpoint_flags(parser)
    parser.add_argument("--questions", type=Path, metavar="FILE", help="FlashRAG JSONL; default: the test questions")
    parser.add_argument("--name", default="", help="name of the result files; default: the questions' file name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to change")
    args = parser.parse_intermixed_args(argv)
    use_compile_cache()
    components, phase = open_components(args)
    path = args.questions or components.dataset.path_of("test")
    questions = read_questions(path)
    backend = components.rollout_backend(lambda: components.policy.load(components.policy_dir(phase)))
    live = components.config.log.progress
    with ProgressBar(f"eval {path.name}", len(questions), console=components.console, live=live) as bar:
        trajectories = greedy_rollouts(
            backend, components.search_env, components.retriever, questions,
            search_overlap=components.config.rollout.search_overlap, on_done=lambda t: bar.advance(steps=len(t.steps)),
        )  # fmt: skip
    name = args.name or path.stem
    mark = fingerprint(questions, index=components.retriever.fingerprint, top_k=components.config.retrieval.top_k,
                       phase=phase, **components.sampling_mark(), **components.judge_mark())  # fmt: skip
    components.console.print(results_table([write_eval(components, name, trajectories, mark)]))
    return 0


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `evaluate` and `ask` share."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run directory of a training")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="FlashRAG JSONL; default: the run's own index")
    parser.add_argument("--phase", choices=POLICY_PHASES, help="which policy of the run; default: the last one trained")


def open_components(args: argparse.Namespace) -> tuple[Components, str]:
    """The components of a trained run, its retriever over `--corpus` where given, and the phase to load."""
    path = RunDirectory(args.checkpoint).config_file
    if not path.is_file():
        raise UserError(f"--checkpoint must be a run directory with config.yaml; got {args.checkpoint}")
    # Only `index`: what its phases need of a configuration is the training's business.
    config = load_config(path, [*getattr(args, "overrides", ()), f"run_dir={args.checkpoint}", "phases=index"])
    components = Components(config, args.checkpoint)
    trained = [phase for phase in POLICY_PHASES if components.policy_dir(phase).exists()]
    phase = args.phase or (trained[0] if trained else "")
    if phase not in trained and not config.rollout.server.is_given:
        raise UserError(f"{args.checkpoint} has no trained policy{f' of phase {phase}' if phase else ''}")
    if args.corpus is not None:
        components.use_corpus(args.corpus)
    return components, phase


if __name__ == "__main__":
    sys.exit(main())
