"""Evaluate a trained run, a model from elsewhere, or a baseline with either, on any questions.

    python -m r3rag_jax.evaluate --checkpoint runs/quickstart --questions FILE --corpus FILE [key=value …]
    python -m r3rag_jax.evaluate --checkpoint runs/quickstart --system ircot
    python -m r3rag_jax.evaluate compare runs/a/eval/r3rag.json runs/b/eval/r3rag.json
    python -m r3rag_jax.evaluate runs runs/seed_0 runs/seed_1 runs/seed_2
    python -m r3rag_jax.evaluate habits runs/a/trajectories/cold_start.jsonl runs/a/trajectories/r3rag.jsonl
    python -m r3rag_jax.evaluate table main --checkpoint runs/quickstart --questions hotpotqa/dev.jsonl …

Writes `<run>/eval/<name>.json` and `<run>/trajectories/<name>.jsonl`; for a model from elsewhere <run> is run_dir=… or
runs/eval-<model>. `compare` tests whether two results differ, `runs` whether two systems do over several runs.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.cells import CellComponents
from r3rag_jax.errors import main_guard
from r3rag_jax.evaluation.checkpoint import open_checkpoint
from r3rag_jax.evaluation.flags import PROG, evaluation_parser, parse_table
from r3rag_jax.evaluation.results import TEST, file_name, replaced_result, result_name
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.evaluation.tables.cells import Cell, QuestionSet
from r3rag_jax.evaluation.tables.plans import plan_table
from r3rag_jax.evaluation.tables.table import make_table
from r3rag_jax.reporting.contrasts import CONTRASTS
from r3rag_jax.reporting.habits_table import print_habits
from r3rag_jax.reporting.paper_tables import publish_tables
from r3rag_jax.reporting.rendering import results_table
from r3rag_jax.rollout.context_limit import context_notices
from r3rag_jax.run.caches import use_compile_cache


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    ACTIONS[words[0]](words[1:]) if words and words[0] in ACTIONS else evaluate(words)
    return 0


def evaluate(words: Sequence[str]) -> None:
    """One system on one file of questions."""
    args = evaluation_parser(__doc__ or "").parse_intermixed_args(words)
    use_compile_cache()
    checkpoint = open_checkpoint(args)
    name, system = result_name(args.name, args.questions, args.system), args.system or "r3rag"
    policy = checkpoint.choose_policy(args.phase or (SYSTEMS[system].policy if args.system else None))
    limit = checkpoint.config.eval.max_questions
    asked = QuestionSet(file_name(args.questions) if args.questions else TEST, args.questions, limit)
    opened = CellComponents(args.corpus).open(Cell(name, checkpoint, system, policy, asked))
    evaluator, questions, console = opened.evaluator, opened.questions, opened.evaluator.console
    for notice in () if system in BASELINES else context_notices(checkpoint.config):
        console.print(notice, highlight=False)
    fingerprint = evaluator.fingerprint(system, questions, policy, asked.name)
    if notice := replaced_result(evaluator.directory, name, fingerprint):
        console.print(notice, highlight=False, markup=False)
    result = evaluator.evaluate(name, SYSTEMS[system], questions, fingerprint, policy)
    evaluator.directory.publish()
    console.print(results_table([result]))


def tabulate(words: Sequence[str]) -> None:
    """One of the paper's tables."""
    request = parse_table(words)
    use_compile_cache()
    plan, console = plan_table(request), Console()
    table = make_table(plan, CellComponents(request.corpus, console).open, console)
    publish_tables(plan.cells[0].checkpoint.run, table, plan.file, f"{PROG} table {shlex.join(words)}", console)


ACTIONS: dict[str, Callable[[Sequence[str]], None]] = {"table": tabulate, "habits": print_habits, **CONTRASTS}

if __name__ == "__main__":
    sys.exit(main())
