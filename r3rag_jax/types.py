"""The data types that pass between rollouts, rewards, training and evaluation.

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
    FORMAT_ERROR = 2  # its last step is malformed or exceeded the token limit of a step
    CONTEXT_FULL = 3  # the context was full before an answer


OUT_OF_BUDGET = (Status.NO_ANSWER, Status.CONTEXT_FULL)  # rewarded alike: no rule of the protocol was broken


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with all its accepted answers; `metadata` may hold type, composition, supporting_ids and more."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def supporting_ids(self) -> tuple[str, ...]:
        """Ids of the passages that hold the evidence; empty when the data set does not say."""
        ids = self.metadata.get("supporting_ids") or ()
        if isinstance(ids, str):  # whose letters would be taken for ids
            raise TypeError(f"supporting_ids must be a list of ids; got {ids!r}")
        return tuple(str(id) for id in ids)


@dataclasses.dataclass(frozen=True)
class Passage:
    """One document of the corpus. `contents` has FlashRAG's format: '"title"\\ntext'."""

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
    """One reasoning step: an analysis, then *either* a query (with the passages retrieved for it) *or* an answer."""

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
    """A prompt to continue, and how to sample the continuation."""

    ids: Sequence[int]  # the prompt's tokens, at least one
    budget: int  # maximum number of tokens to sample
    temperature: float = 0.0  # 0 = greedy
    key: np.ndarray | None = None  # PRNG key, uint32 [2]; required unless greedy


@dataclasses.dataclass(frozen=True)
class Completion:
    """The tokens sampled as the continuation of a Context."""

    ids: list[int]  # at least one; includes the stop token, unless the budget ended the completion
    # float32 [len(ids)], under the distribution sampled from; NaN: of a stop that a server left out; None = unknown
    logprobs: np.ndarray | None

    @property
    def behaviour_logprobs(self) -> np.ndarray:
        """float32 [len(ids)]; all NaN if `logprobs` is unknown. RL cannot train on tokens of which one is NaN."""
        return np.full(len(self.ids), np.nan, np.float32) if self.logprobs is None else self.logprobs


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training sequence.

    The protocol `tags` gives one per trajectory; `steps` gives one per step, or one prefix tree of several steps
    (`training/prefix_tree.py`).

    Fields, all of length L:
        ids: int32, the sampler's own tokens, never re-tokenised.
        loss_mask: bool, True where the policy sampled the token; False for prompt and passages.
        behaviour_logprobs: float32, at the sampling temperature; 0 where loss_mask is False; NaN where the rollout
            backend did not return them.
        step_ids: int32, index of the step to which the token belongs; -1 where loss_mask is False.
        positions: int32, for RoPE; None = 0, 1, 2, …
        branch_ids: int32; a token attends to the tokens before it in branch 0 (the trunk) and in its own branch;
            None = to all tokens before it.
    temperature: the sampling temperature; 0 = greedy, which the loss treats as 1.
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
        """Whether every sampled token has a behaviour log-probability, which RL requires."""
        return not np.isnan(self.behaviour_logprobs).any()


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One rollout on a question: its steps, why it ended, and its training sequences."""

    question: Question
    steps: tuple[Step, ...]
    status: Status
    samples: tuple[Sample, ...] = ()
    sample_index: int = 0  # which of the question's samples this is
    num_tokens: int | None = None  # number of tokens the policy sampled; None = count them in `samples`
    num_input_tokens: int | None = None  # number of tokens of the prompts of all calls; None = unknown

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
    """Rows of packed sequences; padding is at the end of a row. All fields are [B, L]."""

    tokens: jax.Array  # int32
    positions: jax.Array  # int32, restarts at 0 in each sequence
    segment_ids: jax.Array  # int32, number of the sequence in its row, from 1; 0 = padding
    branch_ids: jax.Array | None  # int32, in prefix trees (`training/prefix_tree.py`), 0 = trunk; None = no trees
    loss_mask: jax.Array  # bool, True where the prediction of tokens[t] enters the loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch(SFTBatch):
    """SFTBatch with the fields that RL adds; a row packs samples of several trajectories. All fields are [B, L]."""

    behaviour_logprobs: jax.Array  # float32
    temperature: jax.Array  # float32, sampling temperature of the token's trajectory (> 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrajectoryTable:
    """An RL iteration's policy tokens, one row per trajectory, in the order in which they were sampled.

    N trajectories of at most T policy tokens, padded at the end; M batches of B rows of L tokens. Rewards, advantages
    and returns are computed along the table's rows. These do not depend on how trajectories are split into samples
    (one each, or one per step) or on how samples are packed into batches. Trajectories excluded from the batches also
    have rows, because they enter the baselines of their groups.
    """

    indices: jax.Array  # int32 [N, T], into the M * B * L tokens of the batches; M * B * L if in no batch
    rewards: jax.Array  # float32 [N, T], non-zero only on the last token of a step
    step_ids: jax.Array  # int32 [N, T], 0 where mask is False
    mask: jax.Array  # bool [N, T], False after the end of a trajectory
    groups: jax.Array  # int32 [N], index of the trajectory's question, in [0, N)
