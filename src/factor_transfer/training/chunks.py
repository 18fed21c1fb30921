"""How a pass is divided: batches, each of which is one update of the weights, and their parts."""

from __future__ import annotations

import math

import numpy as np

from factor_transfer.config import Config
from factor_transfer.training.evaluation import chunks_of


def images_of_update(config: Config) -> int:
    """Images of one update of the weights."""
    return config.batch_size * config.grad_accum_steps


def parts_in(images: int, config: Config) -> int:
    """In how many parts the batch of an update is computed, which are nearly equal and at most --batch-size.

    >>> config = Config(data="digits", teacher="a", student="b", batch_size=32, grad_accum_steps=4)
    >>> parts_in(128, config), parts_in(70, config)
    (4, 3)
    """
    return min(config.grad_accum_steps, math.ceil(images / config.batch_size))


def training_chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """`indices` in batches of `size`; a rest of less than half a batch shares evenly with the batch before it.

    Batch norm cannot train on one image, and every process needs two. The same for any number of processes, so that
    another number of them can continue a pass.

    >>> [len(chunk) for chunk in training_chunks(np.arange(33), 10)]
    [10, 10, 7, 6]
    """
    chunks = chunks_of(indices, size)
    if len(chunks) > 1 and len(chunks[-1]) < max(size / 2, 2):
        last = np.concatenate(chunks[-2:])
        chunks[-2:] = np.array_split(last, 2) if len(last) >= 4 else [last]
    return chunks
