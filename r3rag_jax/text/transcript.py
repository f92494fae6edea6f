"""Token ids of a growing trajectory, in both protocols; rollouts and the cold start share this code.

A step that the policy sampled keeps its ids where it is trained; it is never re-tokenised there.

    tags    prompt | step 1 | passages | step 2 …                            one sequence per trajectory
    steps   prefix question [\\n step 1 \\n passages …] suffix | step k       one sequence per step

A prompt is encoded as one text, as the published checkpoints saw it: the template's text, the question and, in `steps`,
the earlier steps (as rendered) and their passages. So a token may hold the end of one part and the beginning of the
next (`?\\n`), and the prompt of a step does not begin with exactly the tokens of the prompt before it, but with all but
its last few. In `tags`, passages are encoded one by one between the ids of their tags.

Text from outside never becomes a special token.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np

from r3rag_jax.text.chat_template import CONTENT
from r3rag_jax.text.lines import LineEncoder
from r3rag_jax.text.protocols import TAGS, TextProtocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.truncation import truncate
from r3rag_jax.types import Passage, Sample, Step, Trajectory

REPLACEMENT = "\ufffd"  # what a character of which a token is missing is decoded to
MAX_SHOWN = 120  # characters of a text in an error message
CACHED_PASSAGES = 1 << 14  # number of passages whose token ids are cached: some tens of megabytes


class Codec:
    """Converts a protocol's text to token ids and back; holds the tokenizer, the chat frame and the passage limit."""

    def __init__(self, tokenizer: Tokenizer, protocol: TextProtocol, passage_tokens: int):
        """
        Args:
            tokenizer: where the protocol's tags are tokens, they become special ones, if they are not (`</think>` of
                Qwen 3 is an added token that any text may spell).
            passage_tokens: maximum number of tokens of a passage; longer ones are cut.
        """
        special = tokenizer.special_ids
        plain = [tag for tag in TAGS if tag in tokenizer and tokenizer.token_id(tag) not in special]
        if protocol.splices_ids and plain:
            tokenizer.add_special_tokens(plain)
        self.tokenizer, self.protocol, self.passage_tokens = tokenizer, protocol, passage_tokens
        self._frame = tokenizer.frame_of_user_message()
        self.turn_end_id, self.end_ids = tokenizer.turn_end_id, tokenizer.end_ids
        self.stop_ids = tuple(tokenizer.token_id(text) for text in protocol.stop_tokens)
        self.stop_strings = protocol.stop_strings
        self._lines = LineEncoder(tokenizer)
        # Without any text after the message, a step follows the message.
        self._first_step_continues = tokenizer.continues_after(f"?{self._frame[1]}")
        self._newline = tokenizer.encode("\n", continues=True)
        before, _, after = protocol.render_passages([CONTENT]).partition(CONTENT)
        self._before_passages, self._after_passages = tokenizer.encode(before), tokenizer.encode(after, continues=True)
        # The same passages are retrieved for many questions.
        self._truncated = functools.lru_cache(CACHED_PASSAGES)(
            lambda contents: truncate(tokenizer, contents, passage_tokens)
        )

    @property
    def ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Stop tokens as (those after which passages may follow, all others)."""
        return (self.stop_ids, self.end_ids) if self.protocol.is_one_sequence else (self.end_ids, ())

    def prompt_ids(self, message: str) -> list[int]:
        """Return the ids of a prompt: a user message in the chat template, which ends with an assistant turn's opening.

        No part of the message becomes a special token.
        """
        before, after = self._frame
        return self._lines.encode_pieces([before, self.tokenizer.strip_content(message), after])

    def shown(self, passage: Passage) -> str:
        """Return the text of a passage that prompts show: its first `passage_tokens`."""
        return self._truncated(passage.contents).text

    def passage_text(self, passages: Sequence[Passage]) -> str:
        """Return the text of the passages as a user message shows them, each cut to `passage_tokens`."""
        return self.protocol.render_passages([self.shown(passage) for passage in passages])

    def passage_ids(self, passages: Sequence[Passage], step: Sequence[int] = ()) -> list[int]:
        """Return the ids of the passages as inserted into one sequence, each cut to `passage_tokens`.

        Args:
            step: ids after which they are inserted. The token that completes a stop string may hold line ends, too
                (`>\\n\\n`); these are then not inserted again.
        """
        if not self.protocol.splices_ids:
            text, before = self.passage_text(passages), self.tokenizer.decode(step)
            count = len(before) - len(before.rstrip("\n"))
            leading = len(text) - len(text.lstrip("\n"))
            return self.tokenizer.encode(text[min(count, leading) :], allow_special=False, continues=True)
        ids = [*self._before_passages]
        for number, passage in enumerate(passages):
            ids += self._newline if number else []
            ids += self._truncated(passage.contents).ids
        return ids + self._after_passages

    def step_ids(self, step: Step, number: int) -> list[int]:
        """Return the ids that a policy would sample to write this step, including the stop token."""
        continues = self._first_step_continues or (number > 1 and self.protocol.is_one_sequence)
        ids = self.tokenizer.encode_pieces(self.protocol.step_pieces(step, number), continues=continues)
        return ids if self.protocol.is_one_sequence else [*ids, self.turn_end_id]

    def answer_start(self, step: Step, number: int) -> int:
        """Return the index of the first token of an answering step's ids that depends on what the answer is."""
        ids = self.step_ids(step, number)
        others = [self.step_ids(dataclasses.replace(step, answer=other), number) for other in ("7", "Q")]
        shared = (
            itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, other, strict=False)) for other in others
        )
        return min(len(list(pairs)) for pairs in shared)

    def parse_step(self, ids: Sequence[int], number: int) -> Step:
        """Parse sampled ids into step `number` (from 1); a final end of turn is ignored."""
        return self.protocol.parse_step(self.tokenizer.decode(self.tokenizer.without_end(ids)), number)

    def preview(self, ids: Sequence[int], number: int) -> Mapping[str, str]:
        """Return what is known of step `number` from its first ids; see `TextProtocol.preview_step`."""
        text = self.tokenizer.decode(self.tokenizer.without_end(ids))
        return self.protocol.preview_step(text.rstrip(REPLACEMENT), number)

    def unreadable_step(self, trajectory: Trajectory) -> str | None:
        """Return the first step whose ids are not read back as the step, with the reason; None if all are.

        A policy that learns such a step learns to write what ends a rollout as malformed, or is read as something else.
        White space at both ends of a text does not count, nor what the tokenizer itself cannot write.
        """
        for number, step in enumerate(trajectory.steps, 1):
            read = self.parse_step(self.step_ids(step, number), number)
            rule = f"step {number} must be read back as it is written (rollout.protocol={self.protocol.name})"
            if not read.is_well_formed:
                return f"{rule}; it is read as malformed: {_shown(self.protocol.render_step(step, number))}"
            for name in ("analysis", "query", "answer"):
                written, found = getattr(step, name), getattr(read, name)
                if not self._is_same(written, found):
                    return f"{rule}; its {name} is {_shown(written)} and is read as {_shown(found)}"
        return None

    def _is_same(self, written: str | None, read: str | None) -> bool:
        if written is None or read is None or written.strip() == read:
            return (written is None) == (read is None)
        # Ids may hold a text otherwise, e.g. in Unicode's composed form.
        return self.tokenizer.decode(self.tokenizer.encode(written, allow_special=False)).strip() == read

    def step_text(self, ids: Sequence[int], number: int) -> str:
        """Return step `number` (from 1) as later user messages of the protocol `steps` repeat it: its fields alone."""
        step = self.parse_step(ids, number)
        return self.protocol.render_step(step, number) if step.is_well_formed else step.analysis


