"""Several processes of one run: whether their machines fit together, and how they wait for each other.

A collective operation of torch has a time limit (`--timeout-minutes`). A process that works alone for longer counts as
lost. `unhurried` is for such work. A thread of the busy process says through the launch's store that it lives, and the
limit is on its silence.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from itertools import count
from typing import Any

import torch
from torch.distributed import DistError, destroy_process_group, is_initialized
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from factor_transfer.util.errors import ConfigError, TrainingError

ALIKE = ("factor-transfer", "torch", "torchvision", "timm", "numpy", "pillow")
"""Packages that must have the same version in all processes of a run."""

_stores: list[Any] = []
"""Stores that stay open: the first process may serve them while others still read."""

BEATS = 8
"""Signs of life that a busy process gives within the time limit."""

FIRST_POLL, LAST_POLL = 0.001, 0.2
"""Seconds between polls. They grow from the first to the last, since most waits are short."""

_turns = count()
"""Numbers the uses of `unhurried` in this process; all processes enter them in the same order."""


# -- before the processes are joined


def first_difference(values: Sequence[Mapping[str, Any]]) -> tuple[str, int] | None:
    """The first name whose value differs between processes, and the first process that differs from process 0.

    Args:
        values: of each process, by name; all have the same names.

    >>> first_difference([{"lr": 1, "k": 2}, {"lr": 1, "k": 2}, {"lr": 1, "k": 3}])
    ('k', 2)
    """
    for name, value in values[0].items():
        for process, other in enumerate(values):
            if other.get(name) != value:
                return name, process
    return None


def machine_facts(device: str) -> dict[str, str]:
    """What must be the same in all processes of a run.

    Args:
        device: the kind that this process computes on.
    """
    found = {"device": device, "python": ".".join(platform.python_version_tuple()[:2])}
    found |= {name: version(name) for name in ALIKE}
    if device == "cpu":  # another one rounds otherwise, so that weights would drift apart
        found["instruction set of torch"] = torch.backends.cpu.get_cpu_capability()
    return found


def compare_machines(device: str, timeout: timedelta) -> None:
    """Check that all processes of a launch have one kind of device and the same versions, before they are joined.

    Args:
        device: the kind that this process computes on.
        timeout: longest wait for the others.

    Raises:
        ConfigError: they differ; in every process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    if is_initialized():  # compared when they were joined
        return
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    _stores.append(store)
    mine = PrefixStore(f"factor_transfer/{len(_stores)}", store)
    mine.set(str(rank), json.dumps(machine_facts(device)))
    machines = [json.loads(mine.get(str(each))) for each in range(size)]
    differing = first_difference(machines)
    if differing is not None:
        name, other = differing
        hint = "start all processes on like machines, from one environment, with one --device"
        if "instruction set" in name:
            hint = "start all processes with one ATEN_CPU_CAPABILITY (default, avx2), or on like machines"
        raise ConfigError(
            f"{size} processes on machines that differ",
            found=f"{name}: {machines[0][name]} of process 0, {machines[other].get(name)} of process {other}",
            valid="the same device and versions in all processes",
            hint=hint,
        )


def hosts_of(local_sizes: list[str | None]) -> int:
    """Hosts of equally many processes, which torchrun numbers host by host; 1 where that is not so.

    Args:
        local_sizes: LOCAL_WORLD_SIZE of every process.

    >>> hosts_of(["2"] * 4), hosts_of(["1", "2", "2"]), hosts_of([None])
    (2, 1, 1)
    """
    each = {int(size or 0) for size in local_sizes}
    (size,) = each if len(each) == 1 else (0,)
    return len(local_sizes) // size if size and len(local_sizes) % size == 0 else 1


def check_alone() -> None:
    """Check that `accelerate launch --cpu` has started as many processes as asked: without MPI it starts one.

    Raises:
        ConfigError: that happened.
    """
    environ = os.environ
    if environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in environ and "WORLD_SIZE" not in environ:
        raise ConfigError(
            "accelerate launch --cpu --num_processes N",
            found="one process: with --cpu Accelerate starts no more, but through MPI",
            valid="accelerate launch --multi_gpu --num_processes N -m factor_transfer ... --device cpu, on CPUs too",
            hint="or torchrun --standalone --nproc-per-node N -m factor_transfer ...",
        )


def leave_group() -> None:
    """Leave the process group at exit. With gloo's threads still running, a finished process would be aborted."""
    if is_initialized():
        destroy_process_group()


# -- waiting


@contextmanager
def unhurried(rank: int, processes: int, limit: float) -> Iterator[None]:
    """Inside, each process works by itself without a time limit; at the end each waits for all the others.

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
        with suppress(DistError):  # the process that served the store may be gone
            turn.say("failed", rank)
        raise
    finally:
        ended.set()
        beating.join()


class _Turn:
    """One use of `unhurried`: counters in the store, for each process and each of lives, done, left and failed."""

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
            with suppress(DistError):  # the main thread has the same error, and raises it
                self.say("lives", self.rank)

    def wait(self) -> None:
        """Wait until all others are done. The first process, which may serve the store, waits until all know that."""
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
