"""Networks as graphs of torch.compile, where --torchcompile asks for it: the frozen teacher, and what is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from factor_transfer.console import say
from factor_transfer.errors import ModelError
from factor_transfer.features import Tapped
from factor_transfer.frozen import TOLERANCE, Maps, difference
from factor_transfer.fusible import decompositions

HALF_TOLERANCE = 2e-2
"""Where `TOLERANCE` is for float32, this is for autocast: a compiled network rounds to bf16 in other places."""

MORE = 1.5
"""How many times as far from float32 as the uncompiled network a compiled one may be in training: bf16 alone is far."""

LEAST = {"outputs": TOLERANCE, "gradient": 5e-2, "buffers": TOLERANCE}
"""Relative distances (L2) that are allowed besides; of gradients more, because signs of values near 0 decide them."""

Tried = tuple[Maps, Tensor, Tensor]
"""What a network gives, and in one vector each the gradient of all its weights, and its averages after that."""

WITHOUT = "leave --torchcompile out (with another --out, where a stage is finished): networks then run as they are"


class Compiled(Tapped):
    """A tapped network that `torch.compile` makes one graph of, for whole batches in one mode.

    That happens when the first such batch comes, under the autocast that it comes under; other batches go through the
    network as it is, and so do all while anybody watches a layer. It is exported first: the hooks of a tapped network
    live only while it runs, so the compiler would not see them. Weights and buffers are the network's own.

    Args:
        plain: the network, on its device; it runs to its end.
        batch: images in a whole batch.
        name: what messages call it.

    Raises:
        ModelError: the network cannot be exported or compiled, or says something else then; when it happens.
    """

    def __init__(self, plain: Tapped, batch: int, name: str) -> None:
        super().__init__(plain.module, plain.layer, flag=plain.flag, also=plain.layers)
        self._batch, self._name, self._hooks = batch, name, self._count_hooks()
        self._run: Callable[[Tensor], Maps] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}  # a copy has its own weights, which this graph does not read

    def maps(self, images: Tensor) -> Maps:
        """As the plain network's."""
        if len(images) != self._batch or not self._in_mode() or self._count_hooks() != self._hooks:
            return super().maps(images)
        if self._run is None:
            self._run = self._compile(images)
        return self._run(images)

    def _count_hooks(self) -> int:
        kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
        return sum(len(getattr(part, kind)) for part in self.modules() for kind in kinds)

    def _in_mode(self) -> bool:
        """Whether the network is used as it is compiled for."""
        raise NotImplementedError

    def _made(self, images: Tensor) -> tuple[Callable[[Tensor], Maps], str]:
        """What runs in the network's place, compared with it on `images`; and what the comparison says."""
        raise NotImplementedError

    def _compile(self, images: Tensor) -> Callable[[Tensor], Maps]:
        start = time.perf_counter()
        run, said = self._made(images)
        say(f"{self._name}: compiled in {time.perf_counter() - start:.0f} s ({said})")
        return run

    def _check(self, what: str, off: float, tolerance: float) -> None:
        if not off < tolerance:
            found = f"a compiled {self._name} whose {what} differ by {off:.0e}, relatively"
            raise ModelError("--torchcompile", found=found, valid=f"less than {tolerance:.0e}", hint=WITHOUT)


class CompiledTeacher(Compiled):
    """A frozen network, its weights among the graph's constants: they are to change no more."""

    def __init__(self, plain: Tapped, batch: int) -> None:
        super().__init__(plain.requires_grad_(False), batch, "teacher")

    def _in_mode(self) -> bool:
        return not (self.module.training or torch.is_grad_enabled())

    def _made(self, images: Tensor) -> tuple[Callable[[Tensor], Maps], str]:
        expected = Tapped.maps(self, images)
        # The tracer reads this setting of all: among the options of torch.compile it freezes nothing (torch 2.14).
        with compiling(), inductor.patch(freezing=True):
            made: Callable[[Tensor], Maps] = torch.compile(_exported(self, images))
            off = difference(made(images), expected)
        self._check("outputs", off, HALF_TOLERANCE if torch.is_autocast_enabled(images.device.type) else TOLERANCE)
        return _called(made), f"its outputs differ by {off:.0e}, relatively"