class Transcript:
    """The ids of one trajectory. The next step is sampled after `context`."""

    def __init__(self, codec: Codec, question: str):
        self._codec = codec
        self._message = codec.protocol.user_message(question)  # protocol `steps`: it grows by steps and passages
        self.context: list[int] = codec.prompt_ids(self._message)
        self._written: list[tuple[int, int, np.ndarray, list[int]]] = []  # start, end, logprobs, whole sequence

    @property
    def num_steps(self) -> int:
        """Number of steps that the policy has written."""
        return len(self._written)

    @property
    def length(self) -> int:
        """Number of tokens of the last step that the policy has written and of the context before it."""
        return self._written[-1][1] if self._written else len(self.context)

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
            self._message += f"\n{self._codec.step_text(ids, self.num_steps)}\n"

    def add_passages(self, passages: Sequence[Passage]) -> None:
        """Append the passages retrieved for the last query; `context` is then the prompt of the next step."""
        if self._codec.protocol.is_one_sequence:
            start = self._written[-1][0]
            self.context = [*self.context, *self._codec.passage_ids(passages, self.context[start:])]
        else:
            self._message += self._codec.passage_text(passages)
            self.context = self._codec.prompt_ids(self._message)

    def samples(self, temperature: float) -> tuple[Sample, ...]:
        """Return the training sequences; each ends with the last token that the policy wrote in it."""
        if not self._codec.protocol.is_one_sequence:
            return tuple(_sample([(start, end, logprobs, step)], sequence, temperature)
                         for step, (start, end, logprobs, sequence) in enumerate(self._written))  # fmt: skip
        spans = [(start, end, logprobs, step) for step, (start, end, logprobs, _) in enumerate(self._written)]
        return (_sample(spans, self._written[-1][3], temperature),) if spans else ()


def _sample(spans: list[tuple[int, int, np.ndarray, int]], ids: list[int], temperature: float) -> Sample:
    step_ids = np.full(len(ids), -1, np.int32)
    behaviour_logprobs = np.zeros(len(ids), np.float32)
    for start, end, logprobs, step in spans:
        step_ids[start:end] = step
        behaviour_logprobs[start:end] = logprobs
    return Sample(np.asarray(ids, np.int32), step_ids >= 0, behaviour_logprobs, step_ids, temperature)


def _shown(text: str | None) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[: MAX_SHOWN - 3]}..."


def teacher_samples(codec: Codec, trajectory: Trajectory) -> tuple[Sample, ...]:
    """Return a teacher trajectory's training sequences, as if a policy had sampled its steps."""
    transcript = Transcript(codec, trajectory.question.question)
    for number, step in enumerate(trajectory.steps, 1):
        transcript.write(codec.step_ids(step, number))
        if step.query is not None:
            transcript.add_passages(step.passages)
    return transcript.samples(temperature=1.0)


def forced_sample(codec: Codec, context: Sequence[int], step: Step, number: int) -> Sample:
    """Return an answering step after a context as a sample whose loss_mask is the answer and what closes it."""
    sequence = [*context, *codec.step_ids(step, number)]
    start = len(context) + codec.answer_start(step, number)
    return _sample([(start, len(sequence), np.zeros(len(sequence) - start, np.float32), 0)], sequence, 1.0)
