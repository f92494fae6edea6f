"""The groups of questions that an evaluation measures apart: all, unseen and seen compositions, and each type."""

from __future__ import annotations

import re

from r3rag_jax.types import Question

ALL, UNSEEN, SEEN = "all", "unseen", "seen"
# Types that would be taken for one of the groups above, and the names below that they get.
_TAKEN = re.compile(rf"({ALL}|{UNSEEN}|{SEEN})( \(type\))*")


def groups_of(question: Question) -> list[str]:
    """The groups that a question is in, besides ALL."""
    name, unseen = type_group(question), question.metadata.get("unseen")
    groups = [] if name is None else [name]
    return groups if unseen is None else [*groups, UNSEEN if unseen else SEEN]


def hops_group(question: Question) -> list[str]:
    """The group of the question's `metadata.hops`, `2 hops`; none where it does not say."""
    hops = question.metadata.get("hops")
    return [] if hops is None else [f"{hops} hop{'' if hops == 1 else 's'}"]


def group_order(group: str) -> tuple[int, str]:
    """What groups are sorted by: types, numbers of hops, seen and unseen compositions."""
    rank = 2 if group in (SEEN, UNSEEN) else int(re.fullmatch(r"\d+ hops?", group) is not None)
    return rank, group


def type_group(question: Question) -> str | None:
    """The group of the question's type, None without one; a type named like a group of our own is told apart."""
    name = question.metadata.get("type")
    if name is None:
        return None
    return f"{name} (type)" if _TAKEN.fullmatch(str(name)) else str(name)
