"""Token ids of a growing trajectory in both protocols. Rollouts and the cold start assemble them by the same code.

Tokens in, tokens out: steps keep the ids that the policy sampled. Only the question, the passages and the chat frame
are encoded, each by itself.

    tags    prompt | step 1 | passages | step 2 …                            one sequence per trajectory
    steps   prefix question [\\n step 1 \\n passages …] suffix | step k       one sequence per step
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from r3rag_jax.text.protocols import TextProtocol, question_text
from r3rag_jax.text.tokenizer import CONTENT, Tokenizer, chat_frame
from r3rag_jax.types import Passage, Sample, Step, Trajectory

CACHED_PASSAGES = 1 << 14  # number of passages whose token ids are cached: some tens of megabytes


class Codec:
    """Converts a protocol's text to token ids and back, with a tokenizer, its chat frame and a passage budget."""

    def __init__(self, tokenizer: Tokenizer, protocol: TextProtocol, passage_tokens: int):
        """`passage_tokens`: maximum number of tokens of a passage; longer ones are cut."""
        self.tokenizer, self.protocol, self.passage_tokens = tokenizer, protocol, passage_tokens
        self.prefix, self.suffix = chat_frame(tokenizer)
        self.eos_id = tokenizer.eos_id
        self.stop_ids = tuple(tokenizer.token_id(text) for text in protocol.stop_strings)
        self._newline = tokenizer.encode("\n")
        frame = protocol.render_passages([CONTENT])
        before, _, after = frame.partition(CONTENT)
        self._before_passages, self._after_passages = tokenizer.encode(before), tokenizer.encode(after)
        # The same passages are found for many questions.
        self._content_ids = functools.lru_cache(CACHED_PASSAGES)(self._encode_contents)

    @property
    def ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens that end a step which passages may follow, and the other tokens that end a step."""
        pauses = self.stop_ids if self.protocol.is_one_sequence else (self.eos_id,)
        return pauses, tuple(i for i in (self.eos_id,) if i not in pauses)

    def question_ids(self, question: str) -> list[int]:
        """Return the user's message without its chat frame."""
        return self.tokenizer.encode(question_text(question), allow_special=False)

    def passage_ids(self, passages: Sequence[Passage]) -> list[int]:
        """Return the passages as they stand in a context, each cut to the token budget."""
        ids = [*self._before_passages]
        for number, passage in enumerate(passages):
            ids += self._newline if number else []
            ids += self._content_ids(passage.contents)
        return ids + self._after_passages

    def _encode_contents(self, contents: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(contents, allow_special=False)[: self.passage_tokens])

    def step_ids(self, step: Step, number: int) -> list[int]:
        """Return what a policy samples that writes this step, including the token that ends it."""
        ids = self.tokenizer.encode(self.protocol.render_step(step, number))
        return ids if self.protocol.is_one_sequence else [*ids, self.eos_id]

    def parse_step(self, ids: Sequence[int], number: int) -> Step:
        """Return the step that sampled ids spell. An end of turn as the last token is not a part of the text."""
        ids = list(ids[:-1]) if len(ids) and ids[-1] == self.eos_id else list(ids)
        return self.protocol.parse_step(self.tokenizer.decode(ids), number)

    def joined_step(self, ids: Sequence[int]) -> list[int]:
        """Return a step as the next user message of the protocol `steps` shows it."""
        ids = [i for i in ids if i != self.eos_id]
        return [*self._newline, *ids, *self._newline]


class Transcript:
    """The ids of one trajectory. The next step is sampled after `context`."""

    def __init__(self, codec: Codec, question: str):
        self._codec = codec
        self._history = codec.question_ids(question)  # protocol `steps`: the user's message so far
        self.context: list[int] = [*codec.prefix, *self._history, *codec.suffix]
        self._written: list[tuple[int, int, np.ndarray, list[int]]] = []  # start, end, logprobs, whole sequence

    @property
    def num_steps(self) -> int:
        """Number of steps that the policy has written."""
        return len(self._written)

    def write(self, ids: Sequence[int], logprobs: np.ndarray | None = None) -> None:
        """Append the step that the policy wrote after `context`.

        Args:
            ids: its L tokens.
            logprobs: float32 [L], behaviour log-probabilities; None = 0, for steps that were not sampled.
        """
        logprobs = np.zeros(len(ids), np.float32) if logprobs is None else logprobs
        if len(logprobs) != len(ids):
            raise ValueError(f"every token must have a log-probability; got {len(ids)} tokens and {len(logprobs)}")
        start = len(self.context)
        sequence = [*self.context, *ids]
        self._written.append((start, len(sequence), logprobs, sequence))
        if self._codec.protocol.is_one_sequence:
            self.context = sequence
        else:
            self._history = [*self._history, *self._codec.joined_step(ids)]

    def add_passages(self, passages: Sequence[Passage]) -> None:
        """Append the passages found for the last query; then `context` is ready for the next step."""
        ids = self._codec.passage_ids(passages)
        if self._codec.protocol.is_one_sequence:
            self.context = [*self.context, *ids]
        else:
            self._history = [*self._history, *ids]
            self.context = [*self._codec.prefix, *self._history, *self._codec.suffix]

    def samples(self, temperature: float) -> tuple[Sample, ...]:
        """Return the sequences to train on; they end with the last token that the policy wrote."""
        if not self._codec.protocol.is_one_sequence:
            return tuple(_sample([(start, end, logprobs, step)], sequence, temperature)
                         for step, (start, end, logprobs, sequence) in enumerate(self._written))  # fmt: skip
        spans = [(start, end, logprobs, step) for step, (start, end, logprobs, _) in enumerate(self._written)]
        return (_sample(spans, self._written[-1][3], temperature),) if spans else ()


def _sample(spans: list[tuple[int, int, np.ndarray, int]], ids: list[int], temperature: float) -> Sample:
    step_ids = np.full(len(ids), -1, np.int32)
    behaviour = np.zeros(len(ids), np.float32)
    for start, end, logprobs, step in spans:
        step_ids[start:end] = step
        behaviour[start:end] = logprobs
    return Sample(np.asarray(ids, np.int32), step_ids >= 0, behaviour, step_ids, temperature)


def teacher_samples(codec: Codec, trajectory: Trajectory) -> tuple[Sample, ...]:
    """Return the training sequences of a teacher's trajectory: the ids that a policy samples which writes its steps."""
    transcript = Transcript(codec, trajectory.question.question)
    for number, step in enumerate(trajectory.steps, 1):
        transcript.write(codec.step_ids(step, number))
        if step.query is not None:
            transcript.add_passages(step.passages)
    return transcript.samples(temperature=1.0)
