"""What is fuzzed: a target reads one drawn input, and either understands it or refuses it by name."""

from __future__ import annotations

import dataclasses
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from r3rag_jax.errors import MAX_MESSAGE, UserError
from r3rag_jax.retrieval.base import RetrievalError

READ, REFUSED = "read", "refused"
Run = Callable[[random.Random], str]  # returns READ or REFUSED; any exception is a failure
SLOW_S = 10.0  # of CPU; a case that takes longer is a failure, too


class WrongResultError(AssertionError):
    """An input was read as something that it is not."""


def ensure(is_right: bool, what: object) -> None:
    """Raise a WrongResultError unless a property holds."""
    if not is_right:
        raise WrongResultError(what)


def refused(error: BaseException, *names: str) -> str:
    """REFUSED, if an error is one that users see: one line, of a readable length, with what it is about.

    Args:
        names: the message must hold one of them, e.g. the file.
    """
    if not isinstance(error, UserError | RetrievalError):
        raise error
    message = str(error)
    ensure(0 < len(message) <= MAX_MESSAGE + 100 and "\n" not in message, f"a message is a line; got {message[:300]!r}")
    ensure(not names or any(name in message for name in names), f"{names} must be named; got {message[:300]!r}")
    return REFUSED


@dataclasses.dataclass(frozen=True)
class Target:
    """One reader, parser or server."""

    name: str
    weight: int  # share of the cases
    open: Callable[[Path], Run]  # (scratch directory) -> what carries out a case


@dataclasses.dataclass
class Outcome:
    """What came of the cases of a target."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # where it was raised -> case and traceback
    seconds: float = 0.0
    slowest_s: float = 0.0


def run_cases(target: Target, run: Run, seed: int, numbers: Sequence[int]) -> Outcome:
    """Carry out cases. Case `number` of a target depends on seed and number alone."""
    outcome = Outcome()
    for number in numbers:
        start = time.process_time()
        try:
            outcome.counts[run(random.Random(f"{seed} {target.name} {number}"))] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            _note(outcome, error, f"--only {target.name} --seed {seed} --first {number} --cases 1")
        taken_s = time.process_time() - start
        outcome.slowest_s = max(outcome.slowest_s, taken_s)
        outcome.seconds += taken_s
        if taken_s > SLOW_S:
            _note(outcome, TimeoutError(f"{taken_s:.0f} s"), f"--only {target.name} --seed {seed} --first {number}")
    return outcome


def _note(outcome: Outcome, error: BaseException, case: str) -> None:
    """Keep the first failure of each place in the code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "r3rag_jax" in frame.filename] or frames
    place = f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}" if own else ""
    outcome.counts["failed"] += 1
    key = f"{type(error).__name__} at {place}"
    outcome.failures.setdefault(key, f"{case}\n{''.join(traceback.format_exception(error))[-3000:]}")
