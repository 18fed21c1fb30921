"""The machines that a run computes on: which systems are supported, and whether several processes fit together."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from factor_transfer.errors import ConfigError

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
    for other, machine in enumerate(machines):
        differing = [name for name, value in machines[0].items() if machine.get(name) != value]
        if differing:
            name = differing[0]
            hint = "start all processes on like machines, from one environment, with one --device"
            if "instruction set" in name:
                hint = "start all processes with one ATEN_CPU_CAPABILITY (default, avx2), or on like machines"
            raise ConfigError(
                f"{size} processes on machines that differ",
                found=f"{name}: {machines[0][name]} of process 0, {machine.get(name)} of process {other}",
                valid="the same device and versions in all processes",
                hint=hint,
            )
