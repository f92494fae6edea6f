"""Which tokens of a row see which, the rule that every implementation of attention keeps."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Tokens(NamedTuple):
    """What decides which tokens see which, int32 [...]."""

    position: jax.Array  # in the row
    segment: jax.Array | None  # None: all are of one
    branch: jax.Array | None  # None: none is in a branch

    def see(self, keys: Tokens) -> jax.Array:
        """Whether queries see keys, bool: not later, of the same segment, and of branch 0 or the same branch."""
        sees = keys.position <= self.position
        if self.segment is not None:
            sees &= keys.segment == self.segment
        if self.branch is not None:
            sees &= (keys.branch == 0) | (keys.branch == self.branch)
        return sees
