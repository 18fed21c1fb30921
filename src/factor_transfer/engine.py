"""The machine a run computes on: device, processes, precision, and the signals that ask it to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from factor_transfer.errors import ConfigError, Interrupted

LEAST = 2
"""Samples that batch norm needs of a process's part."""

M = TypeVar("M", bound=nn.Module)


class Engine:
    """The machine: device, processes and precision, the same for every stage of a run.

    Args:
        device: auto, cpu, cuda or mps; launch and processes are Accelerate's.
        precision: auto, fp32 or bf16. Accelerate keeps one precision a process, so autocast is our own.
        threads: CPU threads; None leaves torch's choice.
    """

    def __init__(self, device: str = "auto", precision: str = "auto", threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        available = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(),
                     "mps": torch.backends.mps.is_available()}  # fmt: skip
        if not available.get(device, False):
            raise ConfigError(
                f"--device {device}",
                found=f"this machine has no {device} device that torch {torch.__version__} can use",
                valid=[name for name, there in available.items() if there],
            )
        on_cpu = device == "cpu" or (device == "auto" and not (available["cuda"] or available["mps"]))
        # Precision is ours: neither Accelerate's environment variables nor its settings file may change it.
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
        self.device = self.accelerator.device
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        # Of torchrun, which numbers processes host by host.
        self.hosts = self.processes // int(os.environ.get("LOCAL_WORLD_SIZE", self.processes))
        self.bf16 = precision == "bf16" or (precision == "auto" and _has_bf16(self.device))

    def describe(self) -> dict[str, Any]:
        """What a run's bits depend on."""
        return {
            "device": str(self.device),
            "precision": "bf16" if self.bf16 else "fp32",
            "processes": self.processes,
        }

    @property
    def main(self) -> bool:
        """True in the one process that writes and prints."""
        return bool(self.accelerator.is_main_process)

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, module: M) -> M:
        """Onto the device, in channels-last memory format."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def wrap(self, module: nn.Module) -> nn.Module:
        """Onto the device, and behind DistributedDataParallel where there are several processes."""
        module = self.place(module)
        if self.accelerator.distributed_type == DistributedType.NO:
            return module
        return self.accelerator.prepare_model(module)  # type: ignore[no-any-return]

    def shard(self, chunk: np.ndarray, *, by_host: bool = False) -> np.ndarray:
        """This process's part of a batch: every sample goes to exactly one process.

        Args:
            chunk: sample indices.
            by_host: a sample goes to the same host whenever it can, where its teacher outputs are cached.
        """
        parts = np.array_split(chunk, self.processes)
        if by_host and self.hosts > 1:
            each = self.processes // self.hosts
            at_home = [chunk[chunk % self.hosts == host] for host in range(self.hosts)]
            homely = [part for samples in at_home for part in np.array_split(samples, each)]
            if min(map(len, homely)) >= LEAST:
                parts = homely
        part: np.ndarray = parts[self.rank]
        return part

    def average_buffers(self, module: nn.Module) -> None:
        """Batch-norm statistics as all processes saw them: each has met only its part of the images."""
        if self.processes > 1:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over processes."""
        return self.accelerator.reduce(values, "sum")  # type: ignore[no-any-return]


class StopRequest:
    """The signal that asked to stop, if any."""

    signum: int | None = None

    def leave_if_any(self) -> None:
        """Leave training; the caller has saved.

        Raises:
            Interrupted: a signal came.
        """
        if self.signum is not None:
            raise Interrupted(self.signum)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM let the step under way finish; a second one of them acts at once."""
    request = StopRequest()
    before: dict[int, Any] = {}

    def on_signal(signum: int, _: FrameType | None) -> None:
        request.signum = signum
        signal.signal(signum, before[signum])

    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(wanted) != signal.SIG_IGN:  # as under nohup: it stays ignored
                before[wanted] = signal.getsignal(wanted)
                signal.signal(wanted, on_signal)
    except ValueError:  # not the main thread: whoever owns it owns the signals
        before.clear()
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _has_bf16(device: torch.device) -> bool:
    """Hardware that computes in bf16; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
