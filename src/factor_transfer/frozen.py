"""The frozen teacher: it never changes, and it is cheap to ask.

Its batch norms are folded into the convolutions before them, which saves a pass over memory for each. Whoever asks for
it has the rest compiled.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch._inductor.config import patch as freezing
from torch.nn.utils.fusion import fuse_conv_bn_eval

from factor_transfer.console import say
from factor_transfer.errors import ModelError
from factor_transfer.features import Tapped
from factor_transfer.files import state_fingerprint

FOLDABLE = (nn.BatchNorm2d, BatchNormAct2d)
"""Batch norms whose evaluation is a scale and a shift of each channel (and, of timm's, an activation)."""

TOLERANCE = 1e-4
"""A folded network whose outputs differ by more, relatively, computes something else."""


HALF_TOLERANCE = 2e-2
"""The same of a compiled one under autocast, which rounds to bf16 in other places."""

WITHOUT = "leave --torchcompile out: the teacher then runs as it is"

Maps = tuple[Any, dict[str, Tensor]]
"""A network's output, and its maps by layer."""


class FrozenTeacher(nn.Module):
    """A module that is in eval mode and without gradient, whatever mode the modules around it are put in.

    `no_grad`, not inference mode: losses save the teacher's outputs for their backward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.train(False)
        self._before = state_fingerprint(module.state_dict())

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode: in train mode its batch-norm statistics would drift."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """As the module's own."""
        return self.module(*inputs)

    def unchanged(self) -> bool:
        """Whether weights and buffers are those that it was frozen with."""
        return state_fingerprint(self.module.state_dict()) == self._before


@dataclass(frozen=True)
class Folding:
    """A network whose batch norms are folded into the convolutions before them."""

    network: Tapped
    count: int
    """Batch norms that were folded; 0 where none could be."""
    difference: float
    """Of outputs and feature maps from the plain network's, relative, in the precision of its weights."""


@torch.no_grad()
def folded(plain: Tapped, images: Tensor) -> Folding:
    """A copy of a network for evaluation only, its batch norms folded into the convolutions that feed nothing else.

    Which belong together is seen by watching what flows, so that any network will do. A folded batch norm becomes
    `nn.Identity` (timm's, with activation: that activation) under its old name. Where the
    convolution feeds something else that no module shows, comparing outputs tells, and the batch norm stays.

    Args:
        plain: the network; the tapped layers keep their meaning.
        images: normalised images (B, 3, H, W) to watch and compare, on the CPU: a GPU's TF32 would cover what differs.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> folding = folded(Tapped(net, "2"), torch.zeros(1, 3, 8, 8))
    >>> folding.count, folding.network.module[1]
    (1, Identity())
    """
    watched = deepcopy(plain).cpu().eval()
    expected = _outputs(watched, images)
    pairs = [(conv, norm) for conv, norm in _pairs(watched.module, images) if conv not in plain.layers]

    def attempt(pairs: list[tuple[str, str]]) -> Folding:
        made = _fold(deepcopy(plain).cpu().eval(), pairs)
        return Folding(made, len(pairs), _difference(_outputs(made, images), expected))

    folding = attempt(pairs)
    if not folding.difference < TOLERANCE:  # some convolution feeds more than its batch norm
        folding = attempt([pair for pair in pairs if attempt([pair]).difference < TOLERANCE])
    return folding if folding.difference < TOLERANCE else Folding(deepcopy(plain), 0, 0.0)


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
        with compiling(), freezing(freezing=True):
            graph = torch.export.export(_Maps(self.plain), (images,), strict=False).module()
            made: Callable[[Tensor], Maps] = torch.compile(graph)
            found = made(images)
        difference = _difference(_listed(found), _listed(expected))
        seconds = time.perf_counter() - start
        say(f"teacher: compiled in {seconds:.0f} s (its outputs differ by {difference:.0e}, relatively)")
        tolerance = HALF_TOLERANCE if torch.is_autocast_enabled(images.device.type) else TOLERANCE
        if not difference < tolerance:
            raise ModelError(
                "--torchcompile",
                found=f"a compiled teacher whose outputs differ by {difference:.0e}, relatively",
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


def _fold(network: Tapped, pairs: Sequence[tuple[str, str]]) -> Tapped:
    module = network.module
    for conv_name, norm_name in pairs:
        norm: Any = module.get_submodule(norm_name)
        module.set_submodule(conv_name, fuse_conv_bn_eval(module.get_submodule(conv_name), norm))  # type: ignore[type-var]
        after = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        module.set_submodule(norm_name, after)
    return network


def _outputs(network: Tapped, images: Tensor) -> list[Any]:
    return _listed(network.maps(images))


def _listed(found: Maps) -> list[Any]:
    output, maps = found
    return [output, *maps.values()]


def _difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest relative distance between outputs, of those that are tensors."""
    pairs = [both for both in zip(found, expected, strict=True) if isinstance(both[1], Tensor)]
    return max(float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)) for ours, theirs in pairs)


def _pairs(module: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and batch norms where the one's output is the other's input, and each runs once."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: list[tuple[str, str]] = []
    runs: Counter[str] = Counter()

    def watch(name: str, part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        runs[name] += 1
        if type(part) is nn.Conv2d:
            made[id(output)] = name, output  # held, so that no other tensor gets its id
        elif id(inputs[0]) in made and part.track_running_stats:
            found.append((made[id(inputs[0])][0], name))

    handles = [
        part.register_forward_hook(lambda part, inputs, output, name=name: watch(name, part, inputs, output))
        for name, part in module.named_modules()
        if type(part) in {nn.Conv2d, *FOLDABLE}
    ]
    try:
        module(images)
    finally:
        for handle in handles:
            handle.remove()
    runs.update(conv for conv, _ in found if sum(conv == other for other, _ in found) > 1)
    return [(conv, norm) for conv, norm in found if runs[conv] == runs[norm] == 1]