class CompiledStudent(Compiled):
    """A network in training: forward and backward, with noise from the same generators as without compiling."""

    def _in_mode(self) -> bool:
        return self.module.training and torch.is_grad_enabled()

    def _made(self, images: Tensor) -> tuple[Callable[[Tensor], Maps], str]:
        plainly = self._tried(partial(Tapped.maps, self), images)
        with torch.autocast(images.device.type, enabled=False):
            precise = self._tried(partial(Tapped.maps, self), images)
        backend = partial(_backend, on_cpu=images.device.type == "cpu")
        with compiling(), dynamo.patch(optimize_ddp=False):  # which would cut the graph for several processes
            graph = _exported(self, images)
            made: Callable[[Tensor], Maps] = torch.compile(graph, backend=backend, dynamic=False, fullgraph=True)
            ours, theirs = _apart(self._tried(made, images), precise), _apart(plainly, precise)
        for what, least in LEAST.items():
            self._check(what, ours[what], MORE * theirs[what] + least)
        said = (
            f"its outputs and gradient differ from those in float32 by {ours['outputs']:.0e} and "
            f"{ours['gradient']:.0e}, relatively; uncompiled by {theirs['outputs']:.0e} and {theirs['gradient']:.0e}"
        )
        return _called(made), said

    def _tried(self, run: Callable[[Tensor], Maps], images: Tensor) -> Tried:
        """What `run` gives for `images`, and the weights' gradient for a random one of that; it leaves no trace."""
        before = [buffer.clone() for buffer in self.buffers()]
        with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
            output, maps = run(images)
            made = [leaf for leaf in tree_leaves((output, maps)) if isinstance(leaf, Tensor) and leaf.requires_grad]
            some = torch.Generator(images.device).manual_seed(0)
            # In one precision for all: another one would draw other numbers.
            given = [torch.randn(leaf.shape, generator=some, device=leaf.device).to(leaf.dtype) for leaf in made]
            weights = [weight for weight in self.parameters() if weight.requires_grad]
            found = torch.autograd.grad(made, weights, given, allow_unused=True)
        averages = [buffer.flatten() for buffer in self.buffers() if buffer.is_floating_point()]
        after = torch.cat([images.new_zeros(0), *averages])
        with torch.no_grad():
            for buffer, value in zip(self.buffers(), before, strict=True):
                buffer.copy_(value)
        gradient = torch.cat([part.flatten() for part in found if part is not None])
        return (output, maps), gradient, after


def _backend(graph: GraphModule, inputs: list[Tensor], *, on_cpu: bool) -> Any:
    """torch.compile's; on a CPU with batch norm as it can fuse it, and calls of its kernels in C++, not in Python."""
    from torch._inductor.compile_fx import compile_fx  # most of a second, which others need not wait for

    # This cache does not ask by which decompositions a graph was made.
    with functorch.patch(enable_autograd_cache=False):
        patches = {"cpp_wrapper": on_cpu, "fallback_random": True}
        table = decompositions() if on_cpu else None
        return compile_fx(graph, inputs, config_patches=patches, decompositions=table)


@torch.no_grad()
def _apart(found: Tried, expected: Tried) -> dict[str, float]:
    """Relative distances (L2), by the names in `LEAST`."""
    (maps, gradient, buffers), (their_maps, their_gradient, their_buffers) = found, expected
    return {
        "outputs": difference(maps, their_maps),
        "gradient": difference((gradient, {}), (their_gradient, {})),
        "buffers": difference((buffers, {}), (their_buffers, {})),
    }


def _called(made: Callable[[Tensor], Maps]) -> Callable[[Tensor], Maps]:
    """`made` itself is a module, and would be a part of the one that keeps it, and of its state."""

    def run(images: Tensor) -> Maps:
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
            valid="networks that torch.export takes, and torch's compiler (on a CPU: g++, and the headers of Python)",
            hint=WITHOUT,
        ) from error


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        ModelError: there is no compiler for this device.
    """
    with compiling():
        torch.compile(torch.square)(torch.ones(64, device=device))


def check_exports(network: Tapped, images: Tensor) -> None:
    """Export a network as it is; it stays so.

    Raises:
        ModelError: torch.export does not take it.
    """
    network.maps(images)  # whose own errors are not the exporter's
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
