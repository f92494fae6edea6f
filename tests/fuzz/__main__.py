"""Fuzzing of everything that reads what others wrote: `python -m tests.fuzz [--cases 1000000] [--seed 0]`.

Each case is drawn from the seed, the target's name and the number of the case alone, so that every failure repeats with
the words that are printed beside it. A case is right if its input is read, and what is read has the target's properties
(it is written and read back, say), or if it is refused by an error that users see, in one line. The exit status is 1
after any failure.

    python -m tests.fuzz --only tokenizers --seed 3 --first 17 --cases 1     one case
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(TESTS), str(TESTS.parent), *(str(TESTS / name) for name in ("data", "retrieval", "text"))]

from tests.fuzz.target import Outcome, Target, run_cases  # noqa: E402
from tests.fuzz.targets import TARGETS  # noqa: E402

BLOCK = 5000  # cases between two lines of progress


def shares(num_cases: int, targets: tuple[Target, ...]) -> dict[str, int]:
    """The cases of each target by its weight, at least one."""
    total = sum(target.weight for target in targets)
    return {target.name: max(1, num_cases * target.weight // total) for target in targets}


def fuzz(target: Target, seed: int, first: int, num_cases: int, directory: Path) -> Outcome:
    """Carry out cases of one target in a scratch directory of its own."""
    directory.mkdir()
    run, outcome = target.open(directory), Outcome()
    for start in range(first, first + num_cases, BLOCK):
        part = run_cases(target, run, seed, range(start, min(start + BLOCK, first + num_cases)))
        outcome.counts += part.counts
        outcome.failures = part.failures | outcome.failures
        outcome.seconds += part.seconds
        outcome.slowest_s = max(outcome.slowest_s, part.slowest_s)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of each target's first case")
    parser.add_argument("--only", nargs="*", choices=[target.name for target in TARGETS], help="these targets alone")
    args = parser.parse_args()
    targets = tuple(target for target in TARGETS if not args.only or target.name in args.only)
    num_failed = num_run = 0
    print(f"seed {args.seed}")
    print(f"{'target':20} {'cases':>8} {'read':>8} {'refused':>8} {'failed':>7} {'s':>7} {'slowest, s':>11}")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        for target in targets:
            num = shares(args.cases, targets)[target.name]
            outcome = fuzz(target, args.seed, args.first, num, Path(scratch) / target.name)
            counts = outcome.counts
            num_failed, num_run = num_failed + counts["failed"], num_run + num
            print(
                f"{target.name:20} {num:8} {counts['read']:8} {counts['refused']:8} {counts['failed']:7} "
                f"{outcome.seconds:7.0f} {outcome.slowest_s:11.2f}",
                flush=True,
            )
            for place, text in outcome.failures.items():
                print(f"--- {place}\n{text}", flush=True)
    print(f"{num_run} cases, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
