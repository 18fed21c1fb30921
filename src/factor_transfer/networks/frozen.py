"""The frozen teacher: it never changes, and it is cheap to ask.

Its batch norms are folded into the convolutions before them, which saves a pass over memory for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from factor_transfer.networks.features import Tapped
from factor_transfer.util.files import state_fingerprint

FOLDABLE = (nn.BatchNorm2d, BatchNormAct2d)
"""Batch norms whose evaluation is a scale and a shift of each channel (and, of timm's, an activation)."""

TOLERANCE = 1e-4
"""A folded network whose outputs differ by more, relatively, computes something else."""

Maps = tuple[Any, dict[str, Tensor]]
"""A network's output, and its maps (B, C, H, W) by layer."""


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


@contextmanager
def untrained(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Exclude weights from training inside the block: they require no gradient, so no optimizer changes them."""
    kept = list(weights)
    for weight in kept:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in kept:
            weight.requires_grad_(True)


@dataclass(frozen=True)
class Folding:
    """A network whose batch norms are folded into the convolutions before them."""

    network: Tapped
    count: int
    """Batch norms that were folded; 0 where none could be."""
    difference: float
    """Of outputs and feature maps from the plain network's, relative, in the precision of its weights."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Names of the convolutions and of the batch norms that were folded into them."""


@torch.no_grad()
def folded(plain: Tapped, images: Tensor, known: Sequence[tuple[str, str]] | None = None) -> Folding:
    """A copy of a network for evaluation only, its batch norms folded into the convolutions that feed nothing else.

    Which belong together is seen by watching what flows, so that any network will do. A folded batch norm becomes
    `nn.Identity` (timm's, with activation: that activation) under its old name. Where the
    convolution feeds something else that no module shows, comparing outputs tells, and the batch norm stays.

    Args:
        plain: the network; the tapped layers keep their meaning.
        images: normalised images (B, 3, H, W) to watch and compare, on the CPU: a GPU's TF32 would cover what differs.
        known: the `pairs` of another process, where it has decided.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> folding = folded(Tapped(net, "2"), torch.zeros(1, 3, 8, 8))
    >>> folding.count, folding.network.module[1]
    (1, Identity())
    """
    watched = deepcopy(plain).cpu().eval()
    expected = watched.maps(images)

    def attempt(pairs: Sequence[tuple[str, str]]) -> Folding:
        made = _fold(deepcopy(plain).cpu().eval(), pairs)
        return Folding(made, len(pairs), difference(made.maps(images), expected), tuple(pairs))

    if known is not None:
        return attempt(known)
    pairs = [(conv, norm) for conv, norm in _pairs(watched.module, images) if conv not in plain.layers]
    folding = attempt(pairs)
    if not folding.difference < TOLERANCE:  # some convolution feeds more than its batch norm
        folding = attempt([pair for pair in pairs if attempt([pair]).difference < TOLERANCE])
    return folding if folding.difference < TOLERANCE else Folding(deepcopy(plain), 0, 0.0)


def _fold(network: Tapped, pairs: Sequence[tuple[str, str]]) -> Tapped:
    module = network.module
    for conv_name, norm_name in pairs:
        norm: Any = module.get_submodule(norm_name)
        module.set_submodule(conv_name, fuse_conv_bn_eval(module.get_submodule(conv_name), norm))  # type: ignore[type-var]
        after = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        module.set_submodule(norm_name, after)
    return network


def difference(found: Maps, expected: Maps) -> float:
    """The largest relative distance (L2) between outputs and maps, of those that are tensors."""
    pairs = [both for both in zip(_listed(found), _listed(expected), strict=True) if isinstance(both[1], Tensor)]
    return max(float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)) for ours, theirs in pairs)


def _listed(found: Maps) -> list[Any]:
    output, maps = found
    return [output, *maps.values()]


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
