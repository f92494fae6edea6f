"""Prefix sharing: samples that begin alike become one sequence, a tree, in which their common prefix occurs once.

Each sample is trained as if it stood alone. In the protocol `steps` the prompt of a step holds all steps and passages
before it, so the samples of a trajectory repeat them (all but the last tokens of a prompt, which may be split otherwise
where more text follows):

    q a | x        q b a | y        q b c a | z          three samples, | is where the policy writes, 12 tokens
    q   a x   b   a y   c   a z                          one tree, 9 tokens
    0   1 1   0   2 2   0   3 3                          branch_ids: 0 is the trunk
    0   1 2   1   2 3   2   3 4                          positions

A token attends to the tokens before it in the row that belong to the trunk or to its own branch. The trunk's tokens
before it are exactly those of its sample's prompt: the rest of the trunk comes later in the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from r3rag_jax.types import Sample


def share_prefixes(samples: Sequence[Sample], max_length: int) -> tuple[Sample, ...]:
    """Merge the samples of a trajectory, in their order, into as few trees of at most `max_length` tokens as possible.

    A sample opens a new tree if it does not begin with the trunk so far, has another temperature, or would make the
    tree too long. A single sample that is too long is returned unchanged; packing refuses it.
    """
    trees: list[Sample] = []
    members: list[Sample] = []
    for sample in samples:
        if members and not _fits([*members, sample], max_length):
            trees.append(_tree(members))
            members = []
        members.append(sample)
    if members:
        trees.append(_tree(members))
    return tuple(trees)


def _fits(members: Sequence[Sample], max_length: int) -> bool:
    cuts = _cuts(members)
    length = cuts[-1] + sum(len(sample) - cut for sample, cut in zip(members, cuts, strict=True))
    is_growing = all(one <= next_ for one, next_ in itertools.pairwise(cuts))
    return length <= max_length and is_growing and len({sample.temperature for sample in members}) == 1


def _cuts(members: Sequence[Sample]) -> list[int]:
    """For each sample the number of its tokens in the trunk: those that its prompt shares with the next prompt.

    But for the last sample the end of the prompt stays in the branch: it predicts the first token that the policy
    wrote, and must stand right before it in the row.
    """
    prompts = [sample.ids[: _prompt_length(sample)] for sample in members]
    shared = [_common_prefix(one[:-1], next_) for one, next_ in itertools.pairwise(prompts)]
    return [*shared, len(prompts[-1])]


def _prompt_length(sample: Sample) -> int:
    """Tokens before the first one that the policy wrote."""
    return int(np.argmax(sample.loss_mask)) if sample.loss_mask.any() else len(sample)


def _common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _tree(members: Sequence[Sample]) -> Sample:
    parts: list[tuple[Sample, slice, int]] = []  # sample, tokens of it, branch
    start = 0
    for number, (sample, cut) in enumerate(zip(members, _cuts(members), strict=True), 1):
        parts += [(sample, slice(start, cut), 0), (sample, slice(cut, len(sample)), number)]
        start = cut

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(sample, name)[tokens] for sample, tokens, _ in parts])

    return Sample(
        ids=joined("ids"),
        loss_mask=joined("loss_mask"),
        behaviour_logprobs=joined("behaviour_logprobs"),
        step_ids=joined("step_ids"),
        temperature=members[0].temperature,
        positions=np.concatenate([np.arange(len(sample), dtype=np.int32)[tokens] for sample, tokens, _ in parts]),
        branch_ids=np.concatenate(
            [np.full(len(sample.ids[tokens]), branch, np.int32) for sample, tokens, branch in parts]
        ),
    )
