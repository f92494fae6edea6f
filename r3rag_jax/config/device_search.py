"""Section `retrieval.device`: the search on the devices."""

from __future__ import annotations

from typing import ClassVar, Literal

from r3rag_jax.config.section import Section, key


class DeviceConfig(Section):
    """How the devices search the vectors of an index, with `retrieval.kind: device`."""

    dotted: ClassVar[str] = "retrieval.device"

    dtype: Literal["float32", "bfloat16", "int8"] = key(
        "bfloat16", "dtype of the vectors in the devices' memory; `int8` has a scale for each vector"
    )
    candidates: int = key(
        4,
        "passages per hit that the devices find, and that are ranked by inner products with the vectors in the index's "
        "files; 0: the devices' own scores rank",
        ge=0,
    )
