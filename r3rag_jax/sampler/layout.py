"""How heads, feed-forward units and vocabulary entries of a decoder are split over the devices of a mesh.

Every matrix is split evenly over `tensor`, and over `fsdp` where the weights are split over it too. What does not
divide is padded with zeros, which leave every result as it is: a query head whose output projection is zero, a
feed-forward unit whose gate is zero, logits that are cut off.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from r3rag_jax.parallel.target import Target

PAD = -1  # a head that does not exist: zero weights


@dataclasses.dataclass(frozen=True)
class Split:
    """Numbers of devices along the two mesh axes that weights are split over."""

    tensor: int = 1
    fsdp: int = 1

    @classmethod
    def of(cls, target: Target) -> Split:
        return cls() if target.mesh is None else cls(target.mesh.shape["tensor"], target.mesh.shape["fsdp"])

    @property
    def ways(self) -> int:
        return self.tensor * self.fsdp

    def padded(self, size: int) -> int:
        """`size` rounded up to a multiple of the devices, so that each has an equal share."""
        return round_up(size, self.ways)


@dataclasses.dataclass(frozen=True)
class HeadSlots:
    """Which heads each device of `tensor` computes: equally many slots on every device, device after device.

    A device holds the keys and values of those kv heads alone that its query heads read. With at least as many devices
    as kv heads, a kv head is on several devices, and its query heads are dealt out to these; its cache is then as many
    times in memory, but a device never holds more than one head. 28 query heads of 4 kv heads on 8 devices:

        device     0        1       2         3         ...
        kv head    0        0       1         1
        queries    0 1 2 3  4 5 6 - 7 8 9 10  11 12 13 -     ("-" is padding)

    With fewer devices than kv heads, each device has kv heads / devices of them, rounded up.
    """

    num_heads: int
    num_kv_heads: int
    tensor: int = 1

    @property
    def copies(self) -> int:
        """Number of devices that hold the same kv head."""
        return max(1, self.tensor // self.num_kv_heads)

    @property
    def num_slots(self) -> int:
        """Kv heads over all devices, with copies and padding; a multiple of `tensor`."""
        return self.tensor * -(-self.num_kv_heads // self.tensor)

    @property
    def queries_per_slot(self) -> int:
        """Query heads per slot, padding included."""
        return -(-(self.num_heads // self.num_kv_heads) // self.copies)

    def kv_heads(self) -> np.ndarray:
        """The kv head of each slot, int [num_slots]; PAD: none."""
        heads = np.arange(self.num_slots) // self.copies
        return np.where(heads < self.num_kv_heads, heads, PAD)

    def query_heads(self) -> np.ndarray:
        """The query heads of each slot, int [num_slots, queries_per_slot]; PAD: none."""
        group = self.num_heads // self.num_kv_heads  # query heads that read one kv head
        first = np.arange(self.num_slots)[:, None] % self.copies * self.queries_per_slot
        member = first + np.arange(self.queries_per_slot)
        heads = self.kv_heads()[:, None] * group + member
        return np.where((self.kv_heads()[:, None] != PAD) & (member < group), heads, PAD)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
