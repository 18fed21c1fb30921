"""--torchcompile: the frozen teacher and the trained networks as graphs of torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo

from factor_transfer.networks.features import Tapped
from factor_transfer.util.errors import ModelError

Maps = tuple[Any, dict[str, Tensor]]
"""A network's output, and its maps (B, C, H, W) by layer."""


class Compiled(Tapped):
    """A tapped network that torch.compile makes one graph of, for whole batches.

    The compiler does not see the hooks of a tapped network, which exist only while it runs. So the network is exported
    first, with its taps as outputs. The exported graph computes with the network's own weights and buffers.

    A whole batch in the mode that the graph was made for goes through the graph. Every other batch goes through the
    network as it is: the last one of a pass, one for evaluation, and one whose layers somebody watches with a hook.

    Args:
        plain: the network, on its device; it runs to its end.
        batch: images in a whole batch.
        trains: the graph is for training, with gradients; else for evaluation without.

    Raises:
        ModelError: the network cannot be exported or compiled; raised by the first whole batch.
    """

    def __init__(self, plain: Tapped, batch: int, *, trains: bool) -> None:
        super().__init__(plain.module, plain.layer, flag=plain.flag, also=plain.layers)
        self._batch, self._trains, self._hooks = batch, trains, self._count_hooks()
        self._run: Callable[[Tensor], Maps] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}  # a copy has other weights than the graph

    def maps(self, images: Tensor) -> Maps:
        """As the plain network's."""
        in_mode = self._trains == self.module.training == torch.is_grad_enabled()
        if len(images) != self._batch or not in_mode or self._count_hooks() != self._hooks:
            return super().maps(images)
        with compiling():
            if self._run is None:
                # The noise is that without compiling. A wrapper in C++ would call torch's kernels directly, and so
                # bypass `kernels.guard`.
                options: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": False}
                graph = _exported(self, images)
                # A module as an attribute would become a part of this one: hence `partial`.
                self._run = partial(torch.compile(graph, dynamic=False, fullgraph=True, options=options))
            with dynamo.patch(optimize_ddp=False):  # DDP would cut the graph into several
                return self._run(images)

    def _count_hooks(self) -> int:
        kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
        return sum(len(getattr(part, kind)) for part in self.modules() for kind in kinds)


@contextmanager
def compiling() -> Iterator[None]:
    """Turn errors inside into a message that --torchcompile does not work here, and why."""
    try:
        yield
    except Exception as error:  # whatever a network's code, torch.export and the compilers behind it raise
        cause = getattr(error, "inner_exception", error)
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise ModelError(
            "--torchcompile",
            found=next((line for line in lines if " error: " in line), lines[0]),
            valid="networks that torch.export takes, and torch's compiler (on a CPU: g++, and the headers of Python)",
            hint="leave --torchcompile out (with another --out, where a stage is finished): networks run as they are",
        ) from error


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        ModelError: there is no compiler for this device.
    """
    with compiling():
        torch.compile(torch.square)(torch.ones(64, device=device))


def check_exports(network: Tapped, images: Tensor) -> None:
    """Check that torch.export takes a network. The network is not changed.

    Raises:
        ModelError: torch.export does not take it.
    """
    network.maps(images)  # errors of the network itself are raised here, and not as the exporter's
    with compiling():
        _exported(network, images)


def _exported(network: Tapped, images: Tensor) -> nn.Module:
    """`maps` as a module of its own, on the very weights and buffers of the network."""
    return torch.export.export(_Maps(network), (images,), strict=False).module()


class _Maps(nn.Module):
    """What a tapped network's `maps` would be without compiling, as a forward."""

    def __init__(self, network: Tapped) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Maps:
        return Tapped.maps(self.network, images)
