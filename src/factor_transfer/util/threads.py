"""Many images, block by block, by a few threads: reading, decoding and hashing leave the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from factor_transfer.util.console import pass_bar

BLOCK = 128
"""Images that a thread takes at a time."""

T = TypeVar("T")


def blocks(label: str, count: int, work: Callable[[range], T]) -> Iterator[T]:
    """`work` over ranges of 0..count-1, in order, by one thread a core."""
    parts = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    with ThreadPoolExecutor(cores()) as pool, pass_bar(label, count) as bar:
        for part, found in zip(parts, pool.map(work, parts), strict=True):
            bar(len(part), {})
            yield found


def cores() -> int:
    """Processes or threads that decode: one a core, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
