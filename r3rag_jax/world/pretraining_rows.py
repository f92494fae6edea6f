"""Documents of `base` worlds, tokenized and packed into rows for pretraining."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np

from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.world.pretraining import documents, make_world

WINDOW = 64  # number of documents from which rows are filled


def token_rows(tokenizer: Tokenizer, seed: int, row_length: int, max_passages: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Endless rows (tokens, positions, segment_ids, loss_mask), each int32 / bool [row_length].

    A row takes the oldest document of the window, and then repeatedly the longest one that still fits.
    """
    waiting: list[tuple[list[int], list[bool]]] = []
    for number in itertools.count(seed):
        rng = random.Random(f"pretraining {number}")
        for document in documents(make_world(number), rng, max_passages):
            ids, mask = [], []
            for text, has_loss in document:
                piece = tokenizer.encode(text)
                ids += piece
                mask += [has_loss] * len(piece)
            waiting.append(([*ids[: row_length - 1], tokenizer.pad_id], [*mask[: row_length - 1], False]))
        while len(waiting) > WINDOW:
            row, num_free = [], row_length
            first = waiting.pop(0)  # the oldest, so that every document gets its turn
            for ids_mask in (first, *sorted(waiting, key=lambda document: -len(document[0]))):
                if len(ids_mask[0]) <= num_free:
                    row.append(ids_mask)
                    num_free -= len(ids_mask[0])
            waiting = [document for document in waiting if not any(document is chosen for chosen in row)]
            yield _row(row, row_length)


def _row(documents: list[tuple[list[int], list[bool]]], row_length: int) -> tuple[np.ndarray, ...]:
    tokens, positions, segments = (np.zeros(row_length, np.int32) for _ in range(3))
    loss_mask, start = np.zeros(row_length, bool), 0
    for number, (ids, mask) in enumerate(documents, 1):
        span = slice(start, start + len(ids))
        tokens[span], positions[span], segments[span], loss_mask[span] = ids, np.arange(len(ids)), number, mask
        loss_mask[start] = False
        start += len(ids)
    return tokens, positions, segments, loss_mask
