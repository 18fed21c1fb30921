"""The frozen teacher's network as one graph, where --torchcompile asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from factor_transfer.console import say
from factor_transfer.errors import ModelError
from factor_transfer.features import Tapped
from factor_transfer.frozen import TOLERANCE, Maps, difference

HALF_TOLERANCE = 2e-2
"""Where `TOLERANCE` is for float32, this is for autocast: a compiled network rounds to bf16 in other places."""

WITHOUT = "leave --torchcompile out: the teacher then runs as it is"


class Compiled(nn.Module):
    """A frozen network that `torch.compile` makes one graph of, its weights among the constants, for whole batches.

    That happens when the first whole batch comes, under the autocast that it comes under; other batches go through the
    network as it is, and so do all while anybody watches a layer. It is exported first: the hooks of a tapped network
    live only while it runs, so the compiler would not see them.

    Args:
        plain: the network, in eval mode and on its device; its weights are to change no more.
        batch: images in a whole batch.

    Raises:
        ModelError: the network cannot be exported or compiled, or says something else then; when it happens.
    """

    def __init__(self, plain: Tapped, batch: int) -> None:
        super().__init__()
        self.plain, self.layer, self._batch = plain.requires_grad_(False), plain.layer, batch
        self._run: Callable[[Tensor], Maps] | None = None

    def maps(self, images: Tensor) -> Maps:
        """As the plain network's."""
        if len(images) != self._batch or any(part._forward_hooks for part in self.plain.modules()):
            return self.plain.maps(images)
        if self._run is None:
            self._run = self._compile(images)
        return self._run(images)

    @torch.no_grad()
    def _compile(self, images: Tensor) -> Callable[[Tensor], Maps]:
        start, expected = time.perf_counter(), self.plain.maps(images)
        # The tracer reads this setting of all: among the options of torch.compile it freezes nothing (torch 2.14).
        with compiling(), inductor.patch(freezing=True):
            graph = torch.export.export(_Maps(self.plain), (images,), strict=False).module()
            made: Callable[[Tensor], Maps] = torch.compile(graph)
            found = made(images)
        off = difference(found, expected)
        seconds = time.perf_counter() - start
        say(f"teacher: compiled in {seconds:.0f} s (its outputs differ by {off:.0e}, relatively)")
        tolerance = HALF_TOLERANCE if torch.is_autocast_enabled(images.device.type) else TOLERANCE
        if not off < tolerance:
            raise ModelError(
                "--torchcompile",
                found=f"a compiled teacher whose outputs differ by {off:.0e}, relatively",
                valid=f"less than {tolerance:g}",
                hint=WITHOUT,
            )

        def run(images: Tensor) -> Maps:  # `made` itself is a module, and would be a part of this one and of its state
            return made(images)

        return run


@contextmanager
def compiling() -> Iterator[None]:
    """Say of what fails inside that --torchcompile cannot be had, and why."""
    try:
        yield
    except Exception as error:  # whatever a network's code, torch.export and the compilers behind it raise
        cause = getattr(error, "inner_exception", error)
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise ModelError(
            "--torchcompile",
            found=next((line for line in lines if " error: " in line), lines[0]),
            valid="a teacher that torch.export takes, and torch's compiler (on a CPU: g++, and the headers of Python)",
            hint=WITHOUT,
        ) from error


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        ModelError: there is no compiler for this device.
    """
    with compiling():
        torch.compile(torch.square)(torch.ones(64, device=device))


class _Maps(nn.Module):
    """A tapped network's `maps` as a forward."""

    def __init__(self, network: Tapped) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Maps:
        return self.network.maps(images)
