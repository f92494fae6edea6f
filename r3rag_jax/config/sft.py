"""Section `sft`: the cold start."""

from __future__ import annotations

from typing import ClassVar

from r3rag_jax.config.section import Section, key


class SFTConfig(Section):
    """Cold start: next-token prediction of teacher trajectories."""

    dotted: ClassVar[str] = "sft"

    epochs: int = key(3, "passes over the trajectories", "epochs", ge=1)
    balance: tuple[str, ...] = key(
        (),
        "fields of `metadata`, e.g. type and hops: the trajectories of data.num_sft are as many of one combination of "
        "their values as of another, while there are any; empty: drawn from all alike",
    )
    batch_rows: int = key(8, "packed rows per step", "rows", ge=1)
    row_length: int = key(512, "length of a packed row", "tokens", ge=1)
    lr: float = key(1e-5, "peak learning rate of AdamW, cosine decay", ge=0)
    warmup: float = key(0.1, "share of the steps with rising learning rate", "fraction", ge=0, le=1)
    weight_decay: float = key(0.0, "decoupled weight decay", ge=0)
    max_grad_norm: float = key(1.0, "gradients are clipped to this global norm", gt=0)
    checkpoint_every: int = key(100, "steps between checkpoints", "steps", ge=1)
    checkpoint_minutes: float = key(
        0.0, "minutes between checkpoints, beside checkpoint_every; 0: by steps alone", "minutes", ge=0
    )
    keep_checkpoints: int = key(
        2, "newest checkpoints that are kept: where the newest is damaged the one before is read", "checkpoints", ge=1
    )
