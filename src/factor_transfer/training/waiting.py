"""Processes that wait for each other as long as they live, however long one works alone.

A collective operation has a limit (`--timeout-minutes`), after which a process that is only busy counts as lost. Here a
thread of the busy process says through the launch's store that it lives; the limit is on its silence, not on its work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from torch.distributed import DistError
from torch.distributed.distributed_c10d import _get_default_store

from factor_transfer.util.errors import TrainingError

BEATS = 8
"""Signs of life within the limit."""

FIRST_POLL, LAST_POLL = 0.001, 0.2
"""Seconds between looks, which grow from the first to the last: most waits are short."""

_turns = count()
"""Of this process: all processes enter the same turns in the same order."""


@contextmanager
def unhurried(rank: int, processes: int, limit: float) -> Iterator[None]:
    """Inside, each process works by itself, as long as it takes; at the end each waits for all the others.

    Every process must enter, if only to wait. There may be no collective operation inside.

    Args:
        rank: of this process.
        processes: how many there are.
        limit: seconds of silence after which a process counts as lost.

    Raises:
        TrainingError: another process has failed inside, or is lost.
    """
    if processes == 1:
        yield
        return
    turn = _Turn(_get_default_store(), rank, processes, limit)
    ended = threading.Event()
    beating = threading.Thread(target=turn.beat, args=(ended,), daemon=True)
    beating.start()
    try:
        yield
        turn.say("done", rank)
        turn.wait()
    except BaseException:
        with suppress(DistError):  # the store is gone with the process that kept it
            turn.say("failed", rank)
        raise
    finally:
        ended.set()
        beating.join()


class _Turn:
    """One such time, in the store: a count of signs of life for each process, and what each has done."""

    def __init__(self, store: Any, rank: int, processes: int, limit: float) -> None:
        self.store, self.rank, self.processes, self.limit = store, rank, processes, limit
        self.name = f"factor-transfer/turn-{next(_turns)}"

    def say(self, what: str, rank: int) -> None:
        self.store.add(f"{self.name}/{what}-{rank}", 1)

    def said(self, what: str, rank: int) -> int:
        return int(self.store.add(f"{self.name}/{what}-{rank}", 0))

    def beat(self, ended: threading.Event) -> None:
        """Say that this process lives, until it has left."""
        while not ended.wait(self.limit / BEATS):
            with suppress(DistError):  # the main thread meets it, too, and says so
                self.say("lives", self.rank)

    def wait(self) -> None:
        """Until all others are done; and the first, which may keep the store, until all have read that."""
        self._wait_for("done")
        self.say("left", self.rank)
        if self.rank == 0:
            self._wait_for("left")

    def _wait_for(self, what: str) -> None:
        for other in range(self.processes):
            last, since, pause = -1, time.monotonic(), FIRST_POLL
            while not self.said(what, other):
                if self.said("failed", other):
                    raise self._lost(f"process {other} failed")
                beats = self.said("lives", other)
                if beats != last:
                    last, since = beats, time.monotonic()
                elif time.monotonic() - since > self.limit:
                    raise self._lost(f"no sign of life of process {other} for {self.limit:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, LAST_POLL)

    def _lost(self, found: str) -> TrainingError:
        return TrainingError(
            f"process {self.rank} of {self.processes} has lost another one",
            found=found,
            valid="all processes alive and in reach; the last checkpoint is kept",
            hint="see what the other one said, or what ended it; the same command continues",
        )
