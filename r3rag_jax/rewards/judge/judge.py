"""A language model as judge: how relevant are the passages of a step, is an answer right?

    inquiries ─► known? ─┬─ the file of judgements ───────────────► values, NaN = failed
                         └─ chat.reply_all ─► read_verdict ─► the file

A judge that gives no reply, or a reply without a verdict (`verdicts.py`), has failed: its value is NaN, and no number
stands in for it. Trajectories whose rewards depend on it are left out of the loss (`rewards.scorer.learnable`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r3rag_jax.clients.chat import Chat
from r3rag_jax.clients.endpoint import MAX_SHOWN
from r3rag_jax.errors import ServiceError
from r3rag_jax.parallel.processes import from_process_0
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.rewards.judge.judgements import Judgements
from r3rag_jax.rewards.judge.prompts import Inquiry, Prompts
from r3rag_jax.rewards.judge.verdicts import EXAMPLES, read_candidates, read_verdict
from r3rag_jax.rewards.normalization import normalize_answer
from r3rag_jax.run.watchdog import moved
from r3rag_jax.types import Question, Step

MIN_FAILURES = 5  # fewer do not end a round with any reply: one failure in three judgements is a large share already


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What one round of inquiries gave; equal inquiries are counted once."""

    values: np.ndarray  # float32 [N], one per inquiry, in [0, 1]; NaN = failed
    num: int = 0  # different inquiries
    num_known: int = 0  # of those: judged before, by this run or another one with the same file
    num_failed: int = 0  # of those

    @property
    def metrics(self) -> dict[str, float]:
        """What a run logs."""
        num = max(1, self.num)
        return {"judge_failure_rate": self.num_failed / num, "judge_known_rate": self.num_known / num}


def merge_verdicts(rounds: Sequence[Verdicts]) -> Verdicts:
    """The verdicts of several rounds as those of one."""
    return Verdicts(
        np.concatenate([verdicts.values for verdicts in rounds]),
        num=sum(verdicts.num for verdicts in rounds),
        num_known=sum(verdicts.num_known for verdicts in rounds),
        num_failed=sum(verdicts.num_failed for verdicts in rounds),
    )


class Judge:
    """Asks a chat model what has not been judged before, and keeps its verdicts in a file."""

    def __init__(self, chat: Chat, cache: Path, *, prompts: Prompts | None = None, max_failure_share: float = 0.2):
        """
        Args:
            chat: the model.
            cache: the file of judgements (JSONL); it is created with the first judgement.
            prompts: templates; the built-in ones by default.
            max_failure_share: a larger share of failures in a round is an error.

        Raises:
            UserError: the file cannot be read.
        """
        self._chat, self._max_failure_share = chat, max_failure_share
        self._prompts = Prompts() if prompts is None else prompts
        self._file = Judgements(cache)

    def relevance(self, question: Question, step: Step) -> Inquiry:
        """See `Prompts.ask_relevance`."""
        return self._prompts.ask_relevance(question, step)

    def correctness(self, question: Question, answer: str) -> Inquiry:
        """See `Prompts.ask_correctness`."""
        return self._prompts.ask_correctness(question, answer)

    def candidates(self, question: Question, answer: str) -> Inquiry:
        """See `Prompts.ask_candidates`."""
        return self._prompts.ask_candidates(question, answer)

    def ask(self, inquiries: Sequence[Inquiry]) -> Verdicts:
        """One round: each inquiry is asked once, unless its verdict is known; all processes must call together.

        Raises:
            ServiceError: more than `max_failure_share` of the round failed, and either MIN_FAILURES at least or every
                inquiry because there was no reply; the error names the judge and the first reason.
        """
        different = list(dict.fromkeys(inquiries))
        if not different:
            return Verdicts(np.zeros(0, np.float32))
        # A key contains the model's name, for which a server may have to be asked: process 0 does it for all.
        # The name is that of the inquiries, since asynchronous rollouts may judge beside an update, in a thread.
        name = digest(f"{inquiry.kind} {inquiry.prompt}" for inquiry in different)
        values = from_process_0(lambda: self._file.get_all(list(map(self._key, different))), f"known {name}")
        new = np.flatnonzero(np.isnan(values)).tolist()
        if new:

            def ask_new() -> np.ndarray:
                return self._ask([different[i] for i in new], len(different))

            values[new] = ask_new() if self._chat.is_collective else from_process_0(ask_new, f"asked {name}")
        value_of = dict(zip(different, values, strict=True))
        return Verdicts(
            np.asarray([value_of[inquiry] for inquiry in inquiries], np.float32),
            num=len(different),
            num_known=len(different) - len(new),
            num_failed=int(np.isnan(values).sum()),
        )

    def _ask(self, inquiries: Sequence[Inquiry], num_in_round: int) -> np.ndarray:
        """Ask the model; float32 [N], NaN = failed. Verdicts and failures are written to the file as they come."""
        keys = list(map(self._key, inquiries))
        values = np.full(len(inquiries), np.nan, np.float32)
        max_failures = self._max_failure_share * num_in_round
        reasons: list[str] = []
        num_without_reply, has_given_up = 0, False
        with self._file.writing() as add:
            for index, reply in self._chat.reply_all([inquiry.prompt for inquiry in inquiries]):
                moved(f"judge: {index + 1} of {len(inquiries)} replies")
                value = _verdict(reply, inquiries[index]) if isinstance(reply, str) else None
                if value is not None:
                    values[index] = value
                    add(keys[index], {"score": value, "reply": reply})
                    continue
                num_without_reply += not isinstance(reply, str)
                reasons.append(self._no_verdict(reply, inquiries[index]) if isinstance(reply, str) else str(reply))
                add(keys[index], {"failure": reasons[-1]})
                if len(reasons) > max_failures and len(reasons) >= MIN_FAILURES and not has_given_up:
                    has_given_up = True
                    self._chat.give_up()
        if has_given_up or (len(reasons) > max_failures and num_without_reply == len(inquiries)):
            raise ServiceError(
                f"the judge {self._chat.model} at {self._chat.location} failed in {len(reasons)} of {num_in_round} "
                f"judgements, more than judge.max_failure_share={self._max_failure_share:g} allows; "
                f"{self._file.path} keeps the others; the first failure: {reasons[0]}"
            )
        return values

    def _no_verdict(self, reply: str, inquiry: Inquiry) -> str:
        """Why a reply has failed."""
        shown = reply if len(reply) <= MAX_SHOWN else f"{reply[:100]} … {reply[-(MAX_SHOWN - 100) :]}"
        return f"{self._chat.location} must reply with one line like {EXAMPLES[inquiry.kind]!r}; got {shown!r}"

    def _key(self, inquiry: Inquiry) -> str:
        """Key of a judgement in the file: model and prompt, wherever the model is served."""
        identity = json.dumps([self._chat.identity, inquiry.kind, inquiry.prompt, *inquiry.golds])
        return hashlib.sha256(identity.encode()).hexdigest()


def _verdict(reply: str, inquiry: Inquiry) -> float | None:
    """The verdict of a reply in [0, 1], None: it has failed."""
    if inquiry.kind != "candidates":
        return read_verdict(reply, inquiry.kind)
    candidates = read_candidates(reply)
    if candidates is None:
        return None
    return float(bool(set(map(normalize_answer, candidates)) & set(map(normalize_answer, inquiry.golds))))
