"""Documents of `base` worlds, tokenized and packed into rows for pretraining."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np

from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.world.pretraining import documents, make_world

WINDOW = 64  # documents that wait for a row with room


def token_rows(tokenizer: Tokenizer, seed: int, row_length: int, max_passages: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Endless rows (tokens, positions, segment_ids, loss_mask), each int32 / bool [row_length].

    A row is filled from a window of waiting documents, the longest that still fits first.
    """
    waiting: list[tuple[list[int], list[bool]]] = []
    for number in itertools.count(seed):
        rng = random.Random(f"pretraining {number}")
        for document in documents(make_world(number), rng, max_passages):
            ids, mask = [], []
            for text, counts in document:
                piece = tokenizer.encode(text)
                ids += piece
                mask += [counts] * len(piece)
            waiting.append(([*ids[: row_length - 1], tokenizer.pad_id], [*mask[: row_length - 1], False]))
        while len(waiting) > WINDOW:
            row, room = [], row_length
            first = waiting.pop(0)  # so that none waits for ever
            for ids_mask in (first, *sorted(waiting, key=lambda document: -len(document[0]))):
                if len(ids_mask[0]) <= room:
                    row.append(ids_mask)
                    room -= len(ids_mask[0])
            waiting = [document for document in waiting if not any(document is chosen for chosen in row)]
            yield _row(row, row_length)


def _row(documents: list[tuple[list[int], list[bool]]], row_length: int) -> tuple[np.ndarray, ...]:
    tokens, positions, segments = (np.zeros(row_length, np.int32) for _ in range(3))
    loss_mask, at = np.zeros(row_length, bool), 0
    for number, (ids, mask) in enumerate(documents, 1):
        here = slice(at, at + len(ids))
        tokens[here], positions[here], segments[here], loss_mask[here] = ids, np.arange(len(ids)), number, mask
        loss_mask[at] = False
        at += len(ids)
    return tokens, positions, segments, loss_mask
