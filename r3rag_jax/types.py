"""The nouns of the project: what flows between rollout, rewards, learner and evaluation.

Shape legend (whole package): B rows, L tokens, S cache slots, D width, N query heads, K kv heads,
H head dim, V vocabulary, P passages, T steps of one trajectory.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np


class Status(enum.IntEnum):
    """Why a trajectory ended."""

    ANSWERED = 0  # its last step holds a final answer
    NO_ANSWER = 1  # the step or token budget ran out before an answer
    FORMAT_ERROR = 2  # its last step is not well formed, or longer than a step may be


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with every accepted answer; `metadata` holds e.g. type, composition, supporting_ids."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def supporting_ids(self) -> tuple[str, ...]:
        """Ids of the passages that hold the evidence; empty when the data set does not say."""
        return tuple(str(i) for i in self.metadata.get("supporting_ids", ()))


@dataclasses.dataclass(frozen=True)
class Passage:
    """One retrievable piece of text. FlashRAG: `contents` = '"title"\\ntext'."""

    id: str
    contents: str

    @property
    def title(self) -> str:
        return self.contents.partition("\n")[0].strip().strip('"')

    @property
    def text(self) -> str:
        head, newline, tail = self.contents.partition("\n")
        return tail if newline else head


@dataclasses.dataclass(frozen=True)
class Step:
    """One reasoning step: an analysis followed by *either* a query (with what it brought) *or* an answer."""

    analysis: str
    query: str | None = None
    answer: str | None = None
    passages: tuple[Passage, ...] = ()
    is_well_formed: bool = True

    def __post_init__(self) -> None:
        if self.is_well_formed and (self.query is None) == (self.answer is None):
            raise ValueError(
                "a well-formed step holds either a query or an answer; "
                f"got query={self.query!r}, answer={self.answer!r}"
            )


@dataclasses.dataclass(frozen=True)
class Context:
    """What a row is to continue."""

    ids: Sequence[int]  # at least one token
    budget: int  # most tokens to sample
    temperature: float = 0.0  # 0 = greedy
    key: np.ndarray | None = None  # uint32 [2]; needed unless greedy


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was sampled behind a context."""

    ids: list[int]  # at least one; with the token that ended it, unless the budget did
    logprobs: np.ndarray | None  # float32 [len(ids)], of the distribution sampled from; None = unknown

    @property
    def behaviour_logprobs(self) -> np.ndarray:
        """float32 [len(ids)]; NaN where `logprobs` is unknown: such a token cannot be trained on."""
        return np.full(len(self.ids), np.nan, np.float32) if self.logprobs is None else self.logprobs


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training sequence. `tags`: one per trajectory; `steps`: one per step, or a tree of them (`prefix_tree.py`).

    Fields, all of length L:
        ids: int32, tokens as the sampler saw them, never re-tokenised.
        loss_mask: bool, True where the policy wrote the token; False for prompt and passages.
        behaviour_logprobs: float32, at the sampling temperature; 0 where loss_mask is False; NaN where whoever
            sampled did not tell them.
        step_ids: int32, index of the step that the token belongs to; -1 where loss_mask is False.
        positions: int32; None: 0, 1, 2, …
        branch_ids: int32; a token sees those before it of branch 0 and of its own; None: all before it.
    temperature: the sampling temperature (0 = greedy, trained at 1).
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    behaviour_logprobs: np.ndarray
    step_ids: np.ndarray
    temperature: float = 1.0
    positions: np.ndarray | None = None
    branch_ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths = {
            "ids": len(self.ids),
            "loss_mask": len(self.loss_mask),
            "behaviour_logprobs": len(self.behaviour_logprobs),
            "step_ids": len(self.step_ids),
        }
        lengths |= {
            name: len(value) for name in ("positions", "branch_ids") if (value := getattr(self, name)) is not None
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all fields of a sample must have equal lengths; got {lengths}")
        if not np.array_equal(self.step_ids >= 0, self.loss_mask):
            raise ValueError("a token has a step id exactly where the policy wrote it (loss_mask)")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_logprobs(self) -> bool:
        """Whether RL can train on it: every sampled token has its log-probability."""
        return not np.isnan(self.behaviour_logprobs).any()


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A whole attempt at a question: its steps, how it ended, and the sequences to train on."""

    question: Question
    steps: tuple[Step, ...]
    status: Status
    samples: tuple[Sample, ...] = ()
    sample_index: int = 0  # which of the question's samples this is
    num_tokens: int | None = None  # tokens that the model wrote; None: count them in the samples

    @property
    def answer(self) -> str | None:
        return self.steps[-1].answer if self.steps and self.status == Status.ANSWERED else None

    @property
    def num_retrievals(self) -> int:
        return sum(step.query is not None for step in self.steps)

    @property
    def num_policy_tokens(self) -> int:
        if self.num_tokens is not None:
            return self.num_tokens
        return int(sum(sample.loss_mask.sum() for sample in self.samples))

    @property
    def retrieved_ids(self) -> tuple[str, ...]:
        return tuple(passage.id for step in self.steps for passage in step.passages)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SFTBatch:
    """Rows of packed sequences, padding at a row's end. All [B, L]."""

    tokens: jax.Array  # int32
    positions: jax.Array  # int32, restarts at 0 with each sequence
    segment_ids: jax.Array  # int32, 1.. per sequence, 0 = padding
    branch_ids: jax.Array | None  # int32, of trees (`prefix_tree.py`), 0 = trunk; None = there are no trees
    loss_mask: jax.Array  # bool, True where the loss counts the prediction of tokens[t]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch(SFTBatch):
    """What RL adds: a row holds samples of several trajectories one after the other. All [B, L]."""

    behaviour_logprobs: jax.Array  # float32
    temperature: jax.Array  # float32, sampling temperature of the token's trajectory (> 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrajectoryTable:
    """The policy's tokens of an iteration by trajectory, in the order they were written.

    N trajectories; T policy tokens of one, padded at the end; M batches of B rows of L tokens. Rewards, advantages and
    returns are computed along its rows, which are the same for one sample per trajectory and for one per step, and
    whatever batches the samples lie in. Trajectories that are left out of the batches have rows too: the others are
    compared with them.
    """

    indices: jax.Array  # int32 [N, T], into the M * B * L tokens of the batches; M * B * L for tokens in no batch
    rewards: jax.Array  # float32 [N, T], on the last token of each step
    step_ids: jax.Array  # int32 [N, T], 0 where mask is False
    mask: jax.Array  # bool [N, T], False behind the end of a trajectory
    groups: jax.Array  # int32 [N], number of the question, in [0, N)
