"""The machine: which systems are supported, how many threads read files, and what glibc does with freed memory.

Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from factor_transfer.util.console import pass_bar
from factor_transfer.util.errors import ConfigError

SUPPORTED = {"linux": "Linux", "darwin": "macOS"}
"""Systems that have what the program calls; by Python's own names."""

BLOCK = 128
"""Images that a thread takes at a time."""

GLIBC_MALLOC = {-1: 2**31 - 1, -3: 2**30, -2: 2**26}
"""`mallopt`: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, so that freed maps stay with the process; M_TOP_PAD, to grow by."""

T = TypeVar("T")


def check_supported() -> None:
    """That this system is one of `SUPPORTED`.

    Raises:
        ConfigError: it is another one.
    """
    if sys.platform not in SUPPORTED:
        raise ConfigError(
            f"{platform.system() or sys.platform}",
            found="a system that factor-transfer does not support",
            valid=f"{' or '.join(SUPPORTED.values())}",
            hint="on Windows, use WSL 2" if sys.platform in {"win32", "cygwin"} else None,
        )


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


def keep_memory() -> None:
    """Have glibc keep what is freed for the next step; elsewhere nothing is changed.

    By default it gives large blocks back to the system, which hands them out again page by page, cleared: a few
    thousand page faults a step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for parameter, value in GLIBC_MALLOC.items():
        mallopt(parameter, value)
