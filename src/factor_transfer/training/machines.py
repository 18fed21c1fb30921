"""The machines that a run computes on: which systems are supported, and whether several processes fit together."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from factor_transfer.util.errors import ConfigError

SUPPORTED = {"linux": "Linux", "darwin": "macOS"}
"""Systems that have what the program calls; by Python's own names."""

ALIKE = ("factor-transfer", "torch", "torchvision", "timm", "numpy", "pillow")
"""Packages that decide what is computed: of one version in all processes of a run."""

_stores: list[Any] = []
"""Kept open: the first process may serve it, and the others read later than it does."""


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


def described(device: str) -> dict[str, str]:
    """What must be the same in all processes of a run.

    Args:
        device: the kind that this process computes on.
    """
    import torch

    found = {"device": device, "python": ".".join(platform.python_version_tuple()[:2])}
    found |= {name: version(name) for name in ALIKE}
    if device == "cpu":  # another one rounds otherwise, so that weights would drift apart
        found["instruction set of torch"] = torch.backends.cpu.get_cpu_capability()
    return found


def compare_machines(device: str, timeout: timedelta) -> None:
    """Hold all processes of a launch to one kind of device and the same versions, before they are joined.

    Args:
        device: the kind that this process computes on.
        timeout: longest wait for the others.

    Raises:
        ConfigError: they differ; in every process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    from torch.distributed import is_initialized
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if is_initialized():  # compared when they were joined
        return
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    _stores.append(store)
    mine = PrefixStore(f"factor_transfer/{len(_stores)}", store)
    mine.set(str(rank), json.dumps(described(device)))
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
