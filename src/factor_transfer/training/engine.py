"""What a run computes on: device, processes, precision; and the signals that ask it to stop."""

from __future__ import annotations

import atexit
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import is_initialized as accelerate_has_begun
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed import DistError

from factor_transfer.networks.kernels import guard
from factor_transfer.training.processes import (
    check_alone,
    compare_machines,
    first_difference,
    hosts_of,
    leave_group,
    unhurried,
)  # fmt: skip
from factor_transfer.util.console import warn
from factor_transfer.util.errors import ConfigError, RunError, TrainingError, first_line

SAME_SIGNAL_SECONDS = 1.0
"""Within this time a second signal is taken for the first: launchers repeat what the terminal or SLURM has sent."""

LEAST = 2
"""Samples that every process needs for batch norm."""

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class Engine:
    """Device, processes and precision, the same for every stage of a run.

    Args:
        device: auto, cpu, cuda or mps; launch and processes are Accelerate's.
        precision: auto, fp32 or bf16. Accelerate keeps one precision a process, so autocast is our own.
        threads: CPU threads; None leaves torch's choice.
        sync_bn: batch norm over the images of all processes.
        timeout_minutes: longest that one process waits for another.

    Raises:
        ConfigError: this machine has no such device, or it cannot do what is asked.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        *,
        sync_bn: bool = False,
        timeout_minutes: float = 10.0,
    ) -> None:
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
        kind = _kind(device, cuda=available["cuda"], mps=available["mps"])
        self.timeout = timedelta(minutes=timeout_minutes)
        compare_machines(kind, self.timeout)
        # --precision alone sets it: Accelerate's environment variables and settings file must not change it.
        self.accelerator = Accelerator(
            cpu=PartialState().device.type == "cpu" if accelerate_has_begun() else kind == "cpu",
            mixed_precision="no",
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=self.timeout),
                DistributedDataParallelKwargs(broadcast_buffers=False),  # `share_buffers` averages them
            ],
        )
        self.device = _device(kind, self.accelerator)
        guard()  # on a GPU's machine, too, some gradients are the CPU's
        if self.device.type == "cuda":
            compute_in_float32()
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        if self.processes > 1:
            atexit.register(leave_group)
        else:
            check_alone()
        self.hosts = hosts_of(self.all_of(os.environ.get("LOCAL_WORLD_SIZE")))
        self.bf16 = precision == "bf16" or (precision == "auto" and self._all_have_bf16())
        self.sync_bn = sync_bn
        if sync_bn and self.device.type != "cuda":
            raise ConfigError(
                "--sync-bn",
                found=f"device {self.device}: torch's synchronised batch norm computes on GPUs only",
                valid="cuda devices",
                hint="leave it out: each process then normalises its own part of a batch",
            )

    def _all_have_bf16(self) -> bool:
        """Whether every process has bf16: all compute in one precision."""
        found = self.all_of(_has_bf16(self.device))
        if self.main and any(found) and not all(found):
            warn(f"--precision auto: float32, since process {found.index(False)} of {len(found)} has no bf16")
        return all(found)

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
        """Wait until every process has called this, within the timeout. For longer waits there is `unhurried`."""
        self.accelerator.wait_for_everyone()

    def memory(self) -> str:
        """The most memory that this process has taken so far, and that of its GPU, in words."""
        unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kilobytes on Linux
        taken = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB of memory"
        if self.device.type == "cuda":
            taken += f", {torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB of the GPU's"
        return taken

    def unhurried(self) -> AbstractContextManager[None]:
        """Inside, each process works by itself without a time limit; at the end each waits for all others.

        For work of one process alone, or work that one machine may do more slowly than another. See `processes`.
        """
        return unhurried(self.rank, self.processes, self.timeout.total_seconds())

    def seed_noise(self, seed: int) -> None:
        """Seed the noise inside layers on this device.

        `torch.manual_seed` would seed every kind of device, which takes time for those that are absent.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def settle(self) -> None:
        """Wait until the device has finished its work. A GPU works asynchronously, so clocks need this."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

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
        if self.sync_bn:
            convert_sync_batchnorm(module)  # its parts, in place
        with warnings.catch_warnings():  # torch 2.14 has another name for broadcast_buffers, torch 2.9 only this one
            warnings.simplefilter("ignore", FutureWarning)
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

    @torch.no_grad()
    def share_buffers(self, module: nn.Module) -> None:
        """Set batch-norm statistics to their mean over processes, each of which has seen only its part of a batch.

        This is done after every step, so that all processes hold the same state whenever one of them saves it.
        """
        if self.processes == 1:
            return
        if buffers := [buffer for buffer in module.buffers() if buffer.is_floating_point()]:
            parts = torch.cat([buffer.flatten() for buffer in buffers])
            means = self.accelerator.reduce(parts, "mean").split([buffer.numel() for buffer in buffers])
            for buffer, mean in zip(buffers, means, strict=True):
                buffer.copy_(mean.view_as(buffer))

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over processes."""
        return self.accelerator.reduce(values, "sum")  # type: ignore[no-any-return]

    def all_of(self, value: T) -> list[T]:
        """The `value` of every process, in order of rank. Every process must call this."""
        return [value] if self.processes == 1 else list(gather_object([value]))

    def told(self, value: T) -> T:
        """The `value` of the first process. Every process must call this."""
        if self.processes == 1:
            return value
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def largest(self, value: int) -> int:
        """The largest `value` of all processes."""
        if self.processes == 1:
            return value
        marks = torch.zeros(self.processes, dtype=torch.int64, device=self.device)
        marks[self.rank] = value
        return int(self.total(marks).max())

    def check_same(self, value: str, given: str, valid: str, hint: str) -> None:
        """Check that all processes have the same value. Every process must call this.

        Args:
            value: of this process.
            given: what it is of, for the message.
            valid: what would be right.
            hint: what to do.

        Raises:
            RunError: they have different ones; in every process.
        """
        differing = first_difference(self.all_of({"value": value}))
        if differing is not None:
            found = f"process {differing[1]} of {self.processes} does not see what process 0 sees"
            raise RunError(given, found=found, valid=valid, hint=hint)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn the error of a collective operation into a message that another process is lost.

        Raises:
            TrainingError: a collective operation failed.
        """
        try:
            yield
        except RuntimeError as error:  # gloo raises nothing more special
            if self.processes == 1 or not (isinstance(error, DistError) or "gloo" in str(error).lower()):
                raise
            raise TrainingError(
                f"process {self.rank} of {self.processes} has lost another one",
                found=first_line(error),
                valid="all processes alive and in reach; the last checkpoint is kept",
                hint="see what the other one said, or what ended it; the same command continues",
            ) from error


class StopRequest:
    """The signal that asked to stop, if any: 0 for none."""

    signum: int = 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM only set the request: the current step finishes. A second signal acts at once."""
    request = StopRequest()
    before: dict[int, Any] = {}
    first = 0.0

    def on_signal(signum: int, _: FrameType | None) -> None:
        nonlocal first
        if not request.signum:
            request.signum, first = signum, time.monotonic()
        elif time.monotonic() - first > SAME_SIGNAL_SECONDS:
            signal.signal(signum, before[signum])
            signal.raise_signal(signum)

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


def _kind(device: str, *, cuda: bool, mps: bool) -> str:
    """The kind of device that --device means: cpu, cuda or mps; `accelerate launch --cpu` decides for `auto`."""
    if device != "auto":
        return device
    if os.environ.get("ACCELERATE_USE_CPU") == "True":
        return "cpu"
    return "cuda" if cuda else "mps" if mps else "cpu"


def _device(kind: str, accelerator: Accelerator) -> torch.device:
    """The device of that kind. Accelerate keeps the one that it began with for the life of a process.

    Raises:
        ConfigError: it began with another, and other processes count on that.
    """
    begun: torch.device = accelerator.device
    if begun.type == kind and (kind != "cuda" or begun.index is not None):
        return begun
    if begun.type != kind and accelerator.num_processes > 1:
        raise ConfigError(
            f"--device {kind}",
            found=f"{accelerator.num_processes} processes that were started for {begun.type}",
            valid=f"{begun.type}, or auto",
            hint="start them anew: torchrun, or accelerate launch, as docs/distributed.md has it",
        )
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def compute_in_float32() -> None:
    """Switch TF32 off: by default torch computes float32 convolutions on CUDA with 10 bits of mantissa."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16. Emulated bf16 is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
