"""What the program asks of the system: supported platforms, threads that read files, and glibc's allocator.

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
"""Supported systems, by their names in Python (`sys.platform`) and in messages."""

BLOCK = 128
"""Images that a thread takes at a time."""

GLIBC_MALLOC = {-1: 2**31 - 1, -3: 2**30, -2: 2**26}
"""`mallopt`: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, so that freed maps stay with the process; M_TOP_PAD, to grow by."""

T = TypeVar("T")


def check_supported() -> None:
    """Check that this system is one of `SUPPORTED`.

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
    """Results of `work` over consecutive ranges of 0..count-1, in order, computed by one thread a core.

    Threads help, since reading, decoding and hashing release the interpreter's lock.
    """
    parts = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    with ThreadPoolExecutor(cores()) as pool, pass_bar(label, count) as bar:
        for part, found in zip(parts, pool.map(work, parts), strict=True):
            bar(len(part), {})
            yield found


def cores() -> int:
    """Number of processes or threads that decode images: one a core, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def keep_memory() -> None:
    """Have glibc keep freed memory for the next step. With another C library nothing happens.

    By default glibc gives large blocks back to the system. The next step gets them again page by page, zeroed, with
    some thousand page faults. The setting is for the whole process, so only the command line and processes of our own
    use it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for parameter, value in GLIBC_MALLOC.items():
        mallopt(parameter, value)
